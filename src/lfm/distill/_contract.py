"""Teach a student what a teacher knows: on data, on data that is made for it, or through an API."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from lfm import method
from lfm.data import DataSpec
from lfm.method import Access
from lfm.models.ref import ModelRef
from lfm.train import Optimised, Trained

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lfm.distill._asked import Asked
    from lfm.models.encode import Examples
    from lfm.models.handle import Model


class Smaller(BaseModel):
    """A student that is made from the teacher: some of its layers, a part of its width."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=1)] | None = Field(
        None, description="How many of the teacher's layers, spread evenly, or which, counted from 0; all if left out."
    )
    width: float = Field(
        1.0, gt=0, le=1, description="Share of the heads, MLP units and hidden width that is kept: the heaviest."
    )
    weights: bool = Field(True, description="Start from the teacher's weights in these places, or from new ones.")

    @model_validator(mode="after")
    def _something(self) -> Smaller:
        if self.layers is None and self.width == 1 and not self.model_fields_set & {"width", "layers"}:
            raise ValueError("say how to make it from the teacher: layers, or width")
        return self


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
        description="The model to teach, old or new, or how to make it from the teacher: {layers: 4, width: 0.5}."
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
    `hidden` are the hidden states that were asked for, those of both models in pairs: (batch, channels, height,
    width), (batch, length, width) or (batch, width). `mask` (batch, length) tells tokens from padding.
    """

    logits: torch.Tensor  # (n, classes), float32
    hidden: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    ids: torch.Tensor | None = None  # (n, k): then `logits` (n, k) are log-probabilities of these classes alone


@dataclass(frozen=True)
class Taught:
    """What a loss is made of. `labels` (n,) are missing where there are none; `extras` is what `connectors` made."""

    teacher: Said
    student: Said
    labels: torch.Tensor | None = None
    extras: nn.Module | None = None
    progress: float = 0.0  # share of the steps that are done, for weights that change over time


@dataclass(frozen=True)
class Kept:
    """What is kept on disk of a teacher's answers: the k likeliest of each, at a temperature."""

    k: int
    temperature: float


Terms = Mapping[str, "torch.Tensor"]  # named terms, weights included; their sum is minimised


class Matching(Trained):
    """A way to learn from what a teacher says of examples."""

    @abstractmethod
    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the loss on a batch."""

    def connectors(self, teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module | None:
        """Return what is trained along and thrown away, given the shapes of hidden states (without the batch)."""
        return None

    def kept(self) -> Kept | None:
        """Return what is kept on disk of the teacher's answers, in place of the teacher; None: nothing."""
        return None


class Guided(Matching):
    """A way to match something of the teacher beside its answers."""

    temperature: float = Field(4.0, gt=0, description="Temperature of both models' probabilities (T).")
    alpha: float = Field(
        0.9, ge=0, le=1, description="Weight of the teacher's answers, against the labels; 1 without labels."
    )

    def answers(self, taught: Taught) -> Terms:
        """Return alpha T^2 KL(teacher || student) and (1 - alpha) times the cross-entropy with the labels."""
        from lfm.distill._losses import answers

        return answers(taught, self.temperature, self.alpha)


class Inside(Guided):
    """A way to match what goes on inside: `needs` asks for weights, and `Said.hidden` holds what layers give."""

    layers: Literal["last", "all"] | dict[int, int] = Field(
        "last",
        description="Which layers are matched: the last ones, all of the one with fewer in even steps, or a map "
        "{student's: teacher's}, counted from 0; -1 is the last.",
    )


class Read(Guided):
    """A way to match what the output layers read: `Said.hidden` is that alone, (batch, width), of places the mean."""


class Folded(Read):
    """A way that gives the student another output layer at the end."""

    @abstractmethod
    def head(self, extras: nn.Module, teacher: nn.Linear) -> nn.Linear:
        """Return it, made of what was trained along and of the teacher's."""


class Online(Matching):
    """A way in which the teacher learns as well; `Taught.teacher` has gradients."""


