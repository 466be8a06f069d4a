"""DP-FedSA-LoRA: every site trains both factors and shares a alone; its b stays with it, so its model is its own.

A round begins with the broadcast's a and the b that the site kept of its last round (of its first: the broadcast's),
trains both under one clip, keeps b in its drawer, and releases a, with the broadcast's b in the place of its own. So
the sum of rows and noise that made b never leaves the site, and would be covered by the same receipt if it did.

When b is written does not matter. It is written before the release is in the outbox; a site that stops in between
begins the round again from what the round before left (`Drawer.latest`), under a new reservation, and replaces it. A
round that is resent from the outbox is not trained, and leaves the drawer as it is.

What it cannot do: the server has no b, so it can write no text, and its merged adapter is no better than its b, which
never moves. It is for sites that want a model of their own; `local_round.probe` scores that model.

Source: Guo et al. 2025 (FedSA-LoRA, 2410.01463, ICLR), section 4. Ours differs in DP-AdamW with the joint clip of
`clients.dp_steps` where theirs has SGD without noise, and has no classifier to keep at the site.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clients.dp_steps import DpAdapterLearner, DpStepsSection
from fl_app.errors import AdapterMismatch, RunInvalid
from fl_app.types import AdapterRelease

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clients.private_rows import PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.types import Adapter, DpReceipt, Floats


class DpFedsaLora(DpStepsSection):
    """[client.learner] kind = "dp_fedsa_lora"."""

    kind: Literal["dp_fedsa_lora"]

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return DpFedsaLearner(section=self, schedule="both", round_number=round_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpFedsaLearner(DpAdapterLearner):
    """A `Learner` that keeps what it does not share. Needs `Workbench.drawer`."""

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> AdapterRelease:
        """Return the trained a with the broadcast's b; the trained b is in the drawer by then.

        Guarantee: that of `DpAdapterLearner`, for a and b together.
        Raises: what `DpAdapterLearner` does; RunInvalid when there is no drawer; AdapterMismatch when its b does not
        fit the broadcast.
        """
        if bench.drawer is None:
            raise RunInvalid("dp_fedsa_lora needs a place of the site's own to keep b from round to round")
        own = personal(start, bench.drawer.latest(self.round_number))
        trained = DpAdapterLearner.__call__(self, rows, own, receipts, constants, bench).adapter
        bench.drawer.put(self.round_number, {name: factors.b for name, factors in trained.layers.items()})
        return AdapterRelease(adapter=personal(trained, {name: one.b for name, one in start.layers.items()}))


def personal(adapter: Adapter, b: Mapping[str, Floats] | None) -> Adapter:
    """Return an adapter with these b in the place of its own; the adapter itself without any.

    Raises: AdapterMismatch when they are not of its layers and shapes.
    """
    if b is None:
        return adapter
    if {name: one.shape for name, one in b.items()} != {name: one.b.shape for name, one in adapter.layers.items()}:
        raise AdapterMismatch("the b that this site kept does not fit the broadcast's layers and rank")
    layers = {name: dataclasses.replace(factors, b=b[name]) for name, factors in adapter.layers.items()}
    return dataclasses.replace(adapter, layers=layers)
