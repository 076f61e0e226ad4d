"""Estimates with 95 % intervals."""

from __future__ import annotations

import math

import numpy as np

from lfm.report import Estimate

Z = 1.959963984540054  # the normal distribution's 97.5 % point


def share(hits: int, n: int) -> Estimate:
    """Return a proportion with Wilson's interval, which holds for small n and near 0 and 1."""
    p, z2 = hits / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean(values: np.ndarray) -> Estimate:
    """Return a mean with the normal interval of its standard error."""
    return ratio(values, np.ones(len(values)))


def ratio(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Return sum(sums) / sum(counts) over independent groups (windows of text), with the ratio estimator's interval."""
    n, value = len(sums), float(sums.sum() / counts.sum())
    if n < 2 or not math.isfinite(value):
        return Estimate(value, None, None, n)
    residuals = sums - value * counts
    half = Z * math.sqrt(n / (n - 1) * float((residuals**2).sum())) / float(counts.sum())
    return Estimate(value, value - half, value + half, n)


def exponential(estimate: Estimate) -> Estimate:
    """Return exp of an estimate, interval included: a perplexity from a mean NLL."""

    def exp(value: float | None) -> float | None:
        return None if value is None else math.exp(min(value, 700.0))

    return Estimate(math.exp(min(estimate.value, 700.0)), exp(estimate.low), exp(estimate.high), estimate.n)


def percent(estimate: Estimate) -> Estimate:
    """Return a share as a percentage."""

    def times_100(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return Estimate(100 * estimate.value, times_100(estimate.low), times_100(estimate.high), estimate.n)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over equal-width bins, weighted by size."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    sizes = np.bincount(places, minlength=bins)
    gaps = np.abs(np.bincount(places, correct, bins) - np.bincount(places, confidence, bins))
    return float(gaps.sum() / sizes.sum())
