"""Runs programs on a device that torch knows, such as a GPU: the same steps as in `kernels`, and the same numbers.

Each worker thread has a stream of its own, so that while one thread's elements are copied another's are computed.
Only sums over all elements may differ from those of a CPU, in their last bits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lfm.reuse.merge._machine.kernels import (
    HALF,
    LN_2,
    LOG2_E,
    ROUNDER,
    TERMS,
    Broken,
    Output,
    Part,
    Totals,
    keep,
    recalled,
)
from lfm.reuse.merge._machine.program import OPS, Program

Values = torch.Tensor
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
Run = Callable[..., Broken]


def runner(device: str) -> Run:
    """Return what runs programs on a device, in the place of `kernels.run`."""
    local = threading.local()

    def run(
        program: Program, part: Part, totals: Totals, output: Output | None = None, *, wide: bool = False
    ) -> Broken:
        with _stream(device, local):
            return _Machine(device, part, totals, output, wide).run(program)

    return run


@contextlib.contextmanager
def _stream(device: str, local: threading.local) -> Any:
    if not device.startswith("cuda"):
        yield
        return
    if not hasattr(local, "stream"):
        local.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(local.stream):
        yield
        local.stream.synchronize()


class _Machine:
    def __init__(self, device: str, part: Part, totals: Totals, output: Output | None, wide: bool) -> None:
        self._device = device
        self._part = part
        self._totals = totals
        self._output = output
        self._real = torch.float64 if wide else torch.float32
        self._broken = Broken()

    def run(self, program: Program) -> Broken:
        registers: list[Any] = [
            torch.full((self._part.size,), value, dtype=self._real, device=self._device) for value in program.constants
        ]
        registers += [None] * (program.registers - len(registers))
        for number, to, a, b, c, _, value in program.steps:
            op = OPS[number]
            if op == "INPUT":
                registers[to] = self._input(a)
            elif op == "RANDOM":
                registers[to] = uniform(self._part.keys[a], self._part.place, self._part.size, self._device).to(
                    self._real
                )
            elif op == "RECALL":
                registers[to] = torch.from_numpy(recalled(self._part, a)).to(self._device, self._real)
            elif op == "KEEP":
                keep(self._part, to, (registers[a] != 0).cpu().numpy())
            elif op in _ARITHMETIC:
                operands = [registers[index] for index in (a, b, c) if index >= 0]
                registers[to] = _ARITHMETIC[op](*operands).to(self._real)
            elif op == "STORE":
                self._store(registers[a], registers[b] if b >= 0 else None)
            else:
                self._note(op, to, value, [registers[index] for index in (a, b) if index >= 0])
        return self._broken

    def _input(self, index: int) -> Values:
        raw, dtype = self._part.inputs[index], self._part.dtypes[index]
        host = torch.from_numpy(raw.view(np.int16) if dtype == "BF16" else raw)
        there = host.to(self._device, non_blocking=True)
        values = (there.view(torch.bfloat16) if dtype == "BF16" else there).to(self._real)
        if not bool(torch.isfinite(there.view(torch.bfloat16) if dtype == "BF16" else there).all()):
            self._broken.inputs.append(index)
        return values

    def _store(self, values: Values, noise: Values | None) -> None:
        if self._output is None:
            return
        dtype = self._output.dtype
        exact = noise is None or dtype in ("F32", "F64")
        rounded = values.to(STORED[dtype]) if exact else _up(values, noise, dtype)
        self._broken.output |= not bool(torch.isfinite(rounded).all())
        back = rounded.cpu()
        self._output.values[:] = (
            (back.view(torch.int16) if self._output.dtype == "BF16" else back).numpy().view(self._output.values.dtype)
        )

    def _note(self, op: str, to: int, value: float, of: list[Values]) -> None:
        if op == "DOT":
            self._totals.lanes[to, 0] += float((of[0].double() * of[1].double()).sum())
        elif op == "LARGEST":
            self._totals.largest[to] = max(self._totals.largest[to], float(of[0].max()))
        else:
            bits = of[0].float().view(torch.int32) & 0x7FFFFFFF
            halves = bits >> 16 if op == "HIGH" else bits[bits >> 16 == int(value)] & 0xFFFF
            self._totals.counts[to] += torch.bincount(halves, minlength=HALF).cpu().numpy().astype(np.uint32)


def _split_power(x: Values) -> tuple[Values, Values]:
    """Return 2^k and e^r - 1, where x = k ln 2 + r, in float64: see the C source of `kernels`."""
    shifted = x * LOG2_E + ROUNDER
    k = shifted - ROUNDER
    r = (x - k * LN_2[0]) - k * LN_2[1]
    total = torch.full_like(r, TERMS[0])
    for term in TERMS[1:]:
        total = total * r + term
    power = (shifted.view(torch.int64) + 1023) << 52
    return power.view(torch.float64), total * r


def _exponential(x: Values) -> Values:
    power, rest = _split_power(x.double())
    return power * rest + power


def _hyperbolic_tangent(x: Values) -> Values:
    power, rest = _split_power(x.double() * 2)
    grown = power * rest + (power - 1)
    return grown / (grown + 2)


_ARITHMETIC: dict[str, Any] = {
    "ADD": torch.add,
    "SUB": torch.sub,
    "MUL": torch.mul,
    "DIV": torch.div,
    "ABS": torch.abs,
    "SQRT": torch.sqrt,
    "SIGN": lambda a: (a > 0).to(a.dtype) - (a < 0).to(a.dtype),
    "MIN": lambda a, b: torch.where(b < a, b, a),
    "MAX": lambda a, b: torch.where(a < b, b, a),
    "LT": torch.lt,
    "LE": torch.le,
    "EQ": torch.eq,
    "WHERE": lambda a, b, c: torch.where(a != 0, b, c),
    "EXP": _exponential,
    "TANH": _hyperbolic_tangent,
}


def _up(values: Values, noise: Any, dtype: str) -> Values:
    """Round up with the probability of what is cut off: see `kernels.narrowed`."""
    single = values.float()
    if dtype == "BF16":
        bits = single.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        upper: Values = ((bits + (noise * 65536).to(torch.int64)) >> 16) & 0xFFFF
        return upper.to(torch.int32).to(torch.int16).view(torch.bfloat16)
    exponent = ((single.view(torch.int32) >> 23) & 0xFF) - 127
    quantum = torch.ldexp(torch.ones_like(single, dtype=torch.float64), exponent.clamp(min=-14) - 10)
    steps = torch.floor(single.double().abs() / quantum + noise.double())
    return torch.copysign(steps * quantum, single.double()).float().half()


def uniform(key: int, place: int, count: int, device: str) -> Values:
    """Return the same numbers as `kernels.uniform`."""
    blocks = torch.arange(place // 4, -(-(place + count) // 4), dtype=torch.int64, device=device)
    mask = 0xFFFFFFFF
    x = [blocks & mask, blocks >> 32, torch.zeros_like(blocks), torch.zeros_like(blocks)]
    keys = [key & mask, key >> 32 & mask]
    for _ in range(7):
        (p_high, p_low), (q_high, q_low) = _product(0xD2511F53, x[0]), _product(0xCD9E8D57, x[2])
        x = [q_high ^ x[1] ^ keys[0], q_low, p_high ^ x[3] ^ keys[1], p_low]
        keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
    words = torch.stack(x, dim=1).reshape(-1)[:count]
    return (words >> 8).float() * 2.0**-24


def _product(factor: int, of: Values) -> tuple[Values, Values]:
    """Return the upper and lower 32 bits of a product of two 32-bit numbers, within signed 64-bit arithmetic."""
    low = factor * (of & 0xFFFF)
    high = factor * (of >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
