"""Losses between what a teacher and a student say: sums over classes, means over examples (or tokens)."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

Divergence = Literal["forward", "reverse", "js"]


def divergence(
    teacher: torch.Tensor,
    student: torch.Tensor,
    *,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Return T^2 times the mean divergence between rows of logits (n, classes) at temperature T.

    `forward` is KL(teacher || student), `reverse` KL(student || teacher), `js` the generalised Jensen-Shannon
    divergence beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student (Agarwal
    et al. 2024). The factor keeps the size of gradients when T changes (Hinton et al. 2015).
    """
    p, q = (logits / temperature for logits in (teacher, student))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    if kind == "forward":
        found = kl(p, q)
    elif kind == "reverse":
        found = kl(q, p)
    else:
        weights = torch.tensor([beta, 1 - beta], dtype=p.dtype, device=p.device).log()
        mixed = torch.logsumexp(torch.stack([p + weights[0], q + weights[1]]), 0)
        found = beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)
    return temperature**2 * found.mean()


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) for each row of log-probabilities (n, classes); what p rules out adds nothing."""
    ruled_out = p == -torch.inf
    return (p.exp() * (p - q).masked_fill(ruled_out, 0.0)).sum(-1)


def with_tail(log_probs: torch.Tensor, other: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both rows on the k likeliest classes of the first, with one more for all the rest (n, k + 1)."""
    top = log_probs.topk(min(k, log_probs.shape[-1]), -1).indices
    found = []
    for rows in (log_probs, other):
        kept = rows.gather(-1, top)
        rest = torch.log1p(-kept.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
        found.append(torch.cat([kept, rest], -1))
    return found[0], found[1]


def cross_entropy(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits (n, classes) with labels (n,)."""
    return functional.cross_entropy(student, labels)
