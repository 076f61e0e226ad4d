"""What was done to a model, as far as its weights tell: which matrices changed, how far, and in how many directions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lfm.checkpoint import Weights
from lfm.errors import RequestError
from lfm.models._surroundings import seeded

EXACT = 1024  # rows or columns up to which all singular values are computed
DIRECTIONS = 64  # and how many of larger matrices are looked at
MOST = 0.99  # share of the squared change that the rank is the number of directions of
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Difference:
    """How one tensor differs."""

    name: str
    shape: tuple[int, ...]
    share: float  # of its elements that differ
    relative: float  # |after - before| / |before|
    rank: int | None  # directions that hold 99 % of the change; None for no matrix, or more than are counted
    rounded: bool  # it is what rounding to half precision makes of it


@dataclass(frozen=True)
class Audit:
    """What was found: the guess in words, what it rests on, and every tensor that differs."""

    verdict: str
    why: str
    tensors: int
    differences: tuple[Difference, ...]


def audit(before: Weights, after: Weights) -> Audit:
    """Return how `after` differs from `before`, and what probably made it from that."""
    if set(before.specs) != set(after.specs):
        odd = sorted(set(before.specs) ^ set(after.specs))
        raise RequestError(f"only one of the two has {len(odd)} tensors, such as {odd[0]!r}; these are other models")
    changed = [name for name, spec in before.specs.items() if spec.shape != after.specs[name].shape]
    if changed:
        raise RequestError(f"{len(changed)} tensors differ in shape, such as {changed[0]!r}; these are other models")
    found = [d for name in before.specs if (d := _difference(name, before, after)) is not None]
    verdict, why = _guess(found, before)
    return Audit(verdict, why, len(before.specs), tuple(found))


def _difference(name: str, before: Weights, after: Weights) -> Difference | None:
    one, two = before.tensor(name), after.tensor(name)
    if one.dtype == two.dtype and torch.equal(one, two):
        return None
    spec = before.specs[name]
    if not spec.floating:
        return Difference(name, spec.shape, float((one != two).float().mean()), float("nan"), None, False)
    rounded = any(torch.equal(one.to(kind).float(), two.float()) for kind in (torch.bfloat16, torch.float16))
    change = two.float() - one.float()
    length = float(one.float().norm())
    relative = float(change.norm()) / length if length else float("inf")
    share = float((change != 0).float().mean()) if change.numel() else 0.0
    return Difference(name, spec.shape, share, relative, _rank(change), rounded)


def _rank(change: torch.Tensor) -> int | None:
    if change.ndim != 2 or not bool(change.isfinite().all()) or not change.any():
        return None
    total = float(change.double().square().sum())
    if min(change.shape) <= EXACT:
        values = torch.linalg.svdvals(change)
    else:
        with seeded(0):
            values = torch.svd_lowrank(change, q=DIRECTIONS, niter=2)[1]
    held = values.double().square().cumsum(0) >= MOST * total
    return int(held.int().argmax()) + 1 if bool(held.any()) else None


def _guess(found: Sequence[Difference], before: Weights) -> tuple[str, str]:
    """Return a verdict and what it rests on."""
    if not found:
        return "identical", "no tensor differs"
    if all(one.rounded for one in found):
        return "rounded", "every tensor that differs is the other one in half precision"
    matrices = {name for name, spec in before.specs.items() if len(spec.shape) == 2}
    moved = [one for one in found if not one.rounded]
    # Where all is kept in half precision, rounding hides the tail of a change; what is small against it counts as none.
    low = [one for one in moved if one.rank is not None and one.rank <= max(1, min(one.shape) // 8)]
    kinds = {NUMBER.sub("*", one.name) for one in moved}
    told = f"{len(moved)} of {len(before.specs)} tensors differ"
    if len(low) == len(moved):
        ranks = f"by changes of rank {min(o.rank or 0 for o in low)} to {max(o.rank or 0 for o in low)}"
        if len(kinds) == 1 and len(moved) <= max(1, len(matrices) // 4):
            return "edited", f"{told}, all of them {next(iter(kinds))!r}, {ranks}"
        return "tuned by low-rank adapters", f"{told}, {ranks}"
    if len(kinds) == 1 and len(moved) <= max(1, len(matrices) // 8):
        return "edited by gradient steps", f"{told}, all of them {next(iter(kinds))!r}, in many directions"
    return "fine-tuned or merged", f"{told}, {len(moved) - len(low)} of them in many directions"
