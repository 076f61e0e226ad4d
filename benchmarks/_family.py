"""A family of fine-tunes of one base, each made for one task, and how to measure what becomes of them."""

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from _scores import Measured, Metric, Sample

import lfm

Part = Literal["validation", "test"]
QUIET = lfm.Settings(threads=1, quiet=True)  # the benchmark runs several processes beside each other


@dataclass(frozen=True)
class Family(ABC):
    """Where its files are. Making a fine-tune twice costs nothing: `lfm.tune` knows what is done."""

    assets: Path
    work: Path

    name: ClassVar[str]
    metric: ClassVar[Metric]
    tasks: ClassVar[tuple[str, ...]]  # one fine-tune for each
    others: ClassVar[tuple[str, ...]] = ()  # measured as well, without a fine-tune and outside the mean
    title: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]  # ways to use merged weights; the first takes them as they are

    @property
    @abstractmethod
    def base(self) -> Path:
        """The checkpoint that all sources were tuned from."""

    @abstractmethod
    def source(self, task: str) -> Path:
        """Return the checkpoint of a task's fine-tune, as far as it is to be merged."""

    @abstractmethod
    def make(self, task: str) -> None:
        """Make the fine-tune of a task if it is not there."""

    @abstractmethod
    def note(self, variant: str) -> str:
        """Return what a reader of the table has to know."""

    @abstractmethod
    def measure(self, weights: Path, task: str, part: Part, variant: str) -> Sample:
        """Measure weights on a task."""

    @abstractmethod
    def ensemble(self, task: str, part: Part) -> Sample:
        """Measure the mean of the sources' probabilities on a task."""

    @abstractmethod
    def guesses(self, task: str) -> dict[str, Sample]:
        """Return what takes no model, on the test examples of a task."""

    def path(self, name: str) -> str:
        """Return the place of a data file."""
        return str(self.assets / "data" / name)

    @property
    def sources(self) -> list[Path]:
        """The checkpoints to merge."""
        return [self.source(task) for task in self.tasks]

    def measured_on(self, part: Part) -> tuple[str, ...]:
        """Return all tasks that there are examples of."""
        return (*self.tasks, *(self.others if part == "test" else ()))

    def known(self, weights: Path, part: Part, variant: str) -> Measured:
        """Measure weights on every task, or recall it."""
        return {task: self.recall(weights, task, part, variant) for task in self.measured_on(part)}

    def recall(self, weights: Path, task: str, part: Part, variant: str) -> Sample:
        """Measure weights on a task, or recall what was measured of equal weights before."""
        settings = repr({name: value for name, value in vars(self).items() if name not in ("assets", "work")})
        key = f"{lfm.open_checkpoint(weights).digest} {task} {part} {variant} {settings}"
        file = self.work / "scores" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
        if file.exists():
            return Sample(*np.load(file))
        found = self.measure(weights, task, part, variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.npy")
        np.save(draft, np.stack([found.sums, found.counts]))
        draft.replace(file)
        return found
