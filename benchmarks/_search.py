"""Merging with a method's defaults, and with the settings that are best on validation data."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _family import QUIET, Family, Part
from _scores import Measured, normalised

import lfm

Settings = dict[str, Any]

# What is tried, one parameter after the other, each with the best of those before it. A method has those of its own.
GRID: dict[str, tuple[Any, ...]] = {
    "scale": (1 / 3, 0.5, 0.7, 1.0, 1.5, 2.25),
    "density": (0.1, 0.3, 0.6),
}
OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "consensus": {"min_tasks": (1,), "sparsity": (0.2, 0.6)},
    "iso_cts": {"common": (0.6,)},
    "lines": {"alpha": (0.2, 0.5), "beta": (0.0, 0.3, 0.8)},
    "model_stock": {"filter_wise": (True,)},
    "pcb": {"ratio": (0.05, 0.3, 0.6)},
    "ramplus": {"alpha": (0.0, 1.0)},
    "sce": {"select_topk": (0.1, 0.3, 0.6)},
    "wudi": {"others": ("average",), "learning_rate": (1e-4,)},
}


@dataclass
class Tried:
    """A method in one variant: what its defaults give on test data, what was chosen, and what that gives."""

    default: Measured
    settings: Settings
    chosen: Measured
    masked: Measured | None = None  # each task measured with a model of its own, for methods that keep masks


@dataclass
class Examined:
    """What came of a method: by variant, or why nothing did."""

    method: str
    tried: dict[str, Tried] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


def left_out(names: list[str] | None, sources: int) -> dict[str, list[str]]:
    """Return, for each merge, why it does not fit fine-tunes of a base without data; nothing where it does."""
    have = lfm.Have(sources=sources)
    cards = {name: card for (verb, name), card in lfm.cards().items() if verb == "merge" and name in (names or [name])}
    return {name: card.needs.missing(have) for name, card in cards.items()}


def examine(family: Family, method: str) -> Examined:
    """Merge all sources of a family, measure with defaults, search, and measure what was found."""
    logging.getLogger("lfm").setLevel(logging.ERROR)
    started = time.monotonic()
    found = Examined(method)
    with Merges.temporary(family, method) as merges:
        try:
            for variant in family.variants:
                default = merges.measure({}, "test", variant)
                settings = search(lambda settings, variant=variant: merges.score(settings, variant), method)
                masked = merges.measure_masked(settings, variant) if "task" in merges.fields else None
                found.tried[variant] = Tried(default, settings, merges.measure(settings, "test", variant), masked)
        except Exception as error:  # one method that fails, in whatever way, takes nothing from the others
            found.error = f"{type(error).__name__}: {error}".splitlines()[0]
    found.seconds = time.monotonic() - started
    return found


class Merges:
    """Merges of a family by one method, each made once."""

    def __init__(self, family: Family, method: str, folder: Path) -> None:
        self.family, self.method, self.folder = family, method, folder
        self.made: dict[str, Path] = {}
        self.fields = lfm.cards()["merge", method].parameters.model_fields

    @classmethod
    @contextmanager
    def temporary(cls, family: Family, method: str) -> Iterator["Merges"]:
        """Give a folder that is removed afterwards."""
        family.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=family.work) as folder:
            yield cls(family, method, Path(folder))

    def make(self, settings: Settings) -> Path:
        """Return the checkpoint of a merge."""
        key = repr(sorted(settings.items()))
        if key not in self.made:
            out = self.folder / str(len(self.made))
            method = lfm.cards()["merge", self.method].load()(**settings)
            lfm.merge(method, self.family.sources, base=self.family.base, out=out, settings=QUIET)
            self.made[key] = out
        return self.made[key]

    def measure(self, settings: Settings, part: Part, variant: str) -> Measured:
        return self.family.known(self.make(settings), part, variant)

    def measure_masked(self, settings: Settings, variant: str) -> Measured:
        """Measure every task with the model that is kept for it; tasks without a source have none."""
        of_task = {task: self.make(settings | {"task": number}) for number, task in enumerate(self.family.tasks)}
        return {task: self.family.recall(path, task, "test", variant) for task, path in of_task.items()}

    def score(self, settings: Settings, variant: str) -> float:
        """Return the normalised score on validation data; that of nothing where the merge cannot be made."""
        try:
            measured = self.measure(settings, "validation", variant)
        except lfm.LfmError:  # numbers that are too large, say: a setting not to be chosen
            return 0.0
        specialists = specialists_of(self.family, "validation")
        return float(normalised(measured, specialists, self.family.metric)[0])


def specialists_of(family: Family, part: Part) -> Measured:
    """Return what each source gives on its own task."""
    first = family.variants[0]
    return {task: family.recall(family.source(task), task, part, first) for task in family.tasks}


def search(score: Callable[[Settings], float], method: str) -> Settings:
    """Return the best settings found; the defaults where nothing is better."""
    best: Settings = {}
    reached = score(best)
    for name, values in grid(method):
        start = best
        for value in values:
            new = score(start | {name: value})
            if new > reached:
                best, reached = start | {name: value}, new
    return best


def grid(method: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield what to try of the parameters that a method has."""
    fields = lfm.cards()["merge", method].parameters.model_fields
    for name, values in (GRID | OWN.get(method, {})).items():
        if name in fields:
            yield name, values
