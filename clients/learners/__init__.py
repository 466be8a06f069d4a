"""Learners: private rows -> a release and its receipt. The next member joins as `Annotated[A | B, discriminator]`."""

from typing import TypeAlias

from clients.learners.dp_lora import DpLora

AnyLearner: TypeAlias = DpLora
