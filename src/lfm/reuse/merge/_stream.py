"""Streams tensors of several models side by side through programs, chunk by chunk, hashing what it reads.

A worker thread takes a tensor at a time. Sums over a tensor run through it in order, in a fixed number of lanes, so
neither threads nor the size of a chunk show in the results.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lfm.checkpoint import RAW, Checkpoint, raw_bytes
from lfm.errors import LfmError
from lfm.models.ref import ModelRef
from lfm.reuse.merge._contract import Site
from lfm.reuse.merge._layout import Origin, Target
from lfm.reuse.merge._machine import kernels
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._machine.kernels import Output, Part, Totals
from lfm.reuse.merge._machine.program import Kept, Program, Wanted, compile_program
from lfm.reuse.merge._tokens.aligned import Tokens

CHUNK = 1 << 18  # elements; what a thread holds of them in every model stays in a core's share of the caches
BLOCKS = 4  # samples of a tensor that go into the name of a model
UNIT = 32  # chunks begin at multiples of it: the lanes of sums, and the blocks of random numbers
Values = np.ndarray[Any, Any]


@dataclass
class Keys:
    """What the random numbers of a merge depend on besides tensor and place: the seed, and what the sources hold."""

    seed: int
    checkpoints: Mapping[ModelRef, Checkpoint]

    @cached_property
    def sources(self) -> dict[ModelRef, str]:
        """A name for each model by samples of what it holds: where it lies, or stands in a list, is no part of it.

        Models that agree in all samples, and whole models given twice, have names of their own all the same.
        """
        found: dict[ModelRef, str] = {}
        seen: dict[str, int] = {}
        for ref, checkpoint in self.checkpoints.items():
            digest = hashlib.sha256()
            for name, spec in sorted(checkpoint.specs.items()):
                digest.update(f"{name}\0{spec.dtype}\0{spec.shape}\0".encode())
                for block in range(BLOCKS if spec.size > 64 * BLOCKS else min(spec.size, 1)):
                    start = block * (spec.size // BLOCKS)
                    digest.update(raw_bytes(checkpoint.weights.read_raw(name, start, min(start + 16, spec.size))))
            number = seen[digest.hexdigest()] = seen.get(digest.hexdigest(), -1) + 1
            found[ref] = f"{digest.hexdigest()} {number}"
        return found

    def of(self, target: Target, occurrence: Sequence[int]) -> tuple[int, ...]:
        """Return a key for each source, and one for rounding."""
        names = [
            f"{self.sources.get(origin.model, '')}\0{number}"
            for origin, number in zip(target.sources, occurrence, strict=True)
        ]
        texts = [f"{self.seed}\0{target.name}\0{name}" for name in (*names, "rounding")]
        return tuple(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts)


class Stream:
    """The models of one merge, read side by side."""

    def __init__(self, checkpoints: dict[ModelRef, Checkpoint], keys: Keys, tokens: Tokens, chunk: int = CHUNK) -> None:
        self._checkpoints = checkpoints
        self._keys = keys
        self.tokens = tokens
        self._chunk = max(chunk // UNIT * UNIT, UNIT)
        self._known = {ref: set(checkpoint.weights.known_digests()) for ref, checkpoint in checkpoints.items()}
        self._claimed: dict[ModelRef, set[str]] = {ref: set() for ref in checkpoints}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._sites: dict[Any, Site] = {}
        self._programs: dict[Any, Program] = {}
        self.run = kernels.run
        self.keep = 0  # bytes of a tensor, in all models together, up to which one read serves several passes
        self.keep_bits = 0  # bytes of what is found out about a tensor's elements, up to which they are kept likewise

    # --- what methods see

    def site(self, target: Target) -> Site:
        """Return what a method sees of a tensor; tensors that look the same to it share one."""
        if target.resolved is None:
            raise AssertionError(f"{target.name} is not merged")
        layer = target.layer if type(target.resolved.method).by_layer else None
        key = (target.resolved, layer, target.base is not None)
        if key not in self._sites:
            count = len(target.sources)
            sources = tuple(Array("INPUT", index=index) for index in range(count))
            base = Array("INPUT", index=count) if target.base else None
            self._sites[key] = Site(sources, base, target.resolved.weights, target.resolved.values, layer)
        return self._sites[key]

    def program(self, key: Any, make: Callable[[], Wanted]) -> Program:
        """Return the program for what is wanted, made once for each key."""
        if key is None:
            return compile_program(make())
        if key not in self._programs:
            self._programs[key] = compile_program(make())
        return self._programs[key]

    def kept(self, target: Target) -> Kept | None:
        """Return room for what one pass over a tensor leaves to the next, if there is room."""
        rows, size = len(target.sources), target.spec.size
        return Kept.empty(rows, size) if rows * size <= 8 * self.keep_bits else None

    # --- running

    def parts(
        self, target: Target, program: Program | None = None, kept: Kept | None = None, *, by_rows: bool = False
    ) -> Iterator[Part]:
        """Yield a tensor's elements in every model, chunk by chunk, and what else a program that is to run on it needs.

        The arrays are used again for the next part.
        """
        size, origins = target.spec.size, target.inputs
        ranked = program is not None and program.inputs > len(origins)  # ranks come after the models
        draws = program is not None and program.draws
        keys = self._keys.of(target, _occurrences(target.sources)) if draws else ()
        moves = self.tokens.moves(target)
        hashers = [None if moves else self._hasher(origin) for origin in origins]
        for start in range(0, size, step := self._step(target, ranked or by_rows)):
            inputs, dtypes = self._inputs(target, start, min(step, size - start), moves)
            for hasher, values in zip(hashers, inputs, strict=True):
                if hasher is not None:
                    hasher.update(raw_bytes(values))
            part = Part(inputs, dtypes, start, keys, None if kept is None else kept.bits)
            yield self._with_ranks(target, part) if ranked else part
        for origin, hasher in zip(origins, hashers, strict=True):
            if hasher is not None:
                self._checkpoints[origin.model].weights.note_digests({origin.name: hasher.hexdigest()})

    def _inputs(self, target: Target, start: int, count: int, moves: bool) -> tuple[list[Values], list[str]]:
        """Return elements of a tensor in every model, and the types they are stored in."""
        origins = target.inputs
        if moves:
            wide = is_wide(target)
            found = self.tokens.read(target, self._checkpoints, start, count, wide)
            return found, ["F64" if wide else "F32"] * len(found)
        dtypes = [origin.spec.dtype for origin in origins]
        kept = self._kept(target)
        if kept is not None:
            return [values[start : start + count] for values in kept], dtypes
        return [self._read(index, origin, start, count) for index, origin in enumerate(origins)], dtypes

    def scan(
        self,
        target: Target,
        program: Program,
        totals: Totals,
        output: Output | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Run a program over a tensor; with an output, which takes the whole tensor, for its elements too."""
        wide = is_wide(target)
        for part in self.parts(target, program, kept):
            place = slice(part.place, part.place + part.size)
            into = None if output is None else Output(output.values[place], output.dtype)
            self.check(target, self.run(program, part, totals, into, wide=wide).inputs)

    def check(self, target: Target, broken: Sequence[int]) -> None:
        """Raise LfmError if inputs hold numbers that are none."""
        guilty = [origin for index, origin in enumerate(target.inputs) if index in broken]
        if guilty:
            refs = ", ".join(dict.fromkeys(self._checkpoints[origin.model].ref for origin in guilty))
            raise LfmError(f"tensor {guilty[0].name!r} holds NaN or Inf in {refs}: that checkpoint is broken")

    def rounding_key(self, target: Target) -> tuple[int, ...]:
        """Return the key of the random numbers that round a tensor."""
        return self._keys.of(target, _occurrences(target.sources))[-1:]

    def ref_of(self, model: ModelRef) -> str:
        """Return a model's reference, for messages."""
        return self._checkpoints[model].ref

    def buffer(self, name: str, dtype: str, count: int) -> Values:
        """Return memory of this thread for `count` elements, used again by the next call of that name."""
        held: dict[str, Values] = self._local.__dict__.setdefault("held", {})
        kind = np.dtype(RAW[dtype])
        if name not in held or held[name].nbytes < count * kind.itemsize:
            held[name] = np.empty(count * kind.itemsize, np.uint8)
        return held[name][: count * kind.itemsize].view(kind)

    def _read(self, index: int, origin: Origin, start: int, count: int) -> Values:
        values = self.buffer(f"input {index}", origin.spec.dtype, count)
        self._checkpoints[origin.model].weights.read_into(origin.name, start, values)
        return values

    def _kept(self, target: Target) -> list[Values] | None:
        """Return a tensor of every model whole, where it is small enough to be kept from pass to pass."""
        if sum(origin.spec.nbytes for origin in target.inputs) > self.keep:
            return None
        if self._local.__dict__.get("target") is not target:
            self._local.target = None
            size = target.spec.size
            self._local.kept = [self._read(index, origin, 0, size) for index, origin in enumerate(target.inputs)]
            self._local.target = target
        kept: list[Values] = self._local.kept
        return kept

    def _hasher(self, origin: Origin) -> Any:
        """Return what takes a tensor's digest along, for the first to read it whose digest is not known."""
        with self._lock:
            if origin.name in self._known[origin.model] or origin.name in self._claimed[origin.model]:
                return None
            self._claimed[origin.model].add(origin.name)
        return hashlib.sha256()

    def _step(self, target: Target, ranked: bool) -> int:
        if not ranked or not target.spec.size:
            return self._chunk
        unit = math.lcm(row_length(target), UNIT)
        return max(self._chunk // unit, 1) * unit

    # --- ranks within rows

    def _with_ranks(self, target: Target, part: Part) -> Part:
        """Return a part with more inputs: for each source, the ranks of its changes within their rows."""
        site, wide, ranks = self.site(target), is_wide(target), []
        for index, delta in enumerate(site.deltas):
            out = Output(self.buffer(f"rank {index}", "F32", part.size), "F32")
            sizes = self.program((site, "size", index), lambda delta=delta: Wanted(abs(delta)))  # type: ignore[misc]
            self.check(target, self.run(sizes, part, Totals.of(sizes), out, wide=wide).inputs)
            kernels.rank_rows(out.values, row_length(target))
            ranks.append(out.values)
        return replace(part, inputs=[*part.inputs, *ranks], dtypes=[*part.dtypes, *["F32"] * len(ranks)])


def row_length(target: Target) -> int:
    """Return how many elements a row has: all axes but the first; a vector is one row."""
    shape = target.spec.shape
    return max(math.prod(shape[1:]) if len(shape) > 1 else target.spec.size, 1)


def is_wide(target: Target) -> bool:
    """Whether a tensor is merged in float64: where a model stores it so."""
    return any(origin.spec.dtype == "F64" for origin in target.inputs)


def _occurrences(sources: Sequence[Origin]) -> list[int]:
    """Return, for each source, how many before it are the same tensor of the same model."""
    return [sum(origin == earlier for earlier in sources[:index]) for index, origin in enumerate(sources)]
