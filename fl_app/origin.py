"""Where this project's files are, and a check that our top-level names are really ours.

`clients` and `strategies` are generic names: a package of the same name in site-packages, or the working directory of
whoever started Flower first, would win silently. Both doors call `check_origin` before they import anything of ours.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fl_app.errors import OriginShadowed

ROOT = Path(__file__).resolve().parent.parent
"""The project's root: the checkout, or the unpacked Flower bundle on a node."""

PACKAGES = ("fl_app", "strategies", "clients")


def check_origin() -> None:
    """Raise `OriginShadowed` unless every package of the bundle is found beside this file."""
    for name in PACKAGES:
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != ROOT:
            message = f"package {name!r} is imported from {found}, expected {ROOT}: start Flower from another directory"
            raise OriginShadowed(message)
