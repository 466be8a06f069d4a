"""Distillers: drafts -> lessons. The union is the registry: a wrong `kind` lists the right ones.

| kind               | who answers                                 | calls of the professional per draft             |
|--------------------|---------------------------------------------|-------------------------------------------------|
| professional       | the lab's own model                         | one answer                                      |
| endpoint           | an OpenAI-compatible server                 | none; one request, cached                       |
| judge_then_rewrite | the lab's own model, twice where it is weak | an answer, a verdict; both again for a weak one |
| self_consistency   | the lab's own model, several times          | `samples` answers                               |
| selected           | any of the above                            | the inner one's, and two likelihoods a lesson   |
"""

from typing import Annotated, TypeAlias

from pydantic import Field

from strategies.distillers.endpoint import Endpoint
from strategies.distillers.judge_then_rewrite import JudgeThenRewrite
from strategies.distillers.professional import Professional
from strategies.distillers.selected import Selected
from strategies.distillers.self_consistency import SelfConsistency

AnyDistiller: TypeAlias = Annotated[
    Professional | Endpoint | JudgeThenRewrite | SelfConsistency | Selected, Field(discriminator="kind")
]
