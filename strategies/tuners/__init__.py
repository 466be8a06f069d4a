"""Tuners: lessons -> target adapter. One member so far; the next joins it as `Annotated[A | B, discriminator]`."""

from typing import TypeAlias

from strategies.tuners.sft import Sft

AnyTuner: TypeAlias = Sft
