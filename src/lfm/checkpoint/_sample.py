"""A sample of the weights that several models share: which parts of which tensors, and how their bits are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from lfm.checkpoint._header import Spec
from lfm.checkpoint._weights import RAW, Weights

Array: TypeAlias = "np.ndarray[Any, Any]"

BLOCK = 4096  # elements read in one go from a sampled tensor
CHUNK = 1 << 16  # elements at a time when all are read
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are spread evenly and never fall into step with repeating layers
SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}


@dataclass
class Unit:
    """A tensor that several models (`members`) have in one shape, and the parts of it that are read."""

    name: str
    spec: Spec
    members: list[int]
    parts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def matrix(self) -> bool:
        """Whether it has two axes or more along which something varies."""
        return self.spec.floating and sum(extent > 1 for extent in self.spec.shape) > 1

    @property
    def read(self) -> int:
        """Number of elements in the sample."""
        return sum(stop - start for start, stop in self.parts)


def sample(weights: Sequence[Weights], blocks: int | None, *, matrices_only: bool = False) -> tuple[list[Unit], float]:
    """Return what is read of the tensors that two models or more share, and which part of them that is.

    So many blocks are read, or everything for None. Depends on names and shapes alone, not on how files are laid out.
    """
    found: dict[tuple[str, tuple[int, ...], bool], Unit] = {}
    for model, specs in enumerate(each.specs for each in weights):
        for name, spec in specs.items():
            key = name, spec.shape, spec.floating
            if spec.dtype not in RAW or not spec.size:
                continue
            if key in found:
                found[key].members.append(model)
            else:
                found[key] = Unit(name, spec, [model])
    units = [found[key] for key in sorted(found) if len(found[key].members) > 1]
    units = [unit for unit in units if unit.matrix or not matrices_only]
    for index, count in _shares([unit.spec.size for unit in units], blocks):
        size = units[index].spec.size
        units[index].parts = list(_chunks(size) if count is None else _places(size, count, index))
    whole = sum(unit.spec.size * len(unit.members) for unit in units)
    read = sum(unit.read * len(unit.members) for unit in units)
    return [unit for unit in units if unit.parts], read / max(1, whole)


def _shares(sizes: Sequence[int], blocks: int | None) -> Iterable[tuple[int, int | None]]:
    """Return (tensor, its blocks): one each and the rest by size, or one each of as many as there are blocks."""
    if blocks is None:
        return ((index, None) for index in range(len(sizes)))
    if len(sizes) > blocks:
        step = len(sizes) / blocks
        return ((index, 1) for index in sorted({int((i + _fraction(i)) * step) for i in range(blocks)}))
    total, rest = sum(sizes), blocks - len(sizes)
    return ((index, 1 + rest * size // total) for index, size in enumerate(sizes))


def _chunks(size: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def _places(size: int, count: int, seed: int) -> Iterable[tuple[int, int]]:
    """Return `count` places of a tensor, one in each of as many equal stretches; all of a tensor that is no longer."""
    if size <= count * BLOCK:
        return _chunks(size)
    stretch = size / count
    starts = (int(i * stretch + _fraction(seed + i) * (stretch - BLOCK)) for i in range(count))
    return ((start, start + BLOCK) for start in starts)


def _fraction(index: int) -> float:
    return (index + 1) * GOLDEN % 1


def values(raw: Array, dtype: str) -> Array:
    """Return raw values of a floating-point tensor (see `Weights.read_raw`) as float32, or float64 if so stored."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw if dtype == "F64" else raw.astype(np.float32)


def agree(one: Array, two: Array, dtypes: tuple[str, str]) -> bool:
    """Return whether bits agree; of two floating-point types, as the coarser rounds them."""
    if dtypes[0] != dtypes[1]:
        if not set(dtypes) <= set(SIGNIFICANT_BITS):
            return False
        coarser = min(dtypes, key=SIGNIFICANT_BITS.__getitem__)
        one, two = (_rounded(raw, dtype, coarser) for raw, dtype in zip((one, two), dtypes, strict=True))
    bits = f"u{one.itemsize}"
    return np.array_equal(one.view(bits), two.view(bits))


def _rounded(raw: Array, dtype: str, coarser: str) -> Array:
    if dtype == coarser:
        return raw
    wide = values(raw, dtype)
    if coarser != "BF16":
        return wide.astype(RAW[coarser])
    bits = wide.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even
