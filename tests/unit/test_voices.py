"""Who may write in a round, and which settings of aggregator, synthesizer and filters go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fl_app.config import read_tree
from fl_app.errors import ConfigInvalid
from fl_app.types import (
    Adapter,
    AdapterRelease,
    ClientLevelCost,
    DpReceipt,
    Gaussian,
    LoraFactors,
    Merged,
    Upload,
    VectorRelease,
)
from strategies.config import read_server
from strategies.stages import Voices

ADAPTER = Adapter(
    layers={"l": LoraFactors(a=np.ones((1, 2), np.float32), b=np.ones((3, 1), np.float32))}, alpha=1.0, base="base"
)
CENTRAL_DP = (
    "{kind='central_dp', inner={kind='mean_factors'}, clip_norm=1.0, noise_multiplier=1.0, epsilon=1.0, delta=1e-5}"
)


def _upload(site: str, release: Any = None) -> Upload:
    return Upload(site=site, round=1, release=release or AdapterRelease(adapter=ADAPTER), receipts=None, spent=0.0)


def test_the_releases_that_were_used_have_a_voice() -> None:
    merged = Merged(adapter=ADAPTER, used=("abbey", "delta"), rejected={"cliff": "krum"})
    vector = VectorRelease(vectors={"l": np.zeros(2, np.float32)})
    uploads = [_upload("delta"), _upload("cliff"), _upload("abbey")]

    voices = Voices.of(merged, uploads)

    assert list(voices.by_site) == ["abbey", "delta"]
    assert voices.merged is merged.adapter
    assert all(adapter is ADAPTER for adapter in voices.by_site.values())
    assert list(voices.releases) == ["abbey", "delta"]
    others = Voices.of(merged, [_upload("delta", vector), _upload("abbey", vector)])
    assert not others.by_site
    assert list(others.releases) == ["abbey", "delta"]


def test_no_single_release_has_a_voice_where_the_merged_adapter_is_private() -> None:
    receipt = DpReceipt(event=Gaussian(noise_multiplier=1.0, clip_norm=1.0), unit="site")
    cost = ClientLevelCost(receipt=receipt, spent=1.0, budget=2.0, delta=1e-5, scope="this run")

    assert not Voices.of(Merged(adapter=ADAPTER, used=("abbey",), cost=cost), [_upload("abbey")]).by_site


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            f"server.synthesizer.voices='each_site' server.aggregator={CENTRAL_DP}",
            r'server\.synthesizer\.voices = "each_site" lets single releases write, and central_dp promises.*"merged"',
        ),
        ("server.filters=[{kind='site_share'}]", 'site_share counts sites, and .*voices = "merged" names none'),
        (
            "server.synthesizer.voices='each_site' server.filters=[{kind='site_share'},{kind='near_duplicate'}]",
            "site_share is number 1 of 2, and filters after it.*put it last",
        ),
        ("server.synthesizer.voices='each'", "server.synthesizer.voices = 'each'.*'merged' or 'each_site'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_run(overrides: str, told: str) -> None:
    with pytest.raises(ConfigInvalid, match=told):
        read_server(read_tree("configs/smoke.toml", overrides))


def test_what_goes_together_is_read() -> None:
    filters = "server.filters=[{kind='near_duplicate'},{kind='site_share'}]"
    server = read_server(read_tree("configs/smoke.toml", f"server.synthesizer.voices='each_site' {filters}"))

    assert (server.synthesizer.voices, [one.kind for one in server.filters][-1]) == ("each_site", "site_share")
    assert read_server(read_tree("configs/smoke.toml")).synthesizer.voices == "merged"
