"""How far weights have moved from a base, by block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lfm.checkpoint import Weights

CHUNK = 1 << 18


def group_of(name: str) -> str:
    """Return the part of the model that a tensor lies in: up to its first number, or its outer two modules."""
    match = re.match(r".*?(?:^|\.)[A-Za-z_]*\d+(?=\.)(?:\.\d+(?=\.))?", name)
    return match.group() if match else ".".join(name.split(".")[:-1][:2]) or name


def relative_change(base: Weights, other: Weights) -> dict[str, float]:
    """Return |other - base| / |base| (Frobenius) for each part of the model, and for `all`; equal shapes only."""
    sums: dict[str, list[float]] = {}
    for name, spec in base.specs.items():
        if not spec.floating or name not in other.specs or other.specs[name].shape != spec.shape:
            continue
        moved = size = 0.0
        for start, part in base.chunks(name, CHUNK):
            before = part.float()
            difference = other.read(name, start, start + len(part)).float().sub_(before)
            moved += float(difference.dot(difference))
            size += float(before.dot(before))
        for group in (group_of(name), "all"):
            total = sums.setdefault(group, [0.0, 0.0])
            total[0] += moved
            total[1] += size
    return {group: math.sqrt(moved / size) if size else 0.0 for group, (moved, size) in sums.items()}


def moved_tensors(base: Weights, other: Weights) -> Mapping[str, str]:
    """Return what differs, tensor by tensor: `changed`, `missing`, `added`, or another dtype or shape."""
    before, after = base.tensor_digests(), other.tensor_digests()
    found = {}
    for name in dict.fromkeys((*base.specs, *other.specs)):
        if name not in other.specs:
            found[name] = "missing"
        elif name not in base.specs:
            found[name] = "added"
        elif str(base.specs[name]) != str(other.specs[name]):
            found[name] = f"{base.specs[name]} -> {other.specs[name]}"
        elif before[name] != after[name]:
            found[name] = "changed"
    return found
