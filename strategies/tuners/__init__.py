"""Tuners: lessons -> target adapter. The union is the registry: a wrong `kind` lists the right ones."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.tuners.distil_dp import DistilDp
from strategies.tuners.sft import Sft

AnyTuner: TypeAlias = Annotated[Sft | DistilDp, Field(discriminator="kind")]
