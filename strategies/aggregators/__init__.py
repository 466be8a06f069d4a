"""Aggregators: uploads -> one adapter. The union is the registry: a wrong `kind` lists the right ones.

| kind                 | what is aggregated                                  | exact          | mixed ranks | carries |
|----------------------|-----------------------------------------------------|----------------|-------------|---------|
| mean_factors         | mean of A, mean of B; mean of cores                 | if one is same | no          | yes     |
| mean_product         | mean of B @ A, as one stack                         | yes            | yes         | no      |
| stacked              | the same stack as a block, fresh start              | yes            | yes         | yes     |
| residual             | mean of A and B, what they miss as a block          | yes            | no          | yes     |
| truncated_svd        | best adapter of the run's rank to mean of B @ A     | up to the rank | yes         | yes     |
| thresholded_svd      | what holds a share of its energy, as a block        | energy = 1     | yes         | yes     |
| sketched_svd         | the best adapter, seen through a random sketch      | up to the rank | yes         | yes     |
| ridge                | mean of A; B nearest to mean of B @ A               | no             | no          | yes     |
| zero_padded          | mean of padded A and B: a baseline that is wrong    | no             | yes         | yes     |
| central_dp           | clipped mean of A and B, with noise                 | no             | no          | yes     |
| median_factors       | median of A's and of B's coordinates                | no             | no          | yes     |
| bounded_mean_product | an inner sum of B @ A, updates cut to a length      | no             | yes         | inner's |
| krum_product         | an inner sum of the uploads with the nearest B @ A  | no             | inner's     | inner's |

The sum is sum_k p_k s_k B_k A_k with public shares p_k (`strategies.weighing`). "Carries": a next round can start from
the result. "If one is same": where A or B is common to all sites. The last four are made for hostile or curious
company:

| kind                 | one hostile site of n moves delta_W by             |
|----------------------|----------------------------------------------------|
| any of the others    | any length                                         |
| central_dp           | a clipped update, hidden in the noise              |
| median_factors       | nothing beyond the honest range of any coordinate  |
| bounded_mean_product | twice that length over n                           |
| krum_product         | twice the honest uploads' spread (hostile = 1)     |

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
from strategies.aggregators.residual import Residual
from strategies.aggregators.ridge import Ridge
from strategies.aggregators.sketched_svd import SketchedSvd
from strategies.aggregators.stacked import Stacked
from strategies.aggregators.thresholded_svd import ThresholdedSvd
from strategies.aggregators.truncated_svd import TruncatedSvd
from strategies.aggregators.zero_padded import ZeroPadded

AnyAggregator: TypeAlias = Annotated[
    MeanFactors
    | MeanProduct
    | Stacked
    | Residual
    | TruncatedSvd
    | ThresholdedSvd
    | SketchedSvd
    | Ridge
    | ZeroPadded
    | CentralDp
    | MedianFactors
    | BoundedMeanProduct
    | KrumProduct,
    Field(discriminator="kind"),
]
