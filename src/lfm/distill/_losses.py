"""Losses between what a teacher and a student say: sums over classes, means over examples (or tokens)."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from lfm.distill._contract import Taught, Terms

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


def jensen_shannon(
    teacher: torch.Tensor, student: torch.Tensor, *, beta: float, temperature: float = 1.0
) -> torch.Tensor:
    """Return T^2 times the generalised Jensen-Shannon divergence for any beta, 0 and 1 being its limits, the KLs."""
    kind: Divergence = "forward" if beta == 0 else "reverse" if beta == 1 else "js"
    return divergence(teacher, student, kind=kind, temperature=temperature, beta=beta)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) for each row of log-probabilities (n, classes); what p rules out adds nothing."""
    ruled_out = p == -torch.inf
    return (p.exp() * (p - q).masked_fill(ruled_out, 0.0)).sum(-1)


def with_tail(log_probs: torch.Tensor, other: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both rows on the k likeliest classes of the first, with one more for all the rest (n, k + 1)."""
    top = log_probs.topk(min(k, log_probs.shape[-1]), -1)
    return on_top(top.values, top.indices, other)


def on_top(told: torch.Tensor, ids: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (n, k) of classes `ids` and those of `other` (n, classes), each with one for the rest.

    A place that is not used has the log-probability -inf.
    """
    unused = told == -torch.inf
    rows = (told, other.gather(-1, ids).masked_fill(unused, -torch.inf))
    rests = [torch.log1p(-kept.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7)) for kept in rows]
    return torch.cat([rows[0], rests[0]], -1), torch.cat([rows[1], rests[1]], -1)


def same_classes(taught: Taught, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of both models at a temperature, on the classes that the teacher tells."""
    teacher, student = taught.teacher, (taught.student.logits / temperature).log_softmax(-1)
    if teacher.ids is not None:
        return on_top(teacher.logits, teacher.ids, student)
    return (teacher.logits / temperature).log_softmax(-1), student


def cross_entropy(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits (n, classes) with labels (n,)."""
    return functional.cross_entropy(student, labels)


def answers(taught: Taught, temperature: float, alpha: float) -> Terms:
    """Return alpha T^2 KL(teacher || student) and (1 - alpha) CE(labels, student); without labels alpha is 1."""
    weight = 1.0 if taught.labels is None else alpha
    terms = {}
    if weight > 0:
        soft = divergence(taught.teacher.logits, taught.student.logits, temperature=temperature)
        terms["answers"] = weight * soft
    if taught.labels is not None and weight < 1:
        terms["labels"] = (1 - weight) * cross_entropy(taught.student.logits, taught.labels)
    return terms
