"""Rows as token sequences, grouped by privacy unit: what every learner samples from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from fl_app import models, sequences

if TYPE_CHECKING:
    from clients.private_rows import PrivateRow, PrivateRows
    from clients.stages import PublicConstants, Workbench
    from fl_app.sequences import TokenSequence

Learns: TypeAlias = Literal["instruction", "answer"]
"""The instruction after its control code (what a server needs to write new ones), or its answer in chat form."""


def encoded_units(
    rows: PrivateRows, learns: Learns, constants: PublicConstants, bench: Workbench
) -> list[tuple[TokenSequence, ...]]:
    """Return the encoded rows of every privacy unit, in the order of the units' first rows.

    Guarantee: a sequence is a function of its own row and of public constants; it has at most `max_tokens` tokens.
    """
    grouped: dict[str, list[TokenSequence]] = {}
    for row in rows.examples:
        grouped.setdefault(row.unit, []).append(_encode(row, learns, constants.max_tokens, bench))
    return [tuple(examples) for examples in grouped.values()]


def halves(row: PrivateRow, learns: Learns, bench: Workbench) -> tuple[str, str]:
    """Return what a learner shows a model of a row, and what it then has it learn to write."""
    if learns == "answer":
        return models.chat_prompt(bench.model.tokenizer, row.instruction, bench.system), row.output
    return bench.codes.get(row.code, ""), row.instruction


def _encode(row: PrivateRow, learns: Learns, max_tokens: int, bench: Workbench) -> TokenSequence:
    prefix, text = halves(row, learns, bench)
    return sequences.encode(bench.model.tokenizer, prefix, text, max_tokens=max_tokens)
