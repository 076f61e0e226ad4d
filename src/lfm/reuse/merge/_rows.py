"""Tensors taken line by line: each of its rows, or columns, is a vector with a direction of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
Coefficients = Callable[[Values], Sequence[Values]]  # takes inner products [n, n, lines], gives n times [lines]
BLOCK = 1 << 15  # elements of each tensor that are looked at together: they stay in a core's share of the caches


def combine_rows(tensors: Sequence[Values], coefficients: Coefficients) -> None:
    """Put into the first of the tensors, row by row, the sum of all times their coefficients.

    All axes but the first make a row, and a vector is one row.
    """
    for rows in _blocks(tensors):
        numbers = coefficients(_products(rows, "rc,rc->r"))
        _combine(rows, [number[:, None] for number in numbers])


def combine_columns(tensors: Sequence[Values], coefficients: Coefficients) -> None:
    """Put into the first of the tensors, column by column, the sum of all times their coefficients.

    Columns run along the first axis.
    """
    numbers = coefficients(np.sum([_products(rows, "rc,rc->c") for rows in _blocks(tensors)], axis=0))
    for rows in _blocks(tensors):
        _combine(rows, numbers)


def move(base: Values, change: Values) -> Values:
    """Return base + change, in place of the change: the base's own bits where the change is 0."""
    np.subtract(0.0, change, out=change)  # -0.0 + 0.0 is 0.0, but -0.0 - 0.0 is -0.0
    return np.subtract(base, change, out=change)


def _blocks(tensors: Sequence[Values]) -> Iterator[list[Values]]:
    """Yield the same few rows of each tensor."""
    matrices = [one.reshape(len(one), -1) if one.ndim > 1 else one.reshape(1, -1) for one in tensors]
    step = max(BLOCK // matrices[0].shape[1], 1)
    for start in range(0, len(matrices[0]), step):
        yield [rows[start : start + step] for rows in matrices]


def _products(rows: Sequence[Values], sums: str) -> Values:
    """Return the inner products of all pairs [n, n, lines], in float64."""
    wide = [row.astype(np.float64) for row in rows]  # by einsum itself, sums would depend on where its buffers end
    pairs = combinations_with_replacement(range(len(rows)), 2)
    found = {(i, j): np.einsum(sums, wide[i], wide[j]) for i, j in pairs}
    return np.array([[found[min(i, j), max(i, j)] for j in range(len(rows))] for i in range(len(rows))])


def _combine(rows: Sequence[Values], numbers: Sequence[Values]) -> None:
    for row, number in zip(rows, numbers, strict=True):
        row *= number.astype(row.dtype)
    for other in rows[1:]:
        np.add(rows[0], other, out=rows[0])
