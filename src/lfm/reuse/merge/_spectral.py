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


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U [rows, rank], S [rank], Vh [rank, columns] in float64: as many of them as the matrix has rank.

    By the eigenvectors of the smaller Gram matrix. Squaring costs half of the digits, but float64 has twice those of
    the float32 that a matrix comes in: this is as exact as `torch.linalg.svd` in float32 at least, and faster.
    """
    rows, columns = matrix.shape
    if rows < columns:
        left, values, right = svd(matrix.T)
        return right.T, values, left.T
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide.T @ wide)  # the smallest first
    values = squares.clamp(min=0).sqrt().flip(0)
    rank = int((values > NOTHING * values[0]).sum())
    values, vectors = values[:rank], vectors.flip(1)[:, :rank]
    left = wide @ vectors / values
    left = 1.5 * left - left @ (left.T @ left) / 2  # a Newton step: as orthogonal as U can be, for small values too
    return left, values, vectors.T


def orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """Return the nearest vectors at right angles to each other (Procrustes; also called whitening).

    Vectors that depend on each other share what they span: they become those of least length that are the nearest.
    """
    left, _, right = svd(vectors)
    return left @ right
