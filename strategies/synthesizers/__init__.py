"""Synthesizers: an adapter -> drafts. One member so far; the next joins it as `Annotated[A | B, discriminator]`."""

from typing import TypeAlias

from strategies.synthesizers.control_codes import ControlCodes

AnySynthesizer: TypeAlias = ControlCodes
