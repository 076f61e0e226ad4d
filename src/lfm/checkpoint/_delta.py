"""Deltas: changes to weights, as things of their own. Applied, reverted, composed, verified, saved.

A patched set of weights is *defined* as its base and the set of deltas on it; its tensors are computed from these when
they are read, in one fixed order of operations. So reverting a delta, in whatever order, is exact to the last bit.

Saved form, `delta.safetensors` + `delta.json` (see docs/delta.md): for the tensor t, `t:values` (dense), `t:u`, `t:v`
(low rank), `t:indices`, `t:values` (sparse), `t:factor`, `t:width` (scale), `t:tensor` (replace).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lfm.checkpoint._header import Spec, read_header
from lfm.checkpoint._open import FileWeights, read_json, refuse_partial
from lfm.checkpoint._weights import MemoryWeights, Weights, as_bytes, dtype_name
from lfm.checkpoint._write import OutputFolder
from lfm.errors import RequestError, plural

if TYPE_CHECKING:
    import numpy as np
    import torch

FORMAT = 1


class Change(ABC):
    """A change to one tensor. Acts on any part [start, stop) of the flat tensor, the same way however it is cut."""

    kind: ClassVar[str]
    stage: ClassVar[int]  # replacements come first, then scalings, then everything that is added

    @abstractmethod
    def act(self, part: torch.Tensor, start: int) -> None:
        """Change `part`, elements of the flat tensor from `start` on, in place; float32, or float64 if so stored."""

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether this changes tensors of that shape."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is saved, by role."""

    @abstractmethod
    def join(self, other: Any) -> Change:
        """Return the change that does this and then `other`, one of the same kind."""


@dataclass(frozen=True, eq=False)
class Dense(Change):
    """W + values."""

    values: torch.Tensor
    kind = "dense"
    stage = 2

    def act(self, part: torch.Tensor, start: int) -> None:
        part += self.values.reshape(-1)[start : start + len(part)].to(part)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.values.shape) == shape

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self.values}

    def join(self, other: Dense) -> Dense:
        return Dense(_wide(self.values) + _wide(other.values))


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """W + u v, with u (rows, rank) and v (rank, columns)."""

    u: torch.Tensor
    v: torch.Tensor
    kind = "low_rank"
    stage = 2

    def act(self, part: torch.Tensor, start: int) -> None:
        import torch

        width = max(self.v.shape[1], 1)
        first, last = start // width, -(-(start + len(part)) // width)
        block = torch.zeros(last - first, self.v.shape[1], dtype=part.dtype)
        u, v = self.u[first:last].to(part), self.v.to(part)
        # One rank at a time: element-wise products give the same bits however rows are cut; matrix products need not.
        for rank in range(len(v)):
            block += u[:, rank, None] * v[rank]
        offset = start - first * width
        part += block.reshape(-1)[offset : offset + len(part)]

    def fits(self, shape: tuple[int, ...]) -> bool:
        if not self.u.ndim == self.v.ndim == 2 or self.u.shape[1] != self.v.shape[0]:
            return False
        return (self.u.shape[0], self.v.shape[1]) == shape

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"u": self.u, "v": self.v}

    def join(self, other: LowRank) -> LowRank:
        import torch

        u = torch.cat([_wide(self.u), _wide(other.u)], 1)
        return LowRank(u, torch.cat([_wide(self.v), _wide(other.v)], 0))


