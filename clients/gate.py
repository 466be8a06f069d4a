"""What the site's own policy says to what a server asks, before anything is read, spent or computed.

Every rule here compares public values with `site.toml`; none looks at a row. `objections` lists all that would refuse,
for a data holder who looks ahead; `check` raises the first, for a round.

Out of scope: what a round costs (`spending`); keys that no configuration may hold at all (`clients.config`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app.errors import PolicyRefusal
from fl_app.sequences import WIDTH_STEP

if TYPE_CHECKING:
    from clients.config import SitePolicy
    from clients.stages import Learner
    from clients.survey import Survey
    from fl_app.config import RunSection
    from fl_app.models import FrozenModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a server asks for, as far as a policy looks at it. An empty `base` or `config_digest` is not known yet."""

    learner: Learner
    survey: Survey | None
    run: RunSection
    round_number: int
    base: str
    config_digest: str


def check(policy: SitePolicy, request: Request) -> None:
    """Raise `PolicyRefusal` unless the site allows what the server asks."""
    found = objections(policy, request)
    if found:
        raise PolicyRefusal(found[0])


def objections(policy: SitePolicy, request: Request) -> list[str]:
    """Return every rule of the policy that refuses the request, in the order of `site.toml`'s own keys."""
    limits, learner, run = policy.limits, request.learner, request.run
    kinds = (learner.release_kind, *(request.survey.release_kinds if request.survey else ()))
    rules = (
        *(
            (
                kind not in limits.release_kinds,
                f"release kind {kind!r} is not allowed; site.toml: {limits.release_kinds}",
            )
            for kind in dict.fromkeys(kinds)
        ),
        (
            not learner.private and not limits.non_private,
            "a learner without noise is asked; site.toml: limits.non_private = false",
        ),
        (
            learner.steps > limits.max_steps_per_round,
            f"{learner.steps} steps a round asked, at most {limits.max_steps_per_round} allowed",
        ),
        (
            learner.private and not learner.clip_norm <= limits.max_clip_norm,
            f"clip norm {learner.clip_norm:g} asked, at most {limits.max_clip_norm:g} allowed",
        ),
        (
            run.rounds > limits.max_rounds or request.round_number > run.rounds,
            f"round {request.round_number} of {run.rounds} asked, at most {limits.max_rounds} rounds allowed",
        ),
        (
            bool(limits.base_models and request.base) and request.base not in limits.base_models,
            f"base model {request.base[:12]} is not on the list of site.toml",
        ),
        (
            bool(limits.allowed_configs and request.config_digest)
            and request.config_digest not in limits.allowed_configs,
            f"configuration {request.config_digest[:12]} is not on the list limits.allowed_configs of site.toml",
        ),
        (
            run.mode == "production"
            and getattr(learner, "guide", None) is not None
            and request.config_digest not in limits.allowed_configs,
            (
                "the learner names a teacher, a model or folder of the server's choice, whose own training no receipt "
                "covers; look at it, and put the configuration's digest into limits.allowed_configs of site.toml"
            ),
        ),
        (
            run.mode == "simulation" and not limits.simulation,
            "run.mode is 'simulation' (seeded noise, no privacy); this site trains in production only",
        ),
        (
            run.mode == "production" and limits.simulation,
            "site.toml allows simulation, so its ledger certifies nothing; set limits.simulation = false",
        ),
    )
    return [words for refuses, words in rules if refuses]


def check_length(policy: SitePolicy, frozen: FrozenModel) -> None:
    """Raise `PolicyRefusal` when a row might be longer than the model's positions.

    Found out at a row, it would fail the round in which that row is drawn, and the failure would tell of the row; a
    model that stretches its positions on the way (dynamic RoPE) would carry one row's length into others' gradients.
    """
    most = getattr(frozen.model.config.get_text_config(), "max_position_embeddings", None)
    width = -(-policy.constants.max_tokens // WIDTH_STEP) * WIDTH_STEP
    if most is not None and width > most:
        raise PolicyRefusal(
            f"constants.max_tokens = {policy.constants.max_tokens} (padded to {width}) exceeds the {most} positions of "
            f"{frozen.resolved.name}; lower it in site.toml"
        )
