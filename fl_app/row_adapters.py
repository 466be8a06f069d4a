"""An adapter per row: one batch of `generate` in which every row is written by a LoRA adapter of its own.

    out_i = base(x_i) + s_k * (x_i A_k') B_k'        (k = the adapter of row i, ' is transposed, s = alpha / r)

The frozen map runs once for the whole batch, the low-rank part as two batched products over groups of rows that share
an adapter. So K sites can write in one batch, where one site after another would pass over the base model K times.
Prompt pass and cached steps, left padding included, are the same arithmetic: a row is a row whatever its length.

Out of scope: training (`lora_linear`), who writes what (`strategies.synthesizers`).

Legend of shapes: B = rows, T = padded length, I and O = inputs and outputs of a map, r = largest rank among the
adapters, G = groups, n = rows of a group.
Source: batched LoRA products as in Wen and Chaudhuri 2023 (FLoRA, 2312.05677), section 3, there for training and with
one adapter per example. Ours keeps the factors apart and groups rows, so an adapter is read once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import lora
from fl_app.errors import AdapterMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How the rows of a batch lie in groups of one size, each with one adapter.

    `adapters` (G,) says which adapter a group has, `rows` (G * n,) which row stands in each place, `places` (B,) where
    each row stands. A group that is short repeats its first row; nobody looks at what comes of it.
    """

    adapters: tuple[int, ...]
    rows: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether rows already lie as the groups want them, so that nothing is copied."""
        return self.rows == tuple(range(len(self.places)))


def groups_of(index: Sequence[int]) -> Groups:
    """Return the groups of a batch whose row i has adapter `index[i]`.

    Guarantee: fewer than 2 * B + K places for K adapters in use: a group holds ceil(B / K) rows, and each adapter
    leaves at most one group short.
    """
    members: dict[int, list[int]] = {}
    for row, adapter in enumerate(index):
        members.setdefault(adapter, []).append(row)
    size = -(-len(index) // len(members))
    adapters: list[int] = []
    rows: list[int] = []
    for adapter, own in sorted(members.items()):
        for begin in range(0, len(own), size):
            group = own[begin : begin + size]
            adapters.append(adapter)
            rows += group + [group[0]] * (size - len(group))
    places = {row: place for place, row in reversed(list(enumerate(rows)))}
    return Groups(adapters=tuple(adapters), rows=tuple(rows), places=tuple(places[row] for row in range(len(index))))


def attach(frozen: FrozenModel, adapters: Sequence[Adapter], index: Sequence[int]) -> Any:
    """Return a replica of the frozen model, over the same weights, whose row i carries `adapters[index[i]]`.

    It takes batches of len(index) rows and no others. `keep_rows` of the replica, given the numbers of some of them,
    goes on with those, as decoding does when rows have ended; given None, with all again. Factors are kept in float32,
    as PEFT keeps them, whatever the base is in. Adapters may differ in rank: smaller ones are filled up with zeros,
    which add nothing.

    Guarantee: `frozen` is not touched, neither by this call nor by an exception in a pass of the replica. What a row
    becomes does not depend on the numbers of any other row or of its adapter, not-a-number included. Against a run
    with one adapter, outputs are equal up to rounding: products are summed in another order.
    Raises: AdapterMismatch when an adapter is for another base, adapters differ in layers, a layer is no linear map of
    the model or of another shape, or `index` names no adapter; and, in a pass, for a batch of another size.
    """
    _check(frozen, adapters, index)
    used = sorted(set(index))
    worn = _Worn([used.index(one) for one in index])
    chosen = [adapters[one] for one in used]
    model = frozen.replica().model
    for name in chosen[0].layers:
        module = model.get_submodule(name)
        module.forward = worn.forward(name, module.forward, _stacked(chosen, name))
    model.keep_rows = worn.keep_rows
    return model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stack:
    """Factors of one layer, scaling within `b`. Shapes: a (K, I, r), a view of (K, r, I); b (K, r, O)."""

    a: Any
    b: Any

    def of(self, groups: Groups) -> _Stack:
        """Return the factors by group."""
        chosen = list(groups.adapters)
        return _Stack(a=self.a.transpose(1, 2)[chosen].transpose(1, 2), b=self.b[chosen])


def _stacked(adapters: Sequence[Adapter], name: str) -> _Stack:
    import torch

    layers = [one.layers[name] for one in adapters]
    rank = max(layer.a.shape[0] for layer in layers)
    a = np.zeros((len(layers), rank, layers[0].a.shape[1]), np.float32)
    b = np.zeros((len(layers), rank, layers[0].b.shape[0]), np.float32)
    for number, (adapter, layer) in enumerate(zip(adapters, layers, strict=True)):
        own = layer.a.shape[0]
        a[number, :own] = layer.a
        b[number, :own] = (adapter.alpha / own) * layer.b.T
    return _Stack(a=torch.from_numpy(a).transpose(1, 2), b=torch.from_numpy(b))


class _Worn:
    """Which row of the batch wears which adapter, and what every layer makes of it."""

    def __init__(self, index: Sequence[int]) -> None:
        self.stacks: dict[str, _Stack] = {}
        self.placed: dict[str, _Stack] = {}
        self.whole = tuple(index)
        self.index: tuple[int, ...] = ()
        self.keep_rows(None)

    def keep_rows(self, kept: Sequence[int] | None) -> None:
        """Go on with the rows `kept`, by their numbers in the batch so far; None: with the whole batch again."""
        import torch

        index = self.whole if kept is None else tuple(self.index[row] for row in kept)
        if index == self.index:
            return
        self.index = index
        self.groups = groups_of(self.index)
        self.in_order = self.groups.in_order
        self.rows, self.places = torch.tensor(self.groups.rows), torch.tensor(self.groups.places)
        self.placed = {name: stack.of(self.groups) for name, stack in self.stacks.items()}

    def forward(self, name: str, base: Any, stack: _Stack) -> Any:
        """Return the forward of one map: the frozen one, and what each row's adapter adds to it."""
        import torch

        self.stacks[name], self.placed[name] = stack, stack.of(self.groups)

        def forward(x_BTI: Any) -> Any:
            if x_BTI.ndim != 3 or x_BTI.shape[0] != len(self.index):  # noqa: PLR2004 - B, T, I
                raise AdapterMismatch(
                    f"{name} gets inputs of shape {tuple(x_BTI.shape)}; this model carries an adapter for each of "
                    f"{len(self.index)} rows of tokens: attach adapters for the batch that is to be decoded"
                )
            own, num_groups = self.placed[name], len(self.groups.adapters)
            out_BTO = base(x_BTI)
            placed = x_BTI if self.in_order else x_BTI[self.rows]
            low_GNr = torch.bmm(placed.reshape(num_groups, -1, x_BTI.shape[-1]).float(), own.a)
            if self.in_order and out_BTO.dtype == torch.float32:
                out_BTO.view(num_groups, -1, out_BTO.shape[-1]).baddbmm_(low_GNr, own.b)
                return out_BTO
            more = torch.bmm(low_GNr, own.b).view(len(self.groups.rows), *out_BTO.shape[1:])
            return out_BTO.add_(more if self.in_order else more[self.places])

        return forward


def _check(frozen: FrozenModel, adapters: Sequence[Adapter], index: Sequence[int]) -> None:
    if not index or not all(0 <= one < len(adapters) for one in index):
        raise AdapterMismatch(f"rows ask for adapters {sorted(set(index))[:4]}; there are {len(adapters)}, from 0 on")
    lora.check_alike(adapters, same_rank=False)
    if adapters[0].base != frozen.resolved.sha256:
        raise AdapterMismatch(
            f"adapters are for base {adapters[0].base[:12]}, {frozen.resolved.name} is {frozen.resolved.sha256[:12]}"
        )
    maps = {name: module for name, module in frozen.model.named_modules() if name in adapters[0].layers}
    for number, adapter in enumerate(adapters):
        for name, factors in adapter.layers.items():
            shape = lora.linear_shape(maps[name]) if name in maps else None
            rank = factors.a.shape[0]
            if shape is None or factors.a.shape != (rank, shape[0]) or factors.b.shape != (shape[1], rank):
                raise AdapterMismatch(
                    f"adapter {number}, {name}: factors {factors.a.shape} and {factors.b.shape}; the model's map there "
                    f"is {shape or 'no linear one'}"
                )
