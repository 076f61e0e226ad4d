"""Teach a student what a teacher knows: on data, on data that is made for it, or through an API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from lfm import method
from lfm.data import DataSpec
from lfm.models.ref import ModelRef
from lfm.train import Optimised, Trained

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lfm.models.handle import Model


class Smaller(BaseModel):
    """A student that is made from the teacher: some of its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: int = Field(ge=1, description="How many of the teacher's layers, spread evenly.")
    weights: bool = Field(True, description="Start from the teacher's weights in these places, or from new ones.")


def _kind_of_student(value: Any) -> str:
    made = isinstance(value, Smaller) or (isinstance(value, dict) and set(value) & set(Smaller.model_fields))
    return "smaller" if made else "model"


Student = Annotated[
    Annotated[ModelRef, Tag("model")] | Annotated[Smaller, Tag("smaller")], Discriminator(_kind_of_student)
]


class Inputs(method.Inputs):
    """Who teaches whom, and on what."""

    teacher: ModelRef = Field(description="The model to learn from: a folder, hub name, endpoint, ensemble.")
    student: Student = Field(
        description="The model to teach, an old or a new one, or how to make it from the teacher: {layers: 4}."
    )
    data: DataSpec | None = Field(None, description="Examples to learn on; labels are used where there are any.")
    validation: DataSpec | None = Field(None, description="Held-out examples for early stopping (see patience).")
    length: int = Field(256, ge=8, description="Longest text, in tokens; plain text is cut into windows of it.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Type of the saved weights; float32 if left out."
    )


@dataclass(frozen=True)
class Said:
    """What a model says of a batch: of each example, or of each token that has a label.

    Of a teacher behind PROBS the logits are log-probabilities, which no softmax can tell apart; no gradient flows.
    `hidden` are the hidden states that were asked for, from the input on: (batch, channels, height, width),
    (batch, length, width) or (batch, width). `mask` (batch, length) tells tokens from padding.
    """

    logits: torch.Tensor  # (n, classes), float32
    hidden: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Taught:
    """What a loss is made of. `labels` (n,) are missing where there are none; `extras` is what `connectors` made."""

    teacher: Said
    student: Said
    labels: torch.Tensor | None = None
    extras: nn.Module | None = None
    progress: float = 0.0  # share of the steps that are done, for weights that change over time


Terms = Mapping[str, "torch.Tensor"]  # named terms, weights included; their sum is minimised


class Matching(Trained):
    """A way to learn from what a teacher says of examples."""

    crosses: ClassVar[bool] = False  # whether teacher and student may read text with different tokenizers
    inside: ClassVar[bool] = False  # whether hidden states are compared; `needs` then asks for weights

    @abstractmethod
    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the loss on a batch."""

    def connectors(self, teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module | None:
        """Return what is trained along and thrown away, such as projections, given the shapes of hidden states."""
        return None


@dataclass(frozen=True)
class Space:
    """What a model takes as input: the shape (channels, height, width), and its range once it is normalised."""

    shape: tuple[int, int, int]
    low: torch.Tensor  # (channels, 1, 1)
    high: torch.Tensor


@dataclass(frozen=True)
class Scene:
    """What a synthesiser works with. `teacher` offers what the method's `needs` say, and not more."""

    teacher: Model
    student: nn.Module
    space: Space
    classes: int
    batch_size: int
    steps: int  # of the student
    device: torch.device


class Synthesiser(ABC):
    """Makes inputs out of nothing but models. All randomness comes from torch's generator, which the loop seeds.

    Everything that changes lies in `modules`, `optimisers` and `tensors`, so that it is saved with the run.
    """

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    @abstractmethod
    def images(self, step: int) -> torch.Tensor:
        """Return the normalised inputs (batch, channels, height, width) that the student learns from at a step."""

    def samples(self, count: int) -> torch.Tensor:
        """Return so many inputs to show: of those that are left from training, or made by what is."""
        return self.images(0)[:count]


class DataFree(Optimised):
    """A way to learn from a teacher alone: a synthesiser makes inputs, the student learns what is said of them."""

    steps: int = Field(1600, ge=1, description="Optimiser steps of the student.")
    batch_size: int = Field(128, ge=2, description="Inputs in a batch.")
    learning_rate: float = Field(1e-3, ge=0, description="Peak learning rate of AdamW.")
    temperature: float = Field(4.0, gt=0, description="Temperature of both models' probabilities in the loss.")

    @abstractmethod
    def synthesiser(self, scene: Scene) -> Synthesiser:
        """Return what makes the inputs."""

    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the student's loss: T^2 KL(teacher || student), unless the method says otherwise."""
        from lfm.distill._losses import divergence

        return {"kl": divergence(taught.teacher.logits, taught.student.logits, temperature=self.temperature)}
