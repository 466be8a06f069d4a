"""Synthesizers: what the sites released -> drafts. The union is the registry of their kinds."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.synthesizers.control_codes import ControlCodes
from strategies.synthesizers.released_texts import ReleasedTexts

AnySynthesizer: TypeAlias = Annotated[ControlCodes | ReleasedTexts, Field(discriminator="kind")]
