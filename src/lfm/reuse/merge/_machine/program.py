"""Turns arrays into programs: a list of steps on registers, each of which holds one tile of elements.

A step that several arrays share is done once; a register is free again after its last use. The last steps say what
becomes of the results: an output, and sums, counts or maxima over all elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lfm.reuse.merge._machine.array import Array

OPS = (
    *("INPUT", "RANDOM", "ADD", "SUB", "MUL", "DIV", "ABS", "SQRT", "SIGN", "MIN", "MAX", "LT", "LE", "EQ", "WHERE"),
    *("EXP", "TANH", "RECALL"),
    *("STORE", "KEEP", "DOT", "LARGEST", "HIGH", "LOW"),
)
NUMBERS = {op: number for number, op in enumerate(OPS)}
STEP = np.dtype([("op", "i4"), ("to", "i4"), ("a", "i4"), ("b", "i4"), ("c", "i4"), ("spare", "i4"), ("value", "f8")])


@dataclass(frozen=True)
class Wanted:
    """What to find out, over all elements of a tensor, besides or instead of an output."""

    output: Array | None = None
    noise: Array | None = None  # uniform in [0, 1), for stochastic rounding of the output
    products: Sequence[tuple[Array, Array]] = ()  # sum of a * b
    largest: Sequence[Array] = ()  # the largest element
    high: Sequence[Array] = ()  # how often each value of the upper half of |x|'s float32 bits occurs
    low: Sequence[tuple[Array, int]] = ()  # the same of the lower half, where the upper one is the number given
    kept: Kept | None = None  # where conditions that cost much are kept, or found, if anywhere


@dataclass(frozen=True)
class Kept:
    """Conditions (see `once`) on all elements of a tensor, as bits: a row for each, and which rows are filled."""

    bits: np.ndarray[Any, Any]
    filled: set[int]

    @classmethod
    def empty(cls, rows: int, size: int) -> Kept:
        return cls(np.empty((rows, -(-size // 8)), np.uint8), set())


@dataclass(frozen=True)
class Program:
    """Steps on registers; the first registers hold the values of `constants`."""

    steps: tuple[tuple[int, int, int, int, int, int, float], ...]
    constants: tuple[float, ...]
    registers: int
    products: int
    largest: int
    counts: int

    @cached_property
    def table(self) -> np.ndarray[Any, Any]:
        """The steps as the kernels read them."""
        return np.array(list(self.steps), dtype=STEP)

    @cached_property
    def address(self) -> int:
        """Where the table lies in memory."""
        return int(self.table.ctypes.data)

    @cached_property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return any(OPS[step[0]] == "RANDOM" for step in self.steps)

    @cached_property
    def keeps(self) -> frozenset[int]:
        """Which rows of bits are filled."""
        return frozenset(step[1] for step in self.steps if OPS[step[0]] == "KEEP")

    @cached_property
    def inputs(self) -> int:
        """How many inputs there have to be."""
        return max((step[2] + 1 for step in self.steps if OPS[step[0]] == "INPUT"), default=0)

    @cached_property
    def values(self) -> np.ndarray[Any, Any]:
        return np.array(self.constants, dtype=np.float64)


def compile_program(wanted: Wanted) -> Program:
    """Return the steps that compute what is wanted."""
    ends: list[tuple[str, int, tuple[Array, ...], float]] = []
    if wanted.output is not None:
        ends.append(("STORE", 0, (wanted.output,) if wanted.noise is None else (wanted.output, wanted.noise), 0.0))
    ends += [("DOT", index, pair, 0.0) for index, pair in enumerate(wanted.products)]
    ends += [("LARGEST", index, (one,), 0.0) for index, one in enumerate(wanted.largest)]
    ends += [("HIGH", index, (one,), 0.0) for index, one in enumerate(wanted.high)]
    after = len(wanted.high)
    ends += [("LOW", after + index, (one,), float(half)) for index, (one, half) in enumerate(wanted.low)]
    compiler = _Compiler(ends, wanted.kept)
    return compiler.program(len(wanted.products), len(wanted.largest), after + len(wanted.low))


class _Compiler:
    def __init__(self, ends: list[tuple[str, int, tuple[Array, ...], float]], kept: Kept | None) -> None:
        self._ends = ends
        self._kept = kept
        self._keeps: dict[int, int] = {}  # rows of bits that are filled, and from what
        self._keys: dict[Array, int] = {}  # arrays that are made the same way have one key
        self._known: dict[tuple[Any, ...], int] = {}
        self._made: list[tuple[str, tuple[int, ...], int, float]] = []
        self._order: list[int] = []

    def program(self, products: int, largest: int, counts: int) -> Program:
        ends = [(op, index, tuple(self._key(array) for array in of), value) for op, index, of, value in self._ends]
        ends += [("KEEP", row, (key,), 0.0) for row, key in self._keeps.items()]
        constants = [key for key in range(len(self._made)) if self._made[key][0] == "VALUE"]
        place = {key: register for register, key in enumerate(constants)}
        steps, registers = self._allocate(ends, place, len(constants))
        values = tuple(self._made[key][3] for key in constants)
        return Program(tuple(steps), values, max(registers, 1), products, largest, counts)

    def _key(self, array: Array) -> int:
        """Number an array after those it is made of; without recursion, for long sums."""
        waiting = [array]
        while waiting:
            node = waiting[-1]
            recalled = node.op == "ONCE" and self._kept is not None and node.index in self._kept.filled
            of = () if recalled else node.of
            missing = [part for part in of if part not in self._keys] if node not in self._keys else []
            if missing:
                waiting += reversed(missing)
                continue
            waiting.pop()
            if node.op == "ONCE" and not recalled:
                self._keys[node] = self._keys[node.of[0]]
                if self._kept is not None:
                    self._keeps[node.index] = self._keys[node]
            elif node not in self._keys:
                op = "RECALL" if recalled else node.op
                made = (op, tuple(self._keys[part] for part in of), node.index, node.value)
                # 0.0 == -0.0 and 1 == True, but repr tells them apart
                told = repr(node.value) if node.op == "VALUE" else ""
                self._keys[node] = self._known.setdefault((*made[:3], told), len(self._made))
                if self._keys[node] == len(self._made):
                    self._made.append(made)
        return self._keys[array]

    def _allocate(
        self, ends: list[tuple[str, int, tuple[int, ...], float]], place: dict[int, int], registers: int
    ) -> tuple[list[tuple[int, int, int, int, int, int, float]], int]:
        """Give each result a register of its own until its last use; ends come as soon as what they take is there."""
        uses = [0] * len(self._made)
        for _, of, _, _ in self._made:
            for key in of:
                uses[key] += 1
        for _, _, of, _ in ends:
            for key in of:
                uses[key] += 1
        constant = set(place)
        free: list[int] = []
        steps: list[tuple[int, int, int, int, int, int, float]] = []
        due = {max(of): [end for end in ends if max(end[2]) == max(of)] for _, _, of, _ in ends}

        def emit(op: str, to: int, of: tuple[int, ...], index: int, value: float) -> None:
            operands = [place[key] for key in of] or [index]
            a, b, c = (*operands, -1, -1)[:3]
            steps.append((NUMBERS[op], to, a, b, c, 0, value))
            for key in of:
                uses[key] -= 1
                if not uses[key] and key not in constant:
                    free.append(place[key])

        for key, (op, of, index, value) in enumerate(self._made):
            if key not in constant:
                if free:
                    place[key] = free.pop()
                else:
                    place[key] = registers
                    registers += 1
                emit(op, place[key], of, index, value)
            for end_op, to, end_of, end_value in due.get(key, ()):
                emit(end_op, to, end_of, 0, end_value)
        return steps, registers
