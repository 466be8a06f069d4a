"""Filters: drafts -> screened drafts. The union is the registry: a wrong `kind` lists the right ones."""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.filters.domain import Domain
from strategies.filters.kernel_density import KernelDensity
from strategies.filters.length import Length
from strategies.filters.near_duplicate import NearDuplicate
from strategies.filters.pii import Pii
from strategies.filters.site_share import SiteShare

AnyFilter: TypeAlias = Annotated[
    Length | NearDuplicate | Domain | Pii | SiteShare | KernelDensity, Field(discriminator="kind")
]
