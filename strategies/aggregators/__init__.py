"""Aggregators: uploads -> one adapter. The union is the registry: a wrong `kind` lists the right ones."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.aggregators.central_dp import CentralDp
from strategies.aggregators.mean_factors import MeanFactors
from strategies.aggregators.mean_product import MeanProduct

AnyAggregator: TypeAlias = Annotated[MeanFactors | MeanProduct | CentralDp, Field(discriminator="kind")]
