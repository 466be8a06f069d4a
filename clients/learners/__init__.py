"""Learners: private rows -> a release and its receipt. The union is the registry of their kinds."""

from typing import Annotated, TypeAlias

from pydantic import Field

from clients.learners.dp_distil import DpDistil
from clients.learners.dp_fedsa_lora import DpFedsaLora
from clients.learners.dp_ffa_lora import DpFfaLora
from clients.learners.dp_la_lora import DpLaLora
from clients.learners.dp_lora import DpLora
from clients.learners.dp_lora_sb import DpLoraSb
from clients.learners.dp_rolora import DpRolora
from clients.learners.epsvec import EpsVec
from clients.learners.invisible_ink import InvisibleInk
from clients.learners.pe_votes import PeVotes
from clients.learners.plain_lora import PlainLora
from clients.learners.private_prediction import PrivatePrediction
from clients.learners.zeroth_order import ZerothOrder

AnyLearner: TypeAlias = Annotated[
    DpLora
    | DpFfaLora
    | DpRolora
    | DpLaLora
    | DpLoraSb
    | DpFedsaLora
    | DpDistil
    | ZerothOrder
    | PlainLora
    | PrivatePrediction
    | InvisibleInk
    | EpsVec
    | PeVotes,
    Field(discriminator="kind"),
]
