"""Change what a model says about single facts, and leave alone what it says about all others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lfm import method
from lfm.data import DataSpec
from lfm.models.ref import ModelRef

if TYPE_CHECKING:
    import torch


class Guard(BaseModel):
    """What one update may do to a model before it is refused; a plain word is short for `{mode: <word>}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Literal["off", "refuse", "shrink"] = Field(
        "refuse", description="Whether updates that go too far are left out, or tried again at half the size."
    )
    norm: float | None = Field(None, gt=0, description="Largest |change| / |matrix|; noted, but no limit, if left out.")
    spectrum: float | None = Field(
        None, gt=1, description="Largest growth of a matrix's largest singular value, all in all; no limit if left out."
    )
    perplexity: float = Field(1.2, gt=1, description="Largest growth of the perplexity on text that the model made up.")
    retention: float = Field(0.9, ge=0, le=1, description="Share of earlier edits in force that have to stay so.")

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value


class Inputs(method.Inputs):
    """The model, and what it should say."""

    model: ModelRef = Field(description="The model to edit.")
    requests: DataSpec = Field(
        description="Edits: rows of prompt and target, and of subject, old, paraphrases, neighbours where known."
    )
    text: DataSpec | None = Field(
        None, description="Ordinary text for statistics of what must not change; made up by the model if left out."
    )
    statistics: Literal["text", "identity"] = Field(
        "text", description="`identity` takes all directions for equally common, which harms what is near the edits."
    )
    tokens: int = Field(20_000, ge=100, description="Tokens of text that statistics are taken from.")
    guard: Guard | None = Field(
        None,
        description="Checks of each update before it counts: off, refuse or shrink; refuse for several if left out.",
    )
    base: ModelRef | None = Field(
        None, description="What the patches of an edited model lie on; looked for where it was if left out."
    )
    batch: int | None = Field(None, ge=1, description="Edits made at once; as many as suits the method if left out.")


class Edit(method.Method):
    """A way to edit."""


@dataclass(frozen=True)
class Layer:
    """What an update of one matrix is made of: the columns of keys go in, residuals are what should come out besides.

    `covariance` is E[k k^T] over ordinary text, with no direction of zero variance. `earlier` is the sum of k k^T over
    the keys of all edits before these.
    """

    keys: torch.Tensor  # (width, n), float64
    residuals: torch.Tensor  # (outputs, n), float64
    covariance: torch.Tensor  # (width, width), float64
    earlier: torch.Tensor  # (width, width), float64


class LeastSquares(Edit):
    """A way to edit that takes the way out of an MLP for a memory: keys go in at the end of a subject, values come out.

    The value that makes the model say the target is searched for first; `rows` then says how the matrix is changed so
    that the key gives it. All such changes are W + R V, with the residuals R (outputs, n) and rows V (n, width).
    """

    at_once: ClassVar[int | None] = None  # how many edits are made in one update; None for all
    stream: ClassVar[bool] = False  # whether the value is that of the whole block's output, spread over its layers

    layers: list[int] | None = Field(
        None, description="Blocks whose MLP is edited, from 0; chosen in the middle of the model if left out."
    )
    steps: int = Field(25, ge=1, description="Steps of Adam in the search for values.")
    learning_rate: float = Field(0.3, gt=0, description="Its learning rate, over the root mean square of the stream.")
    clamp: float = Field(3.0, gt=0, description="Largest change of a value, over the length of the stream there.")
    kl: float = Field(0.0625, ge=0, description="Weight of leaving alone what the model says of the subject itself.")
    decay: float = Field(0.05, ge=0, description="Weight of a small change, in lengths of the stream there.")
    enough: float = Field(0.05, ge=0, description="-log P(target) at which the search for a value ends.")
    contexts: int = Field(
        20, ge=0, description="Beginnings, made up by the model, in which an edit should hold too; 0 for none."
    )
    ridge: float = Field(1e-3, ge=0, description="Added to the covariance's diagonal, in shares of its mean.")

    @abstractmethod
    def rows(self, layer: Layer) -> torch.Tensor:
        """Return V (n, width), float64."""

    def columns(self, bare: torch.Tensor, averaged: torch.Tensor) -> list[torch.Tensor]:
        """Return the keys (width, n) that have to give the value, each once for every edit.

        `bare` are those of the prompts alone, `averaged` the means over all contexts.
        """
        return [averaged]


class Tuned(Edit):
    """A way to edit by gradient steps on the requests."""

    layers: list[int] | None = Field(
        None, description="Blocks whose MLP is tuned, from 0; one in the middle if left out."
    )
    steps: int = Field(25, ge=1, description="Steps of Adam.")
    learning_rate: float = Field(5e-4, gt=0, description="Its learning rate.")
    enough: float = Field(0.01, ge=0, description="Loss at which tuning ends.")

    @abstractmethod
    def bound(self, before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> None:
        """Move the matrices `now`, in place, back to where they may be."""
