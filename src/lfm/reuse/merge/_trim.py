"""Making task vectors sparse: by the size of their changes, or at random; and giving them back their length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lfm.reuse.merge._contract import Extent, Site
from lfm.reuse.merge._machine.array import Array, array, once, where

Band = tuple[float, float, float]  # the smallest and the largest size that is kept, and a factor on what is kept

# --- by size


def number_kept(density: float, size: int) -> int:
    """Return how many of `size` elements are kept: rounded down, one at least if any."""
    return max(int(density * size), 1) if density > 0 else 0


def bands(extent: Extent, above: Sequence[int], kept: Sequence[int], *, rescale: bool) -> tuple[Band, ...]:
    """Return, for each source, the sizes of the changes that are left when the `above` largest are dropped and of the
    rest the `kept` largest kept; changes as large as the smallest or the largest kept are kept too.

    With `rescale`, what is kept is multiplied to have the L1 norm that all had.
    """
    last = [skipped + count if count else 0 for skipped, count in zip(above, kept, strict=True)]
    first = [skipped + 1 if skipped else 0 for skipped in above]
    found = extent.kth_largest(lambda site: [*site.deltas, *site.deltas], [*last, *first])
    sizes = list(zip(found[: len(last)], found[len(last) :], strict=True))
    edges = [(from_size(least), to_size(most), 1.0) for least, most in sizes]
    if not rescale:
        return tuple(edges)
    factors = restoring_factors(extent, lambda site: within(site, edges))
    return tuple((least, most, factor) for (least, most, _), factor in zip(edges, factors, strict=True))


def middle_bands(extent: Extent, *, rescale: bool) -> tuple[Band, ...]:
    """Return, for each source, the sizes of what is left of it without its `outliers` and with `density` of the rest.

    The density is what counts: fewer outliers are dropped where that leaves too little.
    """
    size = extent.size
    kept = [int(density * size) for density in extent.each("density")]
    above = [min(int(share * size), size - count) for share, count in zip(extent.each("outliers"), kept, strict=True)]
    return bands(extent, above, kept, rescale=rescale)


def within(site: Site, limits: Sequence[Band]) -> list[Array]:
    """Return each task vector with the changes that lie in its band, times their factor; the rest is 0."""
    return [_within(delta, *band) for delta, band in zip(site.deltas, limits, strict=True)]


def _within(delta: Array, least: float, most: float, factor: float) -> Array:
    if least == math.inf:
        return array(0.0)
    kept = where(abs(delta) >= least, delta, 0.0) if least > 0 else delta
    kept = where(abs(delta) <= most, kept, 0.0) if most < math.inf else kept
    return kept if factor == 1 else kept * factor


def from_size(size: float) -> float:
    """Return the smallest number that float32 rounds to `size`: sizes are found in float32, and compared in float64
    where tensors are stored so.
    """
    if size in (0.0, math.inf):
        return size
    middle = (float(np.nextafter(np.float32(size), np.float32(0))) + size) / 2
    return middle if np.float32(middle) == size else math.nextafter(middle, math.inf)


def to_size(size: float) -> float:
    """Return the largest number that float32 rounds to `size`."""
    if size == math.inf:
        return size
    middle = (float(np.nextafter(np.float32(size), np.float32(np.inf))) + size) / 2
    return middle if np.float32(middle) == size else math.nextafter(middle, 0.0)


# --- at random


def thinned(site: Site, shares: Sequence[Array | float], *, divide: bool) -> list[Array]:
    """Return each task vector with its elements kept with a probability of `shares`, and divided by it if asked; the
    rest is 0.
    """
    return [
        _thinned(delta, share, index, site.random(index), divide)
        for index, (delta, share) in enumerate(zip(site.deltas, shares, strict=True))
    ]


def _thinned(delta: Array, share: Array | float, index: int, random: Array, divide: bool) -> Array:
    if not isinstance(share, Array) and not 0 < share < 1:
        return delta if share else array(0.0)
    return where(once(random < share, index), delta / share if divide else delta, 0.0)


def shares_by_rank(site: Site) -> list[Array | float]:
    """Return the probability to keep each element: its source's `density` in the mean, and rising with the rank of its
    size in its row from `epsilon` below to `epsilon` above that, or as far as probabilities go.
    """
    shares: list[Array | float] = []
    for index, (density, epsilon) in enumerate(zip(site.each("density"), site.each("epsilon"), strict=True)):
        room = min(epsilon, density, 1 - density)
        shares.append(density - room + 2 * room * site.rank(index) if room > 0 else density)
    return shares


# --- the length


def restoring_factors(extent: Extent, kept: Callable[[Site], Sequence[Array]]) -> tuple[float, ...]:
    """Return what each task vector's kept changes are to be multiplied by to have the L1 norm that all had."""
    one = array(1.0)
    sums = extent.total(lambda site: [(abs(delta), one) for delta in (*site.deltas, *kept(site))])
    before, after = np.split(sums, 2)
    return tuple(float(b / a) if a > 0 else 1.0 for b, a in zip(before, after, strict=True))


def rescaled(deltas: Sequence[Array], factors: Sequence[float] | None) -> list[Array]:
    """Return the task vectors times their factors."""
    return list(deltas) if factors is None else [delta * by for delta, by in zip(deltas, factors, strict=True)]
