"""Combine models by what they answer: their weights are neither needed nor changed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from lfm import method
from lfm.data import DataSpec
from lfm.method import Access
from lfm.models.ref import ModelRef
from lfm.train import Descent

if TYPE_CHECKING:
    import torch

    from lfm.models.handle import Backend, Model
    from lfm.models.text import Prompt
    from lfm.reuse.ensemble._cost import CostCurve

Offered = Sequence[tuple[str, Access]]  # members by their names, with what they offer
State = dict[str, "torch.Tensor"]  # what a method has learned


class Inputs(method.Inputs):
    """The members of an ensemble, and examples to learn from how to join them."""

    models: list[ModelRef] = Field(
        description="The members: folders, hub names, endpoints, other ensembles; or the one model to train into them."
    )
    base: ModelRef | None = Field(None, description="The model that the members were tuned from.")
    weights: list[float] | None = Field(None, description="One for each member, 0 or more; equal if left out.")
    data: DataSpec | None = Field(
        None,
        description="Labelled examples that no member was trained on, to learn weights, thresholds, temperatures; for "
        "methods that train, what to train on.",
    )
    calibrate: Literal["no", "members", "ensemble"] = Field(
        "no",
        description="Divide logits of each member, or of the ensemble, by a temperature that is fitted to `data`; of "
        "an ensemble of language models without `data`, to what its members write.",
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

    def problems(self, offered: Offered) -> Iterator[str]:
        """Yield what speaks against joining these members."""
        yield from ()

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        """Return what is learned from all held-out examples and their classes (n,)."""
        return {}

    def curve(self, members: Members, labels: torch.Tensor) -> CostCurve | None:
        """Return what asking costs and brings on held-out examples of these classes (n,), where that is a choice."""
        return None

    @abstractmethod
    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        """Return log-probabilities (n, classes); -inf where nobody believes in a class."""


class TextEnsemble(method.Method):
    """A way to join models that write."""

    weighted: ClassVar[bool] = False
    measures: ClassVar[bool] = False  # whether `curve` tells something of `data`

    def problems(self, offered: Offered) -> Iterator[str]:
        """Yield what speaks against joining these members."""
        yield from ()

    def curve(self, members: Sequence[Model], prompts: Sequence[Prompt]) -> CostCurve | None:
        """Return what answering these prompts costs."""
        return None

    @abstractmethod
    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        """Return what writes in the name of all members."""


class TunedEnsemble(method.Method):
    """A way to join classifiers that were tuned from one base, by their weights as seen from it."""

    weighted: ClassVar[bool] = False

    @abstractmethod
    def backend(self, base: Model, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        """Return what answers in the name of all members."""


@dataclass(frozen=True)
class Course:
    """How a run goes: its steps, the share of the peak learning rate at each (from 0), when a member is kept."""

    steps: int
    rate: Callable[[int], float]
    kept: tuple[int, ...]  # numbers of steps taken


class TrainedEnsemble(Descent):
    """A way to make an ensemble of one model: it is trained on `data`, and members are what it is on the way."""

    weighted: ClassVar[bool] = False

    epochs: float = Field(3.0, gt=0, description="Passes over the data, all in all.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps, in place of epochs.")

    @property
    def fewest(self) -> int:
        """The fewest steps that make a run."""
        return 1

    @abstractmethod
    def course(self, steps: int) -> Course:
        """Return how a run of so many steps goes; they may be rounded up."""


@dataclass(frozen=True)
class Layer:
    """A matrix, or convolution, that answering multiplies by: its widths, and whether something is added then."""

    name: str
    reads: int
    writes: int
    shifts: bool


class JointEnsemble(TrainedEnsemble):
    """A way to train members that share all weights but a few numbers of their own, all at once, in one module.

    A layer of member i has the weights W o (s_i r_i^T), and b o s_i + c_i is what it adds.
    """

    members: int = Field(4, ge=1, description="Number of members.")
    batches: Literal["divided", "repeated"] = Field(
        "divided", description="Divide a batch over the members, or show all of it to each, at a cost of so many times."
    )
    factor_rate: float = Field(
        1.0, ge=0, description="Learning rate of what members have of their own, over that of the shared weights."
    )

    @abstractmethod
    def draw(self, layers: Sequence[Layer], chance: torch.Generator) -> State:
        """Return the members' own numbers at the start.

        That is for each layer `r.<name>` (members, reads), `s.<name>` (members, writes), and where it adds something
        `c.<name>` (members, writes).
        """
