"""A family of fine-tunes of one base, each made for one task, and how to measure what becomes of them."""

import hashlib
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
    def measure(self, weights: Path, part: Part, variant: str) -> Measured:
        """Measure weights on every task."""

    @abstractmethod
    def note(self, variant: str) -> str:
        """Return what a reader of the table has to know."""

    @abstractmethod
    def ensemble(self, part: Part) -> Measured:
        """Measure the mean of the sources' probabilities."""

    @abstractmethod
    def guesses(self) -> dict[str, Measured]:
        """Return what takes no model, on the test examples."""

    def path(self, name: str) -> str:
        """Return the place of a data file."""
        return str(self.assets / "data" / name)

    @property
    def sources(self) -> list[Path]:
        """The checkpoints to merge."""
        return [self.source(task) for task in self.tasks]

    def known(self, weights: Path, part: Part, variant: str) -> Measured:
        """Measure weights, or recall what was measured of equal weights before."""
        settings = repr({name: value for name, value in vars(self).items() if name not in ("assets", "work")})
        key = hashlib.sha256(f"{lfm.open_checkpoint(weights).digest} {part} {variant} {settings}".encode())
        file = self.work / "scores" / f"{key.hexdigest()[:24]}.npz"
        if file.exists():
            with np.load(file) as arrays:
                names = dict.fromkeys(name.partition(".")[0] for name in arrays.files)
                return {name: Sample(arrays[f"{name}.sums"], arrays[f"{name}.counts"]) for name in names}
        found = self.measure(weights, part, variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{task}.{kind}": getattr(found[task], kind) for task in found for kind in ("sums", "counts")}
        np.savez(file.with_suffix(".partial.npz"), **arrays)
        file.with_suffix(".partial.npz").replace(file)
        return found
