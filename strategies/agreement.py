"""What the two sides of one configuration must agree on, read by the server before anything is asked of a site.

What a synthesizer writes from must be what the sites' learner sends; layers that are measured must be those that are
pushed; a sum that is read must be one that is made, of the same features. Each of these would otherwise be found out in
a round, at a site, or never.

Out of scope: what a site's policy allows (`clients.gate`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from fl_app import factors
from fl_app.config import Section, parse
from fl_app.errors import ConfigInvalid
from fl_app.kernel_sum import KernelSumSection
from strategies.answering import SLOT
from strategies.coded import read_codes
from strategies.filters.kernel_density import KernelDensity
from strategies.synthesizers.released_texts import ReleasedTexts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.config import Tree
    from fl_app.types import ReleaseKind, ReleaseSpec, Schedule

RELEASED: dict[str, ReleaseKind] = {
    "dp_lora": "adapter",
    "dp_ffa_lora": "adapter",
    "dp_rolora": "adapter",
    "dp_la_lora": "adapter",
    "dp_lora_sb": "adapter",
    "dp_fedsa_lora": "adapter",
    "dp_distil": "adapter",
    "zeroth_order": "adapter",
    "plain_lora": "adapter",
    "private_prediction": "text",
    "invisible_ink": "text",
    "epsvec": "vector",
    "pe_votes": "histogram",
}
"""What every kind of learner sends. The server cannot import them; a test holds this table to their union."""


TEXTS_PER_BUCKET = {"private_prediction": 16, "invisible_ink": 1}
MAX_BYTES = 4096
"""What a learner that writes takes where nothing is said; a test holds both to the learners' own defaults."""


class _Survey(Section):
    """What the server reads of [client.survey]; the site reads all of it."""

    model_config = ConfigDict(extra="ignore")

    codes: bool = True
    kernel: KernelSumSection | None = None


def check(tree: Tree, *, synthesizer: Any, filters: Sequence[Any]) -> None:
    """Raise `ConfigInvalid` unless [client] makes what [server] reads."""
    client = tree.get("client")
    learner = client.get("learner") if isinstance(client, dict) else None
    if isinstance(learner, dict):
        _check_release(learner, synthesizer)
    survey = _read_survey(tree)
    if getattr(synthesizer, "quota", "") == "survey" and not survey.codes:
        raise ConfigInvalid('server.synthesizer.quota = "survey" reads counts of codes; add [client.survey]')
    for one in filters:
        if isinstance(one, KernelDensity):
            _check_kernel(one, survey.kernel)


def check_task(distiller: Any, tuner: Any) -> None:
    """Raise `ConfigInvalid` when a target would learn to write a task where it should write a draft."""
    rehearse: float = getattr(tuner, "rehearse", 0.0)
    if getattr(distiller, "task", SLOT) != SLOT and rehearse > 0:
        raise ConfigInvalid(
            f"server.tuner.rehearse = {rehearse:g} would write the task server.distiller.task after control codes, "
            "where a draft belongs; write rehearse = 0"
        )


def schedule(tree: Tree) -> Schedule | None:
    """Return which factors the sites' learner moves; None where it sends no adapter."""
    return factors.schedule_of(tree["client"]["learner"]) if _kind(tree) in factors.KINDS else None


def _kind(tree: Tree) -> str:
    """Return the kind of [client.learner] as far as there is one."""
    client = tree.get("client")
    learner = client.get("learner") if isinstance(client, dict) else None
    return str(learner.get("kind")) if isinstance(learner, dict) else ""