@dataclass(frozen=True, eq=False)
class Sparse(Change):
    """W + values at the given positions (int64, ascending) of the flat tensor."""

    indices: torch.Tensor
    values: torch.Tensor
    kind = "sparse"
    stage = 2

    def act(self, part: torch.Tensor, start: int) -> None:
        import torch

        bounds = torch.tensor([start, start + len(part)])
        first, last = torch.searchsorted(self.indices, bounds).tolist()
        part[self.indices[first:last] - start] += self.values[first:last].to(part)

    def fits(self, shape: tuple[int, ...]) -> bool:
        import torch

        if self.indices.dtype != torch.int64 or self.indices.ndim != 1 or self.indices.shape != self.values.shape:
            return False
        size = Spec("F32", shape).size
        ascending = bool((self.indices[1:] > self.indices[:-1]).all())
        inside = len(self.indices) == 0 or (int(self.indices[0]) >= 0 and int(self.indices[-1]) < size)
        return ascending and inside

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"indices": self.indices, "values": self.values}

    def join(self, other: Sparse) -> Sparse:
        import torch

        indices, place = torch.unique(torch.cat([self.indices, other.indices]), return_inverse=True)
        added = torch.cat([_wide(self.values), _wide(other.values)])
        return Sparse(indices, torch.zeros(len(indices), dtype=added.dtype).index_add_(0, place, added))


@dataclass(frozen=True, eq=False)
class Scale(Change):
    """W * factor, one factor for the whole tensor (shape ()) or one for each row (shape (rows,))."""

    factor: torch.Tensor
    kind = "scale"
    stage = 1
    width: int = 1

    def act(self, part: torch.Tensor, start: int) -> None:
        import torch

        if self.factor.ndim == 0:
            part *= self.factor.to(part)
        else:
            rows = torch.arange(start, start + len(part)) // self.width
            part *= self.factor.to(part)[rows]

    def fits(self, shape: tuple[int, ...]) -> bool:
        if self.factor.ndim == 0:
            return True
        if self.factor.ndim > 1 or not shape or self.width < 1:
            return False
        return len(self.factor) == shape[0] and self.width * shape[0] == Spec("F32", shape).size

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        return {"factor": self.factor, "width": torch.tensor(self.width)}

    def join(self, other: Scale) -> Scale:
        factor = _wide(self.factor) * _wide(other.factor)
        return Scale(factor, self.width if self.factor.ndim else other.width)


@dataclass(frozen=True, eq=False)
class Replace(Change):
    """The tensor itself, in place of W."""

    values: torch.Tensor
    kind = "replace"
    stage = 0

    def act(self, part: torch.Tensor, start: int) -> None:
        part.copy_(self.values.reshape(-1)[start : start + len(part)])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(self.values.shape) == shape

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"tensor": self.values}

    def join(self, other: Replace) -> Replace:
        import torch

        if not torch.equal(self.values, other.values):
            raise RequestError("two different replacements of one tensor contradict each other")
        return self


