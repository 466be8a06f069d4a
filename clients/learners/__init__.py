"""Learners: private rows -> a release and its receipt. The union is the registry of their kinds."""

from typing import Annotated, TypeAlias

from pydantic import Field

from clients.learners.dp_distil import DpDistil
from clients.learners.dp_ffa_lora import DpFfaLora
from clients.learners.dp_lora import DpLora
from clients.learners.plain_lora import PlainLora

AnyLearner: TypeAlias = Annotated[DpLora | DpFfaLora | DpDistil | PlainLora, Field(discriminator="kind")]