class Successive(Guided):
    """A way in which what was taught teaches the next, a student like itself."""

    generations: int = Field(2, ge=1, description="Students taught one after the other, each by the one before.")


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
        self.notes: list[str] = []  # what the user should know, such as what the teacher has none of

    @abstractmethod
    def images(self, step: int) -> torch.Tensor:
        """Return the normalised inputs (batch, channels, height, width) that the student learns from at a step."""

    def samples(self, count: int) -> torch.Tensor:
        """Return so many inputs to show: of those that are left from training, or made by what is."""
        return self.images(0)[:count]

    def terms(self, student: nn.Module, images: torch.Tensor) -> Terms:
        """Return what the student minimises besides the method's terms, such as what it is not to forget."""
        return {}


class DataFree(Optimised):
    """A way to learn from a teacher alone: a synthesiser makes inputs, the student learns what is said of them."""

    steps: int = Field(1600, ge=1, description="Optimiser steps of the student.")
    batch_size: int = Field(128, ge=2, description="Inputs in a batch.")
    learning_rate: float = Field(5e-3, ge=0, description="Peak learning rate of AdamW.")
    temperature: float = Field(4.0, gt=0, description="Temperature of both models' probabilities in the loss.")

    @abstractmethod
    def synthesiser(self, scene: Scene) -> Synthesiser:
        """Return what makes the inputs."""

    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the student's loss: T^2 KL(teacher || student), unless the method says otherwise."""
        from lfm.distill._losses import divergence

        return {"kl": divergence(taught.teacher.logits, taught.student.logits, temperature=self.temperature)}


@dataclass(frozen=True)
class Inquiry:
    """What an inquirer works with: a teacher that can only be asked, and a student that is all its own."""

    teacher: Asked
    student: nn.Module
    space: Space
    queries: int  # that lessons may take; those of held-out inputs are taken off
    batch_size: int
    steps: int  # of the student
    asking: float  # share of the steps over which the queries are spent
    device: torch.device
    proxy: Examples | None = None  # images of the user's, where the method takes data


