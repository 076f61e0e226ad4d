"""What was measured of a model, with the uncertainty that comes from the examples it was measured on.

Everything derived from measurements is kept as *draws*: an array whose first element is the value itself and whose
others are the values on resampled examples (the bootstrap). All models of a task are resampled alike, so arithmetic on
draws gives paired intervals: those of a difference between two models are as narrow as the two are similar.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

RESAMPLES = 1000
Metric = Literal["accuracy", "perplexity"]


@dataclass(frozen=True)
class Sample:
    """Measurements on independent examples: sums over each, and the number of things summed (tokens, or one image)."""

    sums: np.ndarray  # (examples,) right answers, or nats
    counts: np.ndarray  # (examples,)


Measured = Mapping[str, Sample]  # task -> what was measured on it


@cache
def _weights(task: str, examples: int) -> np.ndarray:
    """Return how often each example is in each resample, (1 + RESAMPLES, examples): first all of them once."""
    generator = np.random.default_rng(zlib.crc32(task.encode()))
    drawn = generator.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES)
    return np.concatenate([np.ones((1, examples)), drawn])


def draws(task: str, sample: Sample, metric: Metric) -> np.ndarray:
    """Return draws of an accuracy in percent, or of a perplexity."""
    weights = _weights(task, len(sample.sums))
    mean = (weights @ sample.sums) / (weights @ sample.counts)
    if metric == "accuracy":
        return 100 * mean
    with np.errstate(over="ignore"):
        return np.exp(mean)


def mean(values: Iterable[np.ndarray], metric: Metric) -> np.ndarray:
    """Return draws of the mean over tasks; the geometric mean, for perplexities."""
    stacked = np.stack(list(values))
    return stacked.mean(0) if metric == "accuracy" else np.exp(np.log(stacked).mean(0))


def normalised(model: Measured, specialists: Measured, metric: Metric) -> np.ndarray:
    """Return draws of the score of a model relative to each task's own specialist, averaged over tasks, in percent."""
    ratios = []
    for task, specialist in specialists.items():
        ours, theirs = draws(task, model[task], metric), draws(task, specialist, metric)
        ratios.append(ours / theirs if metric == "accuracy" else theirs / ours)
    return 100 * np.mean(ratios, 0)


def half_width(values: np.ndarray) -> float:
    """Return half the width of a 95 % interval."""
    return float(1.96 * values[1:].std())