_KINDS: dict[str, Callable[[Mapping[str, torch.Tensor]], Change]] = {
    "dense": lambda saved: Dense(saved["values"]),
    "low_rank": lambda saved: LowRank(saved["u"], saved["v"]),
    "sparse": lambda saved: Sparse(saved["indices"], saved["values"]),
    "scale": lambda saved: Scale(saved["factor"], int(saved["width"])),
    "replace": lambda saved: Replace(saved["tensor"]),
}


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return it in float32, or as it is in float64: sums of deltas are not rounded to half precision."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Delta:
    """Changes to some tensors of one base. `base` is the digest of the weights it was made for, if that is known."""

    changes: Mapping[str, Change]
    base: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Digest of the content: equal for equal changes."""
        flat = MemoryWeights(self._flat())
        kinds = sorted((name, change.kind) for name, change in self.changes.items())
        return hashlib.sha256(json.dumps([kinds, flat.digest]).encode()).hexdigest()

    @classmethod
    def between(cls, base: Weights, tuned: Weights) -> Delta:
        """Return tuned - base as dense changes of the tensors that differ; what does not subtract is replaced."""
        problems = [
            f"tensor {name!r}: {base.specs.get(name, 'absent')} in the base, "
            f"{tuned.specs.get(name, 'absent')} in the tuned one"
            for name in sorted({*base.specs, *tuned.specs})
            if not _comparable(base.specs.get(name), tuned.specs.get(name))
        ]
        if problems:
            raise RequestError(*problems)
        changes: dict[str, Change] = {}
        for name, spec in base.specs.items():
            before, after = base.tensor(name), tuned.tensor(name)
            if not spec.floating:
                if as_bytes(before.reshape(-1)) != as_bytes(after.reshape(-1)):
                    changes[name] = Replace(after)
                continue
            values = (_wide(after) - _wide(before)).masked_fill_(before == after, 0)  # inf - inf is nothing, too
            if values.any():
                changes[name] = Dense(values) if bool(values.isfinite().all()) else Replace(after)
        return cls(changes, base.digest)

    def problems(self, weights: Weights) -> list[str]:
        """Return what speaks against applying this to `weights`: another base, missing tensors, other shapes."""
        found = []
        if self.base is not None and self.base != (digest := weights.digest):
            found.append(
                f"delta {self.id[:12]} was made for the base {self.base[:12]}, these weights are {digest[:12]}"
            )
        for name, change in self.changes.items():
            spec = weights.specs.get(name)
            if spec is None:
                found.append(f"delta {self.id[:12]} changes {name!r}, which these weights do not have")
            elif not change.fits(spec.shape) or not _computes(change, spec):
                found.append(f"delta {self.id[:12]}: its {change.kind} change of {name!r} does not fit {spec}")
        return found

    def compose(self, other: Delta) -> Delta:
        """Return one delta that does what both do. Raises RequestError where bases differ or kinds do not join."""
        if self.base != other.base:
            raise RequestError(f"deltas of different bases do not compose: {self.base} and {other.base}")
        common = [name for name in other.changes if name in self.changes]
        problems = [
            f"{name!r}: a {self.changes[name].kind} and a {other.changes[name].kind} change do not compose into one"
            for name in common
            if self.changes[name].kind != other.changes[name].kind
        ]
        problems += _contradictions(self, other)
        if problems:
            raise RequestError(*problems)
        joined = {name: self.changes[name].join(other.changes[name]) for name in common}
        merged = {**self.changes, **other.changes, **joined}
        return Delta(merged, self.base, {"composed_of": [self.id, other.id]})

    def save(self, out: Path) -> None:
        """Write `delta.safetensors` and `delta.json` into a new folder."""
        flat = MemoryWeights(self._flat())
        with OutputFolder(out, key=self.id) as folder:
            writer = folder.tensors(flat.specs)
            for name in flat.specs:
                writer.write(name, flat.read(name))
            writer.finish("delta.safetensors")
            kinds = {name: change.kind for name, change in self.changes.items()}
            head = {"lfm_delta": FORMAT, "id": self.id, "base": self.base, "changes": kinds}
            folder.write_json("delta.json", head | {"provenance": dict(self.provenance)})
            folder.commit()

    @classmethod
    def load(cls, folder: Path) -> Delta:
        """Read a folder that `save` wrote. Raises RequestError for one that is not as it was written."""
        refuse_partial(folder)
        head = _read_head(folder)
        saved = FileWeights(read_header(folder / "delta.safetensors")[0])
        roles: dict[str, dict[str, torch.Tensor]] = {}
        for key in saved.specs:
            name, _, role = key.rpartition(":")
            roles.setdefault(name, {})[role] = saved.tensor(key)
        changes = {}
        for name, kind in head["changes"].items():
            try:
                changes[name] = _KINDS[kind](roles[name])
            except (KeyError, ValueError, RuntimeError):  # a role is missing, a width is no number
                raise RequestError(f"{folder}: the {kind} change of {name!r} is incomplete") from None
        delta = cls(changes, head["base"], head["provenance"])
        if set(delta._flat()) != set(saved.specs) or delta.id != head["id"]:
            raise RequestError(f"{folder}: its content is not what was saved; get it again")
        return delta

    def _flat(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}:{role}": tensor
            for name, change in self.changes.items()
            for role, tensor in change.tensors().items()
        }


def _read_head(folder: Path) -> dict[str, Any]:
    head = read_json(folder / "delta.json")
    if head.get("lfm_delta") != FORMAT:
        raise RequestError(f"{folder}: delta format {head.get('lfm_delta')!r}; this version reads format {FORMAT}")
    kinds = head.get("changes")
    well_formed = (
        isinstance(head.get("id"), str)
        and isinstance(head.get("base", 0), (str, type(None)))
        and isinstance(head.get("provenance"), dict)
        and isinstance(kinds, dict)
        and all(isinstance(kind, str) and kind in _KINDS for kind in kinds.values())
    )
    if not well_formed:
        raise RequestError(f"{folder / 'delta.json'}: not as docs/delta.md describes it")
    return head


def _comparable(base: Spec | None, tuned: Spec | None) -> bool:
    if base is None or tuned is None:
        return False
    return base.same_as(tuned) and (base.floating or base.dtype == tuned.dtype)


def _computes(change: Change, spec: Spec) -> bool:
    """Whether the arithmetic means something: on numbers any change; on codes and counters a replacement in kind."""
    if spec.floating:
        return True
    return isinstance(change, Replace) and dtype_name(change.values.dtype) == spec.dtype


def _contradictions(one: Delta, other: Delta) -> list[str]:
    import torch

    return [
        f"{name!r}: deltas {one.id[:12]} and {other.id[:12]} put different tensors in its place"
        for name, change in one.changes.items()
        if isinstance(change, Replace)
        and isinstance(rival := other.changes.get(name), Replace)
        and not torch.equal(change.values, rival.values)
    ]


class Patched(Weights):
    """Weights with deltas on them; computed on reading, in float32 (float64 if so stored), cast to the base's dtype."""

    def __init__(self, base: Weights, deltas: Iterable[Delta] = ()) -> None:
        self.base = base
        # The order of application must not show, so sums always run in the order of the ids.
        self.deltas = tuple(sorted(deltas, key=lambda delta: delta.id))
        problems = [line for delta in self.deltas for line in delta.problems(base)]
        for one, other in itertools.combinations(self.deltas, 2):
            if one.id == other.id:
                problems.append(f"delta {one.id[:12]} is applied already")
            else:
                problems += _contradictions(one, other)
        if problems:
            raise RequestError(*problems)
        self._noted: dict[str, str] = {}

    def apply(self, delta: Delta) -> Patched:
        """Return these weights with one more delta. Raises RequestError when it does not belong here."""
        return Patched(self.base, (*self.deltas, delta))

    def revert(self, delta_id: str) -> Patched:
        """Return these weights without the delta of that id (or unique beginning of one)."""
        matching = [delta for delta in self.deltas if delta.id.startswith(delta_id)]
        if len(matching) != 1:
            applied = ", ".join(delta.id[:12] for delta in self.deltas) or "none"
            raise RequestError(f"{plural(len(matching), 'delta')} called {delta_id!r} here; applied: {applied}")
        return Patched(self.base, (delta for delta in self.deltas if delta is not matching[0]))

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.base.specs

    def read_into(self, name: str, start: int, out: np.ndarray[Any, Any]) -> None:
        if any(name in delta.changes for delta in self.deltas):
            super().read_into(name, start, out)
        else:
            self.base.read_into(name, start, out)

    def known_digests(self) -> Mapping[str, str]:
        return self._noted

    def note_digests(self, digests: Mapping[str, str]) -> None:
        self._noted |= digests

    def tensor_digests(self) -> dict[str, str]:
        self._noted |= self.hash_tensors(name for name in self.specs if name not in self._noted)
        return dict(self._noted)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stored = self.base.read(name, start, stop)
        changes = [delta.changes[name] for delta in self.deltas if name in delta.changes]
        arithmetic = any(change.stage for change in changes)
        part = _wide(stored) if arithmetic else stored
        for change in sorted(changes, key=lambda change: change.stage):
            change.act(part, start)
        return part.to(stored.dtype)


def compose(deltas: Iterable[Delta]) -> Delta:
    """Return one delta that does what all of them do."""
    return reduce(Delta.compose, deltas)
