"""Combine models of one architecture into one, weight by weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lfm import method
from lfm.models.ref import ModelRef

if TYPE_CHECKING:
    import numpy as np
    import torch

DTypeName = Literal["float32", "bfloat16", "float16"]
Scope = Literal["nothing", "tensor", "model"]


class Inputs(method.Inputs):
    """The models of a merge."""

    models: list[ModelRef] = Field(description="The models to merge (the sources).", min_length=1)
    base: ModelRef | None = Field(None, description="The model that the sources were tuned from.")
    weights: list[float] | None = Field(None, description="One weight for each model; all 1 if left out.")
    dtype: DTypeName | None = Field(None, description="Type of the merged weights; that of the base (or first model).")


@dataclass
class Chunk:
    """A part of one tensor, in every model: flat arrays of equal length, all finite, free to be overwritten.

    They are float32, or float64 where a model stores the tensor so.
    """

    tensor: str
    sources: list[torch.Tensor]
    base: torch.Tensor | None
    weights: tuple[float, ...]
    random_bits: Callable[[int], np.ndarray[Any, Any]]  # source -> uint32, the same wherever the tensor is cut

    @property
    def the_base(self) -> torch.Tensor:
        """The base's elements, for methods that need a base."""
        if self.base is None:
            raise AssertionError("the plan lets no method that needs a base run without one")
        return self.base

    def deltas(self) -> Iterator[torch.Tensor]:
        """Yield source - base for each source, in order. Takes the place of the sources: ask once."""
        for source in self.sources:
            yield source.sub_(self.the_base)

    def moved(self, change: torch.Tensor) -> torch.Tensor:
        """Return base + change: the base's own bits where the change is 0. Takes the place of both: ask once."""
        return self.the_base.sub_(change.neg_().add_(0.0))  # -0.0 + 0.0 is 0.0, but -0.0 - 0.0 is -0.0


Scan = Callable[[Callable[[Chunk], "np.ndarray[Any, Any]"]], "np.ndarray[Any, Any]"]


class Merge(method.Method):
    """A way to combine weights.

    `merge` sees one chunk at a time and decides each element from that element's values and from what `measure` found.
    `measure` may look at whole tensors (`measures == "tensor"`) or whole models (`"model"`) first: `scan(f)` applies
    f to every chunk and returns the sum of what it gives.

    Add with separate products and sums, not with `add(alpha=)` or `lerp`: those may or may not be fused, depending on
    where in a chunk an element lies, and bytes would depend on the chunk.
    """

    weighted: ClassVar[bool] = True  # whether a weight per model means something
    random: ClassVar[bool] = False  # whether `Chunk.random_bits` is used

    def objections(self, weights: Sequence[float]) -> list[str]:
        """Return what speaks against these weights, one for each model."""
        return []

    @property
    def measures(self) -> Scope:
        """What `measure` has to see before the first element can be merged."""
        return "nothing"

    def measure(self, scan: Scan, sources: int, size: int) -> Any:
        """Return what `merge` needs to know about a tensor, or all of them, of `size` elements in each source."""
        return None

    @abstractmethod
    def merge(self, chunk: Chunk, measured: Any) -> torch.Tensor:
        """Return the merged elements of a chunk, in the arithmetic of the chunk."""