def check_carried(tree: Tree, server: Any) -> None:
    """Raise `ConfigInvalid` when learner, aggregator and what is carried from round to round do not fit."""
    how, aggregator = schedule(tree), server.aggregator.kind
    _check_ranks(tree, server)
    if server.ranks.kind in {"listed", "by_memory"} and (why := _said(server.aggregator, "one_rank")):
        raise ConfigInvalid(
            f"server.ranks.kind = {server.ranks.kind!r} lets sites train other ranks, and server.aggregator.kind = "
            f"{aggregator!r} {why}; use stacked, truncated_svd, thresholded_svd or sketched_svd"
        )
    if how == "core" and (why := _said(server.aggregator, "no_cores")):
        raise ConfigInvalid(
            f"client.learner trains cores, and server.aggregator.kind = {aggregator!r} takes none: {why}; use "
            "mean_factors"
        )
    if server.carries == "merged" and server.synthesizer.writes_from != "adapter":
        raise ConfigInvalid(
            f'server.carries = "merged" carries the sites\' adapters on, and server.synthesizer.kind = '
            f'{server.synthesizer.kind!r} asks them for none; write carries = "target"'
        )
    if server.carries == "merged" and not getattr(server.aggregator, "carries", True):
        raise ConfigInvalid(
            f"server.aggregator.kind = {aggregator!r} grows in rank and cannot be trained on; to carry it on, write "
            '"stacked" (FLoRA), "residual" (FedEx-LoRA) or "truncated_svd" (FlexLoRA)'
        )
    if _kind(tree) == "dp_fedsa_lora" and (aggregator not in OF_A or server.ranks.kind != "same"):
        raise ConfigInvalid(
            f"client.learner.kind = 'dp_fedsa_lora' shares a alone, under the b that each site keeps, and "
            f"server.aggregator.kind = {aggregator!r} with server.ranks.kind = {server.ranks.kind!r} would change what "
            f"that b belongs to; use {', '.join(sorted(OF_A))} and one rank"
        )
    if _kind(tree) == "dp_fedsa_lora" and server.synthesizer.kind != "no_drafts":
        raise ConfigInvalid(
            "client.learner.kind = 'dp_fedsa_lora' keeps b at the sites, so the server has no model that writes; write "
            'server.synthesizer = {kind = "no_drafts"}, or another learner'
        )
    if how == "core" and (server.carries == "target" or server.synthesizer.kind != "no_drafts"):
        raise ConfigInvalid(
            "a learner that trains cores (Fed-SB) keeps a and b for the whole run, and a tuner would move them; write "
            'server.carries = "merged" and server.synthesizer = {kind = "no_drafts"}'
        )


OF_A = frozenset({"mean_factors", "median_factors", "central_dp"})
"""Aggregators that take a by itself."""

TRAINED = {"both": "both", "steps": "both", "b": "b", "rounds": "rounds", "core": "core"}
"""What `central_dp.trains` must say of each schedule of the sites' learner."""


def _whole(tree: Any, *path: str) -> int:
    """Return a whole number of a tree that nobody has parsed yet; 0 where there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, int) and not isinstance(tree, bool) else 0


def tokens(tree: Tree) -> int:
    """Return the tokens that the sites' learner computes at once."""
    return _whole(tree, "client", "learner", "micro_batch_tokens") or LEARNER_TOKENS


LEARNER_TOKENS = 512
"""What learners compute at once where [client.learner] says nothing."""


def _said(aggregator: Any, name: str) -> str:
    """Return what an aggregator, or the one that it wraps, says against some uploads; empty for nothing."""
    inner = getattr(aggregator, "inner", None)
    return getattr(aggregator, name, "") or (_said(inner, name) if inner is not None else "")


def stacks(aggregator: Any) -> bool:
    """Whether an aggregate may be of a higher rank than one upload: sums of products, and FedEx-LoRA's residual."""
    told = getattr(aggregator, "inner", aggregator)
    return told.kind == "residual" or not getattr(told, "one_rank", "")


