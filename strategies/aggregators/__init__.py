"""Aggregators: uploads -> one adapter. The union is the registry: a wrong `kind` lists the right ones.

| kind                 | what is aggregated                     | one hostile site of n moves delta_W by             |
|----------------------|----------------------------------------|----------------------------------------------------|
| mean_factors         | mean of A, mean of B                   | any length                                         |
| mean_product         | mean of B @ A, exactly                 | any length                                         |
| central_dp           | clipped mean of A and B, with noise    | a clipped update, hidden in the noise              |
| median_factors       | median of A's and of B's coordinates   | nothing beyond the honest range of any coordinate  |
| bounded_mean_product | mean of B @ A, updates cut to a length | twice that length over n                           |
| krum_product         | the nearest B @ A, or the mean of some | twice the honest uploads' spread (hostile = 1)     |

The last three say in their modules from how many sites on, and what they do not claim.
"""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.aggregators.bounded_mean_product import BoundedMeanProduct
from strategies.aggregators.central_dp import CentralDp
from strategies.aggregators.krum_product import KrumProduct
from strategies.aggregators.mean_factors import MeanFactors
from strategies.aggregators.mean_product import MeanProduct
from strategies.aggregators.median_factors import MedianFactors

AnyAggregator: TypeAlias = Annotated[
    MeanFactors | MeanProduct | CentralDp | MedianFactors | BoundedMeanProduct | KrumProduct,
    Field(discriminator="kind"),
]
