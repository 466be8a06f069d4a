"""Distillers: drafts -> lessons. The union is the registry: a wrong `kind` lists the right ones."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.distillers.endpoint import Endpoint
from strategies.distillers.professional import Professional

AnyDistiller: TypeAlias = Annotated[Professional | Endpoint, Field(discriminator="kind")]
