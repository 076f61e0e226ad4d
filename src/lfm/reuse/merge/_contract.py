"""Combine models of one architecture into one, weight by weight."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from lfm import method
from lfm.models.ref import ModelRef
from lfm.reuse.merge._machine.array import Array

if TYPE_CHECKING:
    import numpy as np

DTypeName = Literal["float32", "bfloat16", "float16", "float64"]
Scope = Literal["nothing", "tensor", "layer", "global"]


def _setting(value: Any) -> Any:
    """Check a value that is plain, a list (by layer) or a mapping (by tensor name): see `_settings`."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _setting(part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Input should be a finite number (got {value})")
    if not isinstance(value, (dict, list, int, float, str)) or value in ([], {}):
        raise ValueError(
            f"Input should be a number, a list of numbers, or a mapping from names to them (got {value!r})"
        )
    return value


def _weight(value: Any) -> Any:
    """Check a weight, which is a number wherever it varies; YAML takes 1e-3 for text."""
    if isinstance(value, dict):
        return _setting({name: _weight(part) for name, part in value.items()})
    if isinstance(value, list):
        return _setting([_weight(part) for part in value])
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"Input should be a valid number (got {value!r})") from None
    return _setting(float(value) if isinstance(value, int) else value)


_SHAPES = WithJsonSchema({"anyOf": [{"type": kind} for kind in ("number", "string", "boolean", "array", "object")]})
Setting = Annotated[Any, AfterValidator(_setting), _SHAPES]
Weight = Annotated[
    Any,
    AfterValidator(_weight),
    WithJsonSchema({"anyOf": [{"type": kind} for kind in ("number", "array", "object")]}),
]


class SliceSource(BaseModel):
    """Some consecutive layers of one of the models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="One of `models` (or the base), as it is written there.")
    layers: tuple[int, int] = Field(description="First layer, and the one after the last.")
    weight: Weight | None = Field(None, description="Its weight in this slice.")
    parameters: dict[str, Setting] = Field({}, description="Parameters of the method, for this model in this slice.")


class Slice(BaseModel):
    """Consecutive layers of the output: merged from the same number of layers of each source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: list[SliceSource] = Field(description="Which layers of which models; with one source, its keys alone do.")
    parameters: dict[str, Any] = Field({}, description="Parameters of the method, in this slice.")
    base: str | None = Field(None, description="The base in this slice, one of its sources; that of the step.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, dict) and "sources" not in value and "model" in value:
            return {"sources": [value]}
        return value


class Inputs(method.Inputs):
    """The models of a merge, and how they fit together."""

    models: list[ModelRef] = Field(description="The models to merge (the sources).", min_length=1)
    base: ModelRef | None = Field(None, description="The model that the sources were tuned from.")
    weights: list[Weight] | None = Field(None, description="One weight for each model; all 1 if left out.")
    dtype: DTypeName | None = Field(None, description="Type of the merged weights; that of the base (or first model).")
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="How numbers are rounded to that type.")
    vary: dict[str, Any] = Field(
        {}, description="Parameters that differ by layer ([0.2, 0.8]), tensor ({mlp: 0.5, default: 1}) or model."
    )
    slices: list[Slice] = Field([], description="Build the layers of the output from slices of the models' layers.")
    only: list[str] = Field([], description="Merge only tensors with such names (`model.language_model.*`).")
    rest: ModelRef | None = Field(None, description="Where the others come from: the base or first model if left out.")
    tokenizer: str | dict[str, Any] = Field(
        "same", description="For models whose tokenizers differ: `base`, `union`, one of the models, or rules."
    )
    chat_template: str | None = Field(None, description="`auto`, the name of a template, or its text.")


@dataclass(frozen=True, eq=False)
class Site:
    """What a method sees of one tensor: its elements in every model, as arrays to compute with.

    `weights` has one number for each source. A parameter that `per_source` names may differ between sources: ask
    `each(name)`. Equal sites give equal results, so nothing here says which tensor it is but `layer`.
    """

    sources: tuple[Array, ...]
    base: Array | None
    weights: tuple[float, ...]
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    layer: tuple[int, int] | None = None  # number of the layer, and of layers, for methods that are `by_layer`

    @property
    def the_base(self) -> Array:
        """The base's elements, for methods that need a base."""
        if self.base is None:
            raise AssertionError("the plan lets no method that needs a base run without one")
        return self.base

    @cached_property
    def deltas(self) -> list[Array]:
        """The task vectors: source - base, for each source."""
        return [source - self.the_base for source in self.sources]

    def each(self, name: str) -> tuple[Any, ...]:
        """Return a parameter's value for each source."""
        return self.values[name]

    def random(self, source: int) -> Array:
        """Return uniform numbers in [0, 1): functions of seed, source, tensor and place alone."""
        return Array("RANDOM", index=source)

    def rank(self, source: int) -> Array:
        """Return, in [0, 1], how many of the elements of its row moved less (row: all but the first axis)."""
        return Array("INPUT", index=len(self.sources) + 1 + source)  # the engine puts them after the models

    def moved(self, change: Array) -> Array:
        """Return base + change: the base's own bits where the change is 0."""
        return self.the_base - (0.0 - change)  # -0.0 + 0.0 is 0.0, but -0.0 - 0.0 is -0.0


