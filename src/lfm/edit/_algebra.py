"""The linear algebra of edits: rows V (n, width) for which W + R V maps keys K (width, n) as wanted."""

from __future__ import annotations

import torch


def exact_rows(keys: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Return V = (K^T C^-1 K)^+ K^T C^-1: V K = 1, and V is smallest where C is largest.

    Keys that are multiples of each other share what is wanted of them (the pseudo-inverse).
    """
    solved = torch.linalg.solve(covariance, keys)
    gram = keys.T @ solved
    rows: torch.Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ solved.T
    return rows


def regularised_rows(keys: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Return V = K^T (P + K K^T)^-1, which minimises |V K - 1|^2 + tr V P V^T."""
    rows: torch.Tensor = torch.linalg.solve(penalty + keys @ keys.T, keys).T
    return rows
