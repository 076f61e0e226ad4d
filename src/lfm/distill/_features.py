"""Hidden states of different shapes made comparable: vectors, places of an image, tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from lfm.distill._contract import Taught
from lfm.errors import RequestError


def pooled(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return one vector (batch, width) for each example: of places and tokens the mean, padding left out."""
    if state.ndim == 4:
        return state.mean((2, 3))
    if state.ndim == 2:
        return state
    weights = kept(state, mask)[..., None]
    return (state * weights).sum(1) / weights.sum(1).clamp_min(1)


def kept(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return 1 for tokens and 0 for padding (batch, length); all 1 where that is not known of these states."""
    if mask is None or mask.shape != state.shape[:2]:
        return torch.ones(state.shape[:2], device=state.device)
    return mask.to(state)


def same_places(teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both with the same number of places: larger images are averaged down. Raises RequestError for others."""
    if teacher.ndim != student.ndim:
        raise RequestError(
            f"hidden states of shape {list(teacher.shape[1:])} and {list(student.shape[1:])} cannot be matched; "
            "choose other layers, or match what output layers read (rkd, crd)"
        )
    if teacher.ndim == 4:
        size = min(teacher.shape[2], student.shape[2]), min(teacher.shape[3], student.shape[3])
        teacher, student = (
            state if tuple(state.shape[2:]) == size else functional.adaptive_avg_pool2d(state, size)
            for state in (teacher, student)
        )
    elif teacher.shape[1:-1] != student.shape[1:-1]:
        raise RequestError(f"the teacher gives {teacher.shape[1]} places or tokens, the student {student.shape[1]}")
    return teacher, student


def only_places(state: torch.Tensor) -> torch.Tensor:
    """Return it. Raises RequestError for a vector, which has no places."""
    if state.ndim == 2:
        raise RequestError("layers: a layer that gives one vector has no places to compare; choose other layers")
    return state


def by_places(state: torch.Tensor) -> torch.Tensor:
    """Return (batch, places, width) of an image or a text; of vectors (1, batch, width), the examples as places."""
    if state.ndim == 4:
        return state.flatten(2).transpose(1, 2)
    return state if state.ndim == 3 else state[None]


def width(shape: Sequence[int]) -> int:
    """Return the width of a hidden state of that shape (without the batch)."""
    return shape[0] if len(shape) == 3 else shape[-1]


def projections(teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module:
    """Return a linear map for each pair from the student's width to the teacher's, at first nothing but a copy."""
    maps = [nn.Linear(width(ours), width(theirs)) for theirs, ours in zip(teacher, student, strict=True)]
    for one in maps:
        if one.in_features == one.out_features:
            nn.init.eye_(one.weight)
            nn.init.zeros_(one.bias)
    return nn.ModuleList(maps)


def regression(taught: Taught) -> torch.Tensor:
    """Return the mean squared difference of the teacher's hidden states and the student's, projected."""
    assert isinstance(taught.extras, nn.ModuleList)
    losses = []
    pairs = zip(taught.teacher.hidden, taught.student.hidden, taught.extras, strict=True)
    for teacher, student, projection in pairs:
        theirs, ours = (by_places(state) for state in same_places(teacher, student))
        squares = (projection(ours) - theirs).square().mean(-1)
        weights = kept(student, taught.student.mask) if student.ndim == 3 else torch.ones_like(squares)
        losses.append((squares * weights).sum() / weights.sum().clamp_min(1))
    return torch.stack(losses).mean()