class Inquirer(Synthesiser):
    """Makes inputs, asks the teacher about them, and hands both to the student. What it paid for is in `tensors`."""

    @abstractmethod
    def lesson(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs (batch, channels, height, width) and what was said of them, log-probabilities (batch, classes).

        No more may be asked than `Inquiry.queries`; a step may ask nothing, and teach what was asked before.
        """

    @abstractmethod
    def known(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return up to so many inputs that were asked about, and what was said of them; nothing is asked."""

    @abstractmethod
    def held_out(self, count: int) -> torch.Tensor:
        """Return so many inputs that lessons will never hold, to measure agreement on."""

    def images(self, step: int) -> torch.Tensor:
        return self.lesson(step)[0]

    def samples(self, count: int) -> torch.Tensor:
        return self.known(count)[0]


class BlackBox(Optimised):
    """A way to learn from a teacher that answers and shows nothing else, and that counts what it is asked."""

    most: ClassVar[Access] = Access.PROBS  # what is used of a teacher, where it offers more than `needs` say

    queries: int = Field(25_000, ge=1, description="Inputs that the teacher is asked about, in all.")
    measured: float = Field(
        0.02, ge=0, lt=1, description="Share of the queries for held-out inputs, on which agreement is measured."
    )
    asking: float = Field(0.25, gt=0, le=1, description="Share of the steps over which the queries are spent.")
    steps: int = Field(
        1600, ge=1, description="Optimiser steps of the student, or as many more as it takes to spend the queries."
    )
    batch_size: int = Field(128, ge=2, description="Inputs in a batch.")
    learning_rate: float = Field(5e-3, ge=0, description="Peak learning rate of AdamW.")

    @abstractmethod
    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        """Return what asks."""

    @abstractmethod
    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the student's loss; `taught.labels` are there where the teacher tells no more."""

    def lessons(self, queries: int) -> int:
        """Return the steps that it takes to spend so many queries on lessons."""
        return 1


class Contested(BlackBox):
    """A way in which a generator seeks where teacher and student differ, by gradients guessed from answers."""

    directions: int = Field(1, ge=1, description="Random directions for a gradient (m).")
    mu: float = Field(1e-3, gt=0, description="Length of a step along them.")
    student_steps: int = Field(5, ge=1, description="Steps of the student on new images for each of the generator's.")
    generator_rate: float = Field(1e-4, gt=0, description="Learning rate of the generator (Adam).")
    latent: int = Field(256, ge=1, description="Random numbers that an image is made from.")
    width: int = Field(64, ge=2, description="Channels of the generator.")

    @abstractmethod
    def gap(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Return how far apart log-probabilities and logits (n, classes) are, for each input (n,)."""

    @property
    def replays(self) -> int:
        """How many steps on stored images the student takes after those on new ones."""
        return 0

    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        from lfm.distill.black_box._contest import Contest, Rules

        return Contest(inquiry, Rules.of(self), self.gap, self.generator_rate)

    def lessons(self, queries: int) -> int:
        from lfm.distill.black_box._contest import Rules

        return Rules.of(self).lessons(queries, self.batch_size, self.asking)


@dataclass(frozen=True)
class Start:
    """How a text begins: with a prompt, with a token of the vocabulary, or with what marks the beginning of texts."""

    prompt: str = ""
    token: int | None = None
    greedy: int = 0  # tokens that follow as the most probable ones, before sampling sets in


@dataclass(frozen=True)
class Desk:
    """What texts can be begun with: the prompts of data, if there is any, and the tokens that stand for text."""

    prompts: Sequence[str]
    vocabulary: Sequence[int]  # in random order


class Written(Optimised):
    """A way to learn from texts that the teacher writes first: from nothing, or after prompts."""

    steps: int = Field(1000, ge=1, description="Optimiser steps of the student.")
    count: int | None = Field(
        None, ge=1, description="Texts that the teacher writes; one for each prompt of the data, or 1,024 without data."
    )
    answers: Literal["best", "logits", "top_k", "text"] = Field(
        "best",
        description="What is used of the teacher: all logits, the likeliest tokens, its text, or the best it has.",
    )
    top_k: int = Field(8, ge=1, description="The likeliest tokens that are used, with one for all others (`top_k`).")
    temperature: float = Field(1.0, gt=0, description="Temperature of both models' probabilities in the loss.")
    sampling_temperature: float = Field(1.0, ge=0, description="Temperature the texts are sampled with; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this share.")
    min_tokens: int = Field(8, ge=1, description="Texts with fewer tokens are dropped.")
    max_repetition: float = Field(
        0.5, ge=0, le=1, description="Texts in which a larger share of the 4-grams has stood before are dropped."
    )

    @property
    def opening(self) -> int:
        """How many words of a plain text are its prompt, where texts go on from prompts."""
        return 8

    @abstractmethod
    def start(self, number: int, desk: Desk) -> Start:
        """Return how the text of that number begins."""

    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the loss where the teacher tells probabilities: T^2 KL(teacher || student)."""
        from lfm.distill._losses import divergence, same_classes

        teacher, student = same_classes(taught, self.temperature)
        return {"kl": self.temperature**2 * divergence(teacher, student)}


class OnPolicy(Trained):
    """A way to learn on texts that the student writes itself, after the prompts of data."""

    sampling_temperature: float = Field(0.9, ge=0, description="Temperature the texts are sampled with; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this share.")
    max_new_tokens: int = Field(128, ge=1, description="Tokens to write at most, after each prompt.")
    prompt_tokens: int = Field(
        16, ge=1, description="Tokens of a plain text that are its prompt; rows with a prompt bring their own."
    )

    @abstractmethod
    def author(self, chance: float) -> Literal["student", "teacher", "data"]:
        """Return who completes a batch of prompts, given a uniform random number."""

    @abstractmethod
    def terms(self, taught: Taught) -> Terms:
        """Return the terms of the loss on the tokens of completions."""
