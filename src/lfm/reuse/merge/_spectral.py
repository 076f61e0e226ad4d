"""Task vectors of single matrices, and their singular values and vectors.

All in torch memory of its own: it is aligned, and otherwise matrix products may differ in their last bits between runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lfm.reuse.merge._contract import Whole

Values = np.ndarray[Any, Any]
NOTHING = 1e-6  # singular values are taken for 0 below this share of the largest: float32 says nothing about them


def task_vectors(tensor: Whole) -> list[torch.Tensor]:
    """Return the w_i tau_i."""
    return [
        torch.from_numpy(delta).to(tensor.device) * weight
        for delta, weight in zip(tensor.deltas(), tensor.weights, strict=True)
    ]


def added(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum, in the order of the list."""
    found = changes[0].clone()
    for change in changes[1:]:
        found += change
    return found


def moved(tensor: Whole, change: torch.Tensor, scale: float) -> Values:
    """Return base + scale * change: the base's own bits where the change is 0."""
    step = (change * scale).cpu().numpy().astype(tensor.the_base.dtype, copy=False)
    found: Values = tensor.the_base - (0.0 - step)
    return found


def svd(matrix: torch.Tensor, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U [rows, rank], S [rank], Vh [rank, columns] in float64: the `most` largest, and no more than it has rank.

    By the eigenvectors of the smaller Gram matrix. Squaring costs half of the digits, but float64 has twice those of
    the float32 that a matrix comes in: this is as exact as `torch.linalg.svd` in float32 at least.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = svd(matrix.T, most)
        return right.T, values, left.T
    wide = matrix.double()
    values, vectors = _right_vectors(wide)
    values, vectors = values[:most], vectors[:, :most]
    return _straightened(wide @ vectors / values, values), values, vectors.T


def polar(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U Vh, the nearest matrix of vectors at right angles to each other (Procrustes, whitening), and S.

    Vectors that depend on each other share what they span: they become those of least length that are the nearest.
    """
    if matrix.shape[0] < matrix.shape[1]:
        nearest, values = polar(matrix.T)
        return nearest.T, values
    wide = matrix.double()
    values, vectors = _right_vectors(wide)
    return _straightened(wide @ (vectors / values @ vectors.T), values), values


def _right_vectors(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return S and V, the largest first."""
    squares, vectors = torch.linalg.eigh(wide.T @ wide)
    values = squares.clamp(min=0).sqrt().flip(0)
    rank = int((values > NOTHING * values[:1]).sum())
    return values[:rank], vectors.flip(1)[:, :rank]


def _straightened(left: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Take a Newton step to the nearest orthogonal vectors, where small singular values have left an error behind."""
    if not len(values) or values[-1] > 1e-4 * values[0]:
        return left
    return 1.5 * left - left @ (left.T @ left) / 2


def mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean singular value; 0 of none."""
    return values.sum() / max(len(values), 1)