class Extent(Protocol):
    """The elements that a measure looks at: one tensor, one layer, or all."""

    @property
    def sources(self) -> int:
        """How many models are merged."""

    @property
    def size(self) -> int:
        """How many elements each of them has here."""

    def each(self, name: str) -> tuple[Any, ...]:
        """Return a parameter's value for each source."""

    def total(self, of: Callable[[Site], Sequence[tuple[Array, Array]]]) -> np.ndarray[Any, Any]:
        """Return the sum over all elements of each product a * b, in float64."""

    def largest(self, of: Callable[[Site], Sequence[Array]]) -> np.ndarray[Any, Any]:
        """Return the largest element of each array."""

    def kth_largest(self, of: Callable[[Site], Sequence[Array]], ranks: Sequence[int]) -> list[float]:
        """Return, for each array, the magnitude (in float32) of its k-th largest element, 1 being the largest.

        Rank 0 gives infinity, and a rank of `size` or more 0.0, which no magnitude is below; neither is looked for.
        """


@dataclass
class Whole:
    """One tensor in every model, whole, in float32 (float64 where stored so): for methods that need its shape."""

    sources: list[np.ndarray[Any, Any]]
    base: np.ndarray[Any, Any] | None
    weights: tuple[float, ...]
    values: dict[str, tuple[Any, ...]]
    layer: tuple[int, int] | None
    is_table: bool  # whether rows belong to tokens: an embedding, or an output layer
    device: str = "cpu"  # where heavy arithmetic should run

    @property
    def the_base(self) -> np.ndarray[Any, Any]:
        """The base's elements, for methods that need a base."""
        if self.base is None:
            raise AssertionError("the plan lets no method that needs a base run without one")
        return self.base

    def deltas(self) -> list[np.ndarray[Any, Any]]:
        """Return the task vectors: source - base, for each source. Takes the place of the sources: ask once."""
        for source in self.sources:
            source -= self.the_base
        return self.sources

    def each(self, name: str) -> tuple[Any, ...]:
        """Return a parameter's value for each source."""
        return self.values[name]


class Merge(method.Method):
    """A way to combine weights: `Elementwise` or `Tensorwise`."""

    weighted: ClassVar[bool] = True  # whether a weight per model means something
    per_source: ClassVar[tuple[str, ...]] = ()  # parameters that may differ between the sources
    by_layer: ClassVar[bool] = False  # whether the formula depends on `layer`
    interpolates: ClassVar[bool] = False  # whether statistics of BatchNorm are merged like weights, or averaged
    takes_base: ClassVar[bool] = False  # whether it works on task vectors where a base is given, which it does not need

    def objections(self, weights: Sequence[float]) -> list[str]:
        """Return what speaks against so many models with these weights (all 1 where none are given)."""
        return []


class Elementwise(Merge):
    """A merge that decides each element from that element's values, and from what `measure` found.

    `merge` writes a formula down, with arrays; it is run by the engine over all elements. `measure` may look at a whole
    tensor (`scope == "tensor"`), layer or model (`"global"`) first.
    """

    @property
    def measures(self) -> Scope:
        """What `measure` has to see before the first element can be merged."""
        return "nothing"

    def measure(self, extent: Extent) -> Any:
        """Return what `merge` needs to know about all elements of an extent: hashable, such as numbers and tuples."""
        return None

    @abstractmethod
    def merge(self, site: Site, measured: Any) -> Array:
        """Return the merged elements."""

    @property
    def takes(self) -> Literal["elements", "rows", "tensors"]:
        """What is merged at once, with these settings; for rows and tensors `merge_whole` is asked, not those above.

        A row is all axes but the first, and a vector is one row.
        """
        return "elements"

    def merge_whole(self, tensor: Whole) -> np.ndarray[Any, Any]:
        """Return the merged tensor, or any number of its rows where the method takes rows."""
        raise AssertionError(f"{type(self).__name__} looks at elements alone")


class Tensorwise(Merge):
    """A merge that needs whole tensors with their shapes: it holds `copies` of them, in float32, for each source."""

    copies: ClassVar[float] = 3.0

    @abstractmethod
    def merge(self, tensor: Whole) -> np.ndarray[Any, Any]:
        """Return the merged tensor."""
