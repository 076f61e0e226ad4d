"""What engines and the executor say to each other: outlines, plans, contexts, results.

An engine is a module `_engine.py` of a verb with the two functions of `Engine`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lfm.checkpoint import Checkpoint, OutputFolder, Spec
from lfm.data import DataSpec
from lfm.method import Access
from lfm.models.ledger import Budget
from lfm.models.ref import ModelRef

if TYPE_CHECKING:
    from lfm.data import Rows


@dataclass(frozen=True)
class Outline:
    """What a model looks like, as far as headers tell; also what a step will have made before it has."""

    ref: ModelRef
    specs: Mapping[str, Spec]
    config: Mapping[str, Any] | None = None
    vocabulary: Mapping[str, int] | None = None
    access: Access = Access.WEIGHTS  # what it offers at most

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


@dataclass(frozen=True)
class StepPlan:
    """What a step will do: what it reads and writes, what it takes, what speaks against it."""

    output: Outline
    reads: int = 0
    writes: int = 0
    memory: int = 0
    seconds: float | None = None  # about how long it will take on a machine like most; None where nobody can tell
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What a step did. `digest` is that of the weights written; `metrics` and `notes` go into lineage and report."""

    digest: str
    digests: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    change: Mapping[str, float] = field(default_factory=dict)  # by part of the model: |after - before| / |before|


@dataclass(frozen=True)
class Settings:
    """How to run, which must not change what comes out."""

    device: str = "cpu"
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    allow_pickle: bool = False
    quiet: bool = False
    save_seconds: float = 600.0
    memory: int | None = None  # bytes that a merge may hold; None for what is fastest
    max_queries: int | None = None  # requests that a step may send to endpoints, all of its runs together
    max_cost: float | None = None  # what these may cost, by the prices of the endpoints
    ledger: Path | None = None  # file of the ledger; None for the one in lfm's cache folder

    def budget(self, run: str) -> Budget:
        """Return what the run of that name may ask of endpoints."""
        return Budget(run, self.max_queries, self.max_cost, self.ledger)


class Around(Protocol):
    """What opening a model depends on besides the model."""

    @property
    def seed(self) -> int: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def run(self) -> str:
        """What requests to endpoints are counted under: the step's key, the same when it is run again."""


class Context(Around, Protocol):
    """What an engine may ask of the recipe around it. All models and all data come through here."""

    def outlines(self, refs: Sequence[ModelRef]) -> list[Outline]:
        """Return what these models look like, also those that are not made yet. Raises all problems at once."""

    def open(self, ref: ModelRef) -> Checkpoint:
        """Open a model's weights."""

    def resolve(self, ref: ModelRef) -> ModelRef:
        """Return where a model really is: a name of the recipe becomes the folder or config behind it."""

    def rows(self, spec: DataSpec) -> Rows:
        """Read data."""


class Engine(Protocol):
    """The functions of a verb's `_engine.py`.

    An engine that says `STREAMS = True` hashes its models while it reads them, and keeps nothing to resume from; the
    others have their models hashed before they run.
    """

    def plan(self, method: Any, inputs: Any, context: Context) -> StepPlan:
        """Return what the step will do, from headers alone."""

    def run(self, method: Any, inputs: Any, context: Context, folder: OutputFolder) -> StepResult:
        """Do it, into `folder`."""
