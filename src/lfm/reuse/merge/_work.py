"""Merges one tensor at a time, from any thread: element by element, by rows, or whole; copies what is not merged."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lfm.checkpoint import RAW, TensorWriter, raw_bytes
from lfm.errors import LfmError
from lfm.evaluate.change import group_of
from lfm.reuse.merge._contract import Elementwise, Inputs, Merge, Site, Tensorwise, Whole
from lfm.reuse.merge._extent import TensorExtent
from lfm.reuse.merge._layout import Layout, Target
from lfm.reuse.merge._machine import kernels
from lfm.reuse.merge._machine.array import Array, total
from lfm.reuse.merge._machine.kernels import Output, Totals
from lfm.reuse.merge._machine.program import Kept, Program, Wanted, compile_program
from lfm.reuse.merge._stream import CHUNK, UNIT, Stream, is_wide, row_length


def takes(method: Merge) -> str:
    if isinstance(method, Tensorwise):
        return "tensors"
    return method.takes if isinstance(method, Elementwise) else "elements"


def held_by(method: Merge, target: Target, chunk: int) -> int:
    """Return the bytes that one thread holds for a tensor."""
    width = 8 if is_wide(target) else 4
    method = target.resolved.method if target.resolved else method
    if target.kind == "merge" and takes(method) != "elements":
        copies = method.copies if isinstance(method, Tensorwise) else 1.5
        size = target.spec.size
        if takes(method) == "rows":
            size = min(size, max(chunk, math.lcm(row_length(target), UNIT)))
        return int(size * width * copies * (len(target.inputs) + 1))
    items = sum(int(np.dtype(RAW[origin.spec.dtype]).itemsize) for origin in target.inputs)
    return min(target.spec.size, chunk) * (items + width + 4 * len(target.sources)) + (1 << 20)


class Room:
    """Memory for whole tensors: who needs more than is left waits, but one always fits."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def for_bytes(self, count: int) -> Iterator[None]:
        """Hold so many bytes, once they are there."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + count <= self._size)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


@dataclass
class Work:
    """Merges one tensor at a time, from any thread."""

    method: Merge
    inputs: Inputs
    stream: Stream
    writer: TensorWriter
    device: str
    room: Room
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._measured: dict[str, Any] = {}
        self._moved: dict[str, tuple[float, float]] = {}

    # --- what is found out first

    def measure(self, layout: Layout, pool: ThreadPoolExecutor) -> None:
        """Measure all layers, or the whole model, where the method wants that."""
        groups: dict[Any, list[Target]] = {}
        for target in layout.targets.values():
            if target.kind == "merge" and target.spec.size and (scope := self._scope(target)) in ("layer", "global"):
                place = target.name.split(".", 1)[0] if target.layer is None else target.layer
                groups.setdefault(place if scope == "layer" else "", []).append(target)
        for targets in groups.values():
            extent = TensorExtent(self.stream, targets, pool)
            found = self._elementwise(targets[0]).measure(extent)
            self._measured |= {target.name: found for target in targets}

    def _scope(self, target: Target) -> str:
        method = target.resolved.method if target.resolved else None
        return method.measures if isinstance(method, Elementwise) else "nothing"

    def _elementwise(self, target: Target) -> Elementwise:
        method = target.resolved.method if target.resolved else None
        if not isinstance(method, Elementwise):
            raise AssertionError(f"{target.name} is not merged element by element")
        return method

    # --- one tensor

    def do(self, target: Target) -> None:
        """Merge one tensor into the writer."""
        if target.kind == "copy" or not target.spec.size:
            self._copy(target)
        elif target.kind == "merge" and target.resolved and takes(target.resolved.method) != "elements":
            with self.room.for_bytes(held_by(target.resolved.method, target, CHUNK)):
                self._merge_whole(target)
        else:
            self._merge(target)

    def _merge(self, target: Target) -> None:
        kept = self.stream.kept(target) if self._scope(target) == "tensor" else None
        program = self._program(target, kept)
        totals = Totals.of(program)
        wide = is_wide(target)
        for part in self.stream.parts(target, program, kept):
            output = Output(self.stream.buffer("output", target.spec.dtype, part.size), target.spec.dtype)
            broken = self.stream.run(program, part, totals, output, wide=wide)
            self.stream.check(target, broken.inputs)
            self._write(target, output.values, broken.output)
        if program.products:
            moved, before = totals.products
            self._moved[target.name] = (float(moved), float(before))

    def _program(self, target: Target, kept: Kept | None) -> Program:
        site = self.stream.site(target)
        rounding = self.inputs.rounding == "stochastic" and target.spec.dtype in ("BF16", "F16")
        if target.kind == "average":
            return self.stream.program(
                (site, "average", rounding), lambda: self._wanted(_average(site), site, rounding)
            )
        method = self._elementwise(target)
        if method.measures == "tensor":
            measured, key = method.measure(TensorExtent(self.stream, [target], kept=kept)), None
        else:
            measured = self._measured.get(target.name)
            key = (site, measured, rounding)
        return self.stream.program(key, lambda: self._wanted(method.merge(site, measured), site, rounding, kept))

    @staticmethod
    def _wanted(merged: Array, site: Site, stochastic: bool, kept: Kept | None = None) -> Wanted:
        noise = site.random(len(site.sources)) if stochastic else None
        if site.base is None:
            return Wanted(merged, noise, kept=kept)
        change = merged - site.base
        return Wanted(merged, noise, products=[(change, change), (site.base, site.base)], kept=kept)

    def _merge_whole(self, target: Target) -> None:
        method = target.resolved.method if target.resolved else None
        if target.resolved is None or not isinstance(method, (Elementwise, Tensorwise)):
            raise AssertionError(f"{target.name} is not merged as a whole")
        merge = method.merge if isinstance(method, Tensorwise) else method.merge_whole
        rows = takes(method) == "rows"
        moved = np.zeros(2)  # squares of what changes, and of what was there
        for place, models in self._rows(target) if rows else [(0, self._whole(target))]:
            shape = (-1, *target.spec.shape[1:]) if rows and len(target.spec.shape) > 1 else target.spec.shape
            shaped = [model.reshape(shape) for model in models]
            base = shaped.pop() if target.base else None
            before = models[-1].copy() if target.base else None
            given = target.resolved
            whole = Whole(shaped, base, given.weights, given.values, target.layer, target.is_table, self.device)
            flat = np.ascontiguousarray(merge(whole), dtype=models[0].dtype).reshape(-1)
            moved += self._write_values(target, flat, before, place)
        if target.base:
            self._moved[target.name] = (float(moved[0]), float(moved[1]))

    def _whole(self, target: Target) -> list[np.ndarray[Any, Any]]:
        kind = np.float64 if is_wide(target) else np.float32
        models = [np.empty(target.spec.size, kind) for _ in target.inputs]
        for part in self.stream.parts(target):
            for model, values in zip(models, self._widened(target, part), strict=True):
                model[part.place : part.place + part.size] = values
        return models

    def _rows(self, target: Target) -> Iterator[tuple[int, list[np.ndarray[Any, Any]]]]:
        kind = np.float64 if is_wide(target) else np.float32
        for part in self.stream.parts(target, by_rows=True):
            yield part.place, [values.astype(kind, copy=False) for values in self._widened(target, part)]

    def _widened(self, target: Target, part: kernels.Part) -> Iterator[np.ndarray[Any, Any]]:
        for index, (raw, dtype) in enumerate(zip(part.inputs, part.dtypes, strict=True)):
            values = kernels.widened(raw, dtype)
            self.stream.check(target, [] if np.isfinite(values).all() else [index])
            yield values.copy() if values is raw else values

    def _write_values(
        self, target: Target, values: np.ndarray[Any, Any], before: np.ndarray[Any, Any] | None, place: int
    ) -> np.ndarray[Any, Any]:
        """Round and write numbers, in the way of a program that gives its input back."""
        one = Array("INPUT")
        noise = Array("RANDOM") if self.inputs.rounding == "stochastic" and target.spec.dtype != "F32" else None
        base = Array("INPUT", index=1)
        products = [] if before is None else [(one - base, one - base), (base, base)]
        program = compile_program(Wanted(one, noise, products=products))
        totals = Totals.of(program)
        dtype = "F64" if values.dtype == np.float64 else "F32"
        for start in range(0, len(values), CHUNK):
            pieces = [one[start : start + CHUNK] for one in (values, before) if one is not None]
            output = Output(self.stream.buffer("output", target.spec.dtype, len(pieces[0])), target.spec.dtype)
            part = kernels.Part(pieces, [dtype] * len(pieces), place + start, self.stream.rounding_key(target))
            broken = kernels.run(program, part, totals, output, wide=is_wide(target))
            self._write(target, output.values, broken.output or bool(broken.inputs))
        return totals.products if before is not None else np.zeros(2)

    def _write(self, target: Target, values: np.ndarray[Any, Any], overflow: bool) -> None:
        if overflow:
            raise LfmError(
                f"tensor {target.name!r}: the merge overflows the range of {target.spec.dtype}; "
                "use --dtype float32, a smaller scale, or smaller weights"
            )
        self.writer.append(target.name, raw_bytes(values))

    def _copy(self, target: Target) -> None:
        """Take a tensor as it is: counters and flags, on which there is no arithmetic, and what is not merged."""
        origin, *others = [*([target.base] if target.base else []), *target.sources]
        plain = replace(target, sources=(origin,), base=None)
        if origin.spec.dtype != target.spec.dtype or self.stream.tokens.moves(plain):
            one = Array("INPUT")
            program = compile_program(Wanted(one))
            for part in self.stream.parts(plain):
                output = Output(self.stream.buffer("output", target.spec.dtype, part.size), target.spec.dtype)
                broken = self.stream.run(program, part, Totals.of(program), output, wide=is_wide(plain))
                self.stream.check(plain, broken.inputs)
                self._write(target, output.values, broken.output)
            return
        differs = any(other.spec.dtype != origin.spec.dtype for other in others)
        for part in self.stream.parts(replace(target, sources=(origin, *others), base=None)):
            first, *rest = part.inputs
            differs |= any(not np.array_equal(first, values) for values in rest)
            self.writer.append(target.name, raw_bytes(first))
        if differs and not origin.spec.floating:
            self.notes.append(
                f"tensor {target.name!r} ({origin.spec}) differs between the models; "
                f"taken from {self.stream.ref_of(origin.model)}"
            )

    def change(self) -> dict[str, float]:
        """Return |merged - base| / |base| for each part of the model, and for all of it; empty without a base."""
        sums: dict[str, list[float]] = {}
        for name, (moved, before) in sorted(self._moved.items()):
            for group in (group_of(name), "all"):
                found = sums.setdefault(group, [0.0, 0.0])
                found[0] += moved
                found[1] += before
        return {group: math.sqrt(moved / before) if before else 0.0 for group, (moved, before) in sums.items()}


def _average(site: Site) -> Array:
    """Return the mean of the sources by their weights, or their plain mean where those are no shares."""
    weights = site.weights if min(site.weights) >= 0 and sum(site.weights) > 0 else (1.0,) * len(site.sources)
    return total([source * (weight / sum(weights)) for source, weight in zip(site.sources, weights, strict=True)])