def _check_ranks(tree: Tree, server: Any) -> None:
    """Raise `ConfigInvalid` for a rank, or for trained factors, that a round would find out about."""
    rank, most = getattr(server.aggregator, "rank", None), _whole(tree, "lora", "rank")
    least = min(server.ranks.choices) if server.ranks.kind == "drawn" else most
    if rank is not None and most and rank > least:
        raise ConfigInvalid(
            f"server.aggregator.rank = {rank} exceeds the {least} that a round trains (lora.rank, server.ranks.choices)"
        )
    how = "a" if _kind(tree) == "dp_fedsa_lora" else TRAINED.get(schedule(tree) or "", "")
    trains = getattr(server.aggregator, "trains", how)
    if server.aggregator.kind == "central_dp" and how and trains != how:
        raise ConfigInvalid(
            f"server.aggregator.trains = {trains!r}, and client.learner moves {how!r}: noise would go where nothing "
            f"is trained, or miss what is; write trains = {how!r}"
        )


def survey(tree: Tree, asks: ReleaseSpec) -> dict[str, int]:
    """Return the names and lengths of what the sites count and sum once in a run. Raises: ConfigInvalid."""
    told = _read_survey(tree)
    if told.codes and not asks.codes:
        raise ConfigInvalid("client.survey.codes counts control codes, and server.synthesizer has none; leave it out")
    kernel = {"kernel": told.kernel.dim} if told.kernel is not None else {}
    return ({"codes": len(asks.codes)} if told.codes else {}) | kernel


def _read_survey(tree: Tree) -> _Survey:
    client = tree.get("client")
    told = client.get("survey") if isinstance(client, dict) else None
    return _Survey(codes=False) if told is None else parse(_Survey, told, where="client.survey")


def _check_release(learner: Tree, synthesizer: Any) -> None:
    kind, wanted = learner.get("kind"), synthesizer.writes_from
    sent = RELEASED.get(str(kind))
    if wanted is not None and sent is not None and sent != wanted:
        fitting = [name for name, release in RELEASED.items() if release == wanted]
        raise ConfigInvalid(
            f"client.learner.kind = {kind!r} sends {sent}, server.synthesizer.kind = {synthesizer.kind!r} writes from "
            f"{wanted}; learners that send it: {', '.join(fitting)}"
        )
    if synthesizer.kind == "epsvec" and list(learner.get("layers", ())) != list(synthesizer.layers):
        raise ConfigInvalid(
            f"client.learner.layers = {learner.get('layers')} are measured, and server.synthesizer.layers = "
            f"{list(synthesizer.layers)} are pushed; write the same layers in both"
        )
    if isinstance(synthesizer, ReleasedTexts):
        _check_texts(learner, synthesizer)


def _check_texts(learner: Tree, synthesizer: ReleasedTexts) -> None:
    """Raise `ConfigInvalid` where sites could write more, or longer, than the server then takes."""
    each = TEXTS_PER_BUCKET.get(str(learner.get("kind")))
    if each is None or not Path(synthesizer.codes).is_file():
        return
    codes = len(read_codes(Path(synthesizer.codes)))
    most = codes * _whole(learner, "buckets_per_code") * (_whole(learner, "texts_per_bucket") or each)
    longest = _whole(learner, "max_bytes") or MAX_BYTES
    for key, asked, taken in (
        ("max_texts", most, synthesizer.max_texts),
        ("max_bytes", longest, synthesizer.max_bytes),
    ):
        if asked > taken:
            raise ConfigInvalid(
                f"server.synthesizer.{key} = {taken}, and by client.learner a site may send {asked} ({codes} codes): "
                f"its budget would be spent on a release that is refused; write {key} = {asked}, or ask for less"
            )


def _check_kernel(wanted: KernelDensity, summed: KernelSumSection | None) -> None:
    """Raise `ConfigInvalid` unless the sites sum the very features that the filter reads."""
    if summed is None:
        raise ConfigInvalid(
            "server.filters: kernel_density reads a sum of kernel features that no site is asked for; add "
            "[client.survey.kernel] with the filter's embedder, dim, bandwidth, kernel and seed"
        )
    if key := wanted.same_sum(summed):
        raise ConfigInvalid(
            f"server.filters: kernel_density.{key} = {getattr(wanted, key)!r}, and client.survey.kernel.{key} = "
            f"{getattr(summed, key)!r}; the sum means nothing unless both are the same"
        )
