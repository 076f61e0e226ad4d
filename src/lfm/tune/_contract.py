"""Train a model further on data of a task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lfm import method
from lfm.data import DataSpec
from lfm.models.ref import ModelRef, Task
from lfm.train import Trained

if TYPE_CHECKING:
    from torch import nn

    from lfm.models.anatomy import Anatomy


class Inputs(method.Inputs):
    """The model and the data of a tuning run."""

    model: ModelRef = Field(description="The model to tune.")
    data: DataSpec = Field(description="What to tune it on.")
    validation: DataSpec | None = Field(None, description="Held-out data for early stopping (see patience).")
    task: Task | None = Field(None, description="What to tune it for, where that is not what it is made for.")
    new_head: bool = Field(False, description="Give a classifier a new output layer for the classes of the data.")
    length: int = Field(
        256, ge=8, description="Longest text, in tokens; plain text is cut into windows of this length."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the saved weights; that of the model if left out."
    )


class Tune(Trained):
    """A way to tune: which parameters are trained, and how fast each of them."""

    @abstractmethod
    def groups(self, module: nn.Module, anatomy: Anatomy) -> list[Mapping[str, Any]]:
        """Return AdamW parameter groups (`params`, `lr`, `weight_decay`); what is in none of them stays fixed."""
