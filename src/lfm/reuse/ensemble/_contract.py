"""Combine models by what they answer: their weights are neither needed nor changed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from lfm import method
from lfm.data import DataSpec
from lfm.models.ref import ModelRef

if TYPE_CHECKING:
    import torch

    from lfm.models.handle import Backend, Model

State = dict[str, "torch.Tensor"]  # what a method has learned


class Inputs(method.Inputs):
    """The members of an ensemble, and examples to learn from how to join them."""

    models: list[ModelRef] = Field(description="The members: folders, hub names, endpoints, other ensembles.")
    base: ModelRef | None = Field(None, description="The model that the members were tuned from.")
    weights: list[float] | None = Field(None, description="One for each member, 0 or more; equal if left out.")
    data: DataSpec | None = Field(
        None, description="Labelled examples that no member was trained on, to learn weights, thresholds, temperatures."
    )
    calibrate: Literal["no", "members", "ensemble"] = Field(
        "no", description="Divide logits of each member, or of the ensemble, by a temperature that is fitted to `data`."
    )
    length: int = Field(256, ge=8, description="Longest text of `data`, in tokens.")
    copy_members: bool = Field(False, description="Copy the members into the output, which then needs nothing else.")


class Members(Protocol):
    """What a method may ask of the members about one batch; all speak of the same classes, in one order."""

    def __len__(self) -> int: ...

    @property
    def knows(self) -> torch.Tensor:
        """Which member knows which class: bool (members, classes)."""

    def log_probs(self, index: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return log-probabilities (n, classes) of a member, -inf for classes unknown to it; of `rows` (m,) alone."""

    def labels(self, index: int) -> torch.Tensor:
        """Return the classes (n,) that a member takes for the right ones."""

    def looks(self) -> torch.Tensor:
        """Return what the examples look like (n, width), float32, without asking any member."""


class Ensemble(method.Method):
    """A way to join what models say of the classes of an example."""

    weighted: ClassVar[bool] = False  # whether `weights` mean something
    one_set: ClassVar[bool] = True  # whether all members have to know the same classes
    writes: ClassVar[bool] = False  # whether next tokens can be joined as classes are

    @property
    def learns(self) -> bool:
        """Whether `data` is needed."""
        return False

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        """Return what is learned from all held-out examples and their classes (n,)."""
        return {}

    @abstractmethod
    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        """Return log-probabilities (n, classes); -inf where nobody believes in a class."""


class TextEnsemble(method.Method):
    """A way to join models that write."""

    weighted: ClassVar[bool] = False

    @abstractmethod
    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        """Return what writes in the name of all members."""


class TunedEnsemble(method.Method):
    """A way to join classifiers that were tuned from one base, by their weights as seen from it."""

    weighted: ClassVar[bool] = False

    @abstractmethod
    def backend(self, base: Model, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        """Return what answers in the name of all members."""
