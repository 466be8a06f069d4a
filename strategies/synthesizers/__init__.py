"""Synthesizers: releases of the sites -> drafts. The union is the registry of their kinds."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.synthesizers.control_codes import ControlCodes
from strategies.synthesizers.epsvec import EpsVec
from strategies.synthesizers.released_texts import ReleasedTexts

AnySynthesizer: TypeAlias = Annotated[ControlCodes | ReleasedTexts | EpsVec, Field(discriminator="kind")]
