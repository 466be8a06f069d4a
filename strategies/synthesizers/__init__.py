"""Synthesizers: releases of the sites -> drafts. The union is the registry of their kinds."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.synthesizers.control_codes import ControlCodes
from strategies.synthesizers.private_evolution import PrivateEvolution
from strategies.synthesizers.public_only import PublicOnly
from strategies.synthesizers.zero_shot import ZeroShot

AnySynthesizer: TypeAlias = Annotated[
    ControlCodes | PrivateEvolution | PublicOnly | ZeroShot, Field(discriminator="kind")
]
