"""Linear combinations of models, whose coefficients follow from the inner products between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from lfm.errors import LfmError
from lfm.reuse.merge._contract import Extent, Site
from lfm.reuse.merge._machine.array import Array, total

Values = np.ndarray[Any, Any]
Products = tuple[tuple[float, ...], ...]


def points(site: Site) -> Sequence[Array]:
    """Return the task vectors where there is a base, the models themselves where there is none."""
    return site.sources if site.base is None else site.deltas


def placed(site: Site, point: Array) -> Array:
    """Return the weights that a point stands for: base + point where there is a base."""
    return point if site.base is None else site.moved(point)


def inner_products(extent: Extent, vectors: Callable[[Site], Sequence[Array]]) -> Products:
    """Return the inner products of all pairs of vectors, one vector for each source."""
    pairs = list(combinations_with_replacement(range(extent.sources), 2))

    def products(site: Site) -> list[tuple[Array, Array]]:
        arrays = vectors(site)
        return [(arrays[i], arrays[j]) for i, j in pairs]

    found = np.empty((extent.sources, extent.sources))
    for (i, j), value in zip(pairs, extent.total(products), strict=True):
        found[i, j] = found[j, i] = value
    return tuple(tuple(row) for row in found.tolist())


def combine(vectors: Sequence[Array], coefficients: Sequence[float] | Values) -> Array:
    """Return the sum of the vectors times their coefficients."""
    return total([vector * float(number) for vector, number in zip(vectors, coefficients, strict=True)])


def cosines(products: Values) -> Values:
    """Return the cosines of the angles between vectors; a zero vector is at right angles to all others.

    `products` are the inner products [n, n], or [n, n, rows] for vectors of many rows.
    """
    norms = np.sqrt(np.einsum("ii...->i...", products))
    lengths = norms[:, None] * norms[None]
    return np.clip(products / np.where(lengths > 0, lengths, 1.0), -1.0, 1.0)


def arc(t: float, cosine: Values, *, straight_from: float = 1.0) -> tuple[Values, Values]:
    """Return the coefficients of the two ends, for the point t of the way along the arc between them.

    Where there is no arc (the ends are parallel or opposite to within 1e-6), and where the size of the cosine is above
    `straight_from`, they are those of the straight line.
    """
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    straight = (sine < 1e-6) | (np.abs(cosine) > straight_from)
    sine = np.where(straight, 1.0, sine)
    one = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    return one, np.where(straight, t, np.sin(t * angle) / sine)


def shares(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum."""
    for problem in unshareable(weights):
        raise LfmError(problem)
    return [weight / sum(weights) for weight in weights]


def unshareable(weights: Sequence[float]) -> list[str]:
    """Return what speaks against dividing weights by their sum."""
    if abs(sum(weights)) > 1e-6 * sum(abs(weight) for weight in weights):
        return []
    return [f"weights that sum to 0 cannot be normalised, got {list(weights)}"]
