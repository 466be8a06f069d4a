"""Attacks on our own releases. The union is the registry: a wrong `kind` lists the right ones."""

from typing import TypeAlias

from simulations.attacks.one_run import OneRun

AnyAttack: TypeAlias = OneRun
"""One member so far; a second makes it an `Annotated[... | ..., Field(discriminator="kind")]`."""
