"""Electing a sign for every weight and averaging the changes that agree with it (steps 2 and 3 of TIES)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def elect_and_average(deltas: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return, for each element, the mean of the w_i tau_i whose sign is that of their sum, by |w_i|; 0 for a sum of 0.

    Takes the place of `deltas`.
    """
    for delta, weight in zip(deltas, weights, strict=True):
        delta *= weight
    elected = _sum(deltas).sign_()
    merged, total = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(elected).clamp_(min=0)  # |w_i tau_i| where its sign is the elected one, 0 elsewhere
        merged += agreeing
        total += agreeing.sign_().mul_(abs(weight))
    merged /= total.clamp_(min=1e-38)  # 0 / 0 is 0: nothing was elected
    return merged.mul_(elected)


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
