"""Markup that escapes by default: a `str` is text and is escaped, only `Html` is markup.

Drafts and lessons are written by a model and may hold anything, so there is one door from text to markup, `render`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

NOT_MEASURED = "not measured"

WIDE = 5
"""Columns from which a table keeps a width of its own and is scrolled on a telephone, rather than squeezed."""


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that is safe to put into the page as it is."""

    markup: str


Cell: TypeAlias = str | Html


def clean(text: str) -> str:
    """Return text that every browser and XML reader accepts: controls and lone surrogates become U+FFFD."""
    kept = "".join(each if each >= " " or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)
    kept = kept.replace("\x7f", "\N{REPLACEMENT CHARACTER}")
    return kept.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def render(cell: Cell) -> str:
    """Return the markup of a cell."""
    return cell.markup if isinstance(cell, Html) else html.escape(clean(cell))


def join(*parts: Cell, between: str = "") -> Html:
    """Return parts one after the other."""
    return Html(between.join(render(part) for part in parts))


def tag(name: str, *children: Cell, **attributes: str) -> Html:
    """Return an element; `class_` becomes class, `aria_label` becomes aria-label."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{render(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{told}>{join(*children).markup}</{name}>")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Collection[int] = ()) -> Html:
    """Return a captioned table whose first column heads its rows; columns in `numeric` align right."""
    shades = ["num" if column in numeric else "txt" for column in range(len(head))]
    top = tag("tr", *(tag("th", title, scope="col", class_=shade) for title, shade in zip(head, shades, strict=True)))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=shades[0]),
            *(tag("td", cell, class_=shade) for cell, shade in zip(row[1:], shades[1:], strict=True)),
        )
        for row in rows
    ]
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", top),
        tag("tbody", *body),
        class_="wide" if len(head) > WIDE else "",
    )
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Cell) -> Html:
    """Return a part that opens on demand."""
    return tag("details", tag("summary", summary), *children)


def missing(what: str) -> Html:
    """Return the line that stands where a part of the run is not known."""
    return tag("p", f"{what}: {NOT_MEASURED}.", class_="missing")
