"""Synthesizers: releases of the sites -> drafts. The union is the registry of their kinds."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.synthesizers.control_codes import ControlCodes
from strategies.synthesizers.epsvec import EpsVec
from strategies.synthesizers.no_drafts import NoDrafts
from strategies.synthesizers.private_evolution import PrivateEvolution
from strategies.synthesizers.public_only import PublicOnly
from strategies.synthesizers.released_texts import ReleasedTexts
from strategies.synthesizers.zero_shot import ZeroShot

AnySynthesizer: TypeAlias = Annotated[
    ControlCodes | ReleasedTexts | EpsVec | PrivateEvolution | PublicOnly | ZeroShot | NoDrafts,
    Field(discriminator="kind"),
]
