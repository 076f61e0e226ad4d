"""Runs programs over chunks of tensors: compiled C where there is a compiler, numpy otherwise, with the same bits.

The C source beside this file is compiled once, on the machine that runs it, into the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lfm.checkpoint import cache_folder
from lfm.reuse.merge._machine.program import OPS, Program

Values = np.ndarray[Any, Any]
TILE = 1024
LANES = 32
HALF = 1 << 16
DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
CODES = {dtype: number for number, dtype in enumerate(DTYPES)}
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


@dataclass
class Totals:
    """What a program has found out so far; one of them goes along from chunk to chunk."""

    lanes: Values
    largest: Values
    counts: Values

    @classmethod
    def of(cls, program: Program) -> Totals:
        return cls(
            np.zeros((program.products, LANES)),
            np.full(program.largest, -np.inf),
            np.zeros((program.counts, HALF), np.uint32),
        )

    @property
    def products(self) -> Values:
        """The sums of products, each the sum of its lanes in their order."""
        return np.add.accumulate(self.lanes, axis=1)[:, -1] if self.lanes.size else self.lanes[:, 0]


@dataclass(frozen=True)
class Part:
    """A part of a tensor in every model: raw elements as stored, where they begin, and the keys of random numbers."""

    inputs: list[Values]
    dtypes: list[str]
    place: int = 0
    keys: tuple[int, ...] = ()
    bits: Values | None = None  # of all elements, where conditions are kept: see `once`

    @property
    def size(self) -> int:
        return len(self.inputs[0])


@dataclass
class Output:
    """Where the results of a part go."""

    values: Values
    dtype: str


@dataclass
class Broken:
    """Which inputs held numbers that are not finite, and whether the output does."""

    inputs: list[int] = field(default_factory=list)
    output: bool = False


def run(program: Program, part: Part, totals: Totals, output: Output | None = None, *, wide: bool = False) -> Broken:
    """Run a program over a part, in float32, or in float64 if `wide`."""
    library = native(wide)
    if library is not None:
        bad = _run_native(library, program, part, totals, output)
    else:
        bad = run_numpy(program, part, totals, output, wide=wide)
    return Broken([index for index in range(len(part.inputs)) if bad[index]], bool(bad[len(part.inputs)]))


# --- compiled


def native(wide: bool) -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be compiled here."""
    if wide not in _libraries:
        with _compiling:  # threads ask at the same time, and one is to compile
            _libraries.setdefault(wide, _native(wide))
    return _libraries[wide]


_compiling = threading.Lock()
_libraries: dict[bool, ctypes.CDLL | None] = {}


@cache
def _native(wide: bool) -> ctypes.CDLL | None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or os.environ.get("LFM_KERNELS") == "numpy":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler, wide)))
    except (OSError, subprocess.SubprocessError):
        return None
    at, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.lfm_run.argtypes = [
        *(at, whole, whole, whole, at),  # the program
        *(at, at, whole, at, at, long),  # the models, and what belongs to their elements
        *(at, whole, long, long, at, at, at, at),  # the results
    ]
    library.lfm_rank_rows.argtypes = [at, long, long]
    return library


def _compiled(compiler: str, wide: bool) -> Path:
    source = Path(__file__).with_suffix(".c")
    single = "" if wide else "f"
    defined = {"REAL": "double" if wide else "float", "SQRT": f"sqrt{single}", "FABS": f"fabs{single}"}
    defined |= {f"OP_{op}": str(number) for number, op in enumerate(OPS)}
    defined |= {dtype: str(number) for number, dtype in enumerate(DTYPES)}
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in defined.items())]
    key = hashlib.sha256(b"\0".join([source.read_bytes(), compiler.encode(), *map(str.encode, flags), _processor()]))
    library = cache_folder() / "kernels" / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        draft = library.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, "-o", str(draft), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        draft.replace(library)
    return library


def _processor() -> bytes:
    """Return what the compiler's choice of instructions depends on: a home folder may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return platform.processor().encode()


def _address(values: Values) -> int:
    address: int = values.__array_interface__["data"][0]
    return address


def _run_native(library: ctypes.CDLL, program: Program, part: Part, totals: Totals, output: Output | None) -> list[int]:
    count = len(part.inputs)
    bad = (ctypes.c_int32 * (count + 1))()
    failed = library.lfm_run(
        program.address,
        len(program.steps),
        program.registers,
        len(program.constants),
        _address(program.values),
        (ctypes.c_void_p * count)(*map(_address, part.inputs)),
        (ctypes.c_int32 * count)(*(CODES[dtype] for dtype in part.dtypes)),
        count,
        (ctypes.c_uint64 * max(len(part.keys), 1))(*part.keys),
        None if part.bits is None else _address(part.bits),
        0 if part.bits is None else part.bits.shape[1],
        None if output is None else _address(output.values),
        0 if output is None else CODES[output.dtype],
        part.place,
        part.size,
        _address(totals.lanes),
        _address(totals.largest),
        _address(totals.counts),
        bad,
    )
    if failed:
        raise MemoryError("no memory for the registers of a merge")
    return list(bad)


def rank_rows(values: Values, row: int) -> None:
    """Replace each magnitude by its rank within its row, 0 for the smallest, 1 for the largest; the first of equals
    is the smaller, and the one element of a row of 1 has 0.5.
    """
    library = native(False)
    if library is None:
        rank_rows_numpy(values, row)
    elif library.lfm_rank_rows(_address(values), len(values), row):
        raise MemoryError("no memory for the ranks of a row")


# --- the same in numpy


def rank_rows_numpy(values: Values, row: int) -> None:
    """Do what `rank_rows` does, with numpy."""
    rows = values.reshape(-1, row)
    order = np.argsort(rows, axis=1, kind="stable")
    ranks = (
        np.arange(row, dtype=np.float32) * (np.float32(1) / np.float32(row - 1))
        if row > 1
        else np.full(1, 0.5, np.float32)
    )
    np.put_along_axis(rows, order, np.broadcast_to(ranks, rows.shape), axis=1)


def run_numpy(program: Program, part: Part, totals: Totals, output: Output | None = None, *, wide: bool) -> list[int]:
    """Run a program with numpy: the definition of what the C kernels do."""
    real = np.float64 if wide else np.float32
    bad = [0] * (len(part.inputs) + 1)
    registers: list[Any] = [real(value) for value in program.constants] + [None] * program.registers
    with np.errstate(all="ignore"):
        for op_number, to, a, b, c, _, value in program.steps:
            op = OPS[op_number]
            if op == "INPUT":
                registers[to] = widened(part.inputs[a], part.dtypes[a]).astype(real)
                bad[a] |= not _finite(part.inputs[a], part.dtypes[a])
            elif op == "RANDOM":
                registers[to] = uniform(part.keys[a], part.place, part.size).astype(real)
            elif op == "RECALL":
                registers[to] = recalled(part, a).astype(real)
            elif op == "KEEP":
                keep(part, to, np.broadcast_to(registers[a], part.size) != 0)
            elif op in _ARITHMETIC:
                operands = [registers[index] for index in (a, b, c) if index >= 0]
                registers[to] = np.asarray(_ARITHMETIC[op](*operands), dtype=real)
            elif op == "STORE" and output is not None:
                noise = registers[b] if b >= 0 else None
                narrowed(np.broadcast_to(registers[a], part.size), noise, output)
                bad[-1] |= not _finite(output.values, output.dtype)
            else:
                _note(op, to, value, [np.broadcast_to(registers[i], part.size) for i in (a, b) if i >= 0], totals)
    return [int(flag) for flag in bad]


LOG2_E = float.fromhex("0x1.71547652b82fep0")
LN_2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))  # in two parts
ROUNDER = float.fromhex("0x1.8p52")  # x + ROUNDER - ROUNDER is x, rounded to a whole number
TERMS = tuple(1 / math.factorial(n) for n in range(13, 0, -1))


def _split_power(x: Values) -> tuple[Values, Values]:
    """Return 2^k and e^r - 1, where x = k ln 2 + r, in float64: see the C source."""
    shifted = x * LOG2_E + ROUNDER
    k = shifted - ROUNDER
    r = (x - k * LN_2[0]) - k * LN_2[1]
    total = np.full_like(r, TERMS[0])
    for term in TERMS[1:]:
        total = total * r + term
    power = (np.atleast_1d(shifted).view(np.uint64) + np.uint64(1023)) << np.uint64(52)
    return power.view(np.float64).reshape(np.shape(x)), total * r


def _exponential(x: Values) -> Values:
    power, rest = _split_power(np.asarray(x, dtype=np.float64))
    return power * rest + power


def _hyperbolic_tangent(x: Values) -> Values:
    power, rest = _split_power(2 * np.asarray(x, dtype=np.float64))
    grown = power * rest + (power - 1)
    found: Values = grown / (grown + 2)
    return found


_ARITHMETIC: dict[str, Any] = {
    "ADD": np.add,
    "SUB": np.subtract,
    "MUL": np.multiply,
    "DIV": np.divide,
    "ABS": np.abs,
    "SQRT": np.sqrt,
    "SIGN": lambda a: np.subtract(a > 0, a < 0, dtype=np.float32),
    "MIN": lambda a, b: np.where(b < a, b, a),
    "MAX": lambda a, b: np.where(a < b, b, a),
    "LT": np.less,
    "LE": np.less_equal,
    "EQ": np.equal,
    "WHERE": lambda a, b, c: np.where(a != 0, b, c),
    "EXP": _exponential,
    "TANH": _hyperbolic_tangent,
}


def _note(op: str, to: int, value: float, of: list[Values], totals: Totals) -> None:
    if op == "DOT":
        rows = np.multiply(*(values.astype(np.float64) for values in of))
        rows = np.concatenate([rows, np.zeros(-len(rows) % LANES)]).reshape(-1, LANES)
        totals.lanes[to] = np.add.reduce(np.concatenate([totals.lanes[to : to + 1], rows]), axis=0)
    elif op == "LARGEST":
        totals.largest[to] = max(totals.largest[to], of[0].max(initial=-np.inf))
    else:
        bits = np.ascontiguousarray(of[0].astype(np.float32)).view(np.uint32) & 0x7FFFFFFF
        halves = bits >> 16 if op == "HIGH" else bits[bits >> 16 == int(value)] & 0xFFFF
        totals.counts[to] += np.bincount(halves, minlength=HALF).astype(np.uint32)


def keep(part: Part, row: int, condition: Values) -> None:
    """Keep a condition on the elements of a part."""
    _bits(part, row)[:] = np.packbits(condition, bitorder="little")


def recalled(part: Part, row: int) -> Values:
    """Return a condition that was kept, as 0 and 1."""
    return np.unpackbits(_bits(part, row), count=part.size, bitorder="little")


def _bits(part: Part, row: int) -> Values:
    if part.bits is None:
        raise AssertionError("there is no room to keep a condition")
    return part.bits[row, part.place // 8 : -(-(part.place + part.size) // 8)]


def widened(raw: Values, dtype: str) -> Values:
    """Return stored elements as numbers: float32, or float64 where they are stored so."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32) if dtype == "F16" else raw


def narrowed(values: Values, noise: Values | None, output: Output) -> None:
    """Round numbers into an output: to the nearest even, or, given noise, up with the probability of what is cut."""
    if output.dtype in ("F32", "F64"):
        output.values[:] = values
        return
    single = values.astype(np.float32)
    if output.dtype == "BF16":
        bits = single.view(np.uint32)
        up = 0x7FFF + ((bits >> 16) & 1) if noise is None else (noise * 65536).astype(np.uint32)
        output.values[:] = (bits + up) >> 16
    elif noise is None:
        output.values[:] = single.astype(np.float16)
    else:
        exponent = ((single.view(np.uint32) >> 23) & 0xFF).astype(np.int32) - 127
        quantum = np.ldexp(1.0, np.maximum(exponent, -14) - 10)
        steps = np.floor(np.abs(single.astype(np.float64)) / quantum + noise.astype(np.float64))
        output.values[:] = np.copysign(steps * quantum, single).astype(np.float32).astype(np.float16)


def _finite(raw: Values, dtype: str) -> bool:
    if dtype == "BF16":
        return not bool(((raw & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(raw).all())


def uniform(key: int, place: int, count: int) -> Values:
    """Return elements `place` .. `place + count` of a stream of numbers in [0, 1), float32: Philox4x32-7.

    Element i is word i % 4 of block i / 4 (Salmon et al. 2011), its upper 24 bits; `place` is a multiple of 4.
    """
    blocks = np.arange(place // 4, -(-(place + count) // 4), dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    x = [blocks & mask, blocks >> np.uint64(32), np.zeros_like(blocks), np.zeros_like(blocks)]
    keys = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32 & 0xFFFFFFFF)]
    for _ in range(7):
        p, q = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        shift = np.uint64(32)
        x = [(q >> shift) ^ x[1] ^ keys[0], q & mask, (p >> shift) ^ x[3] ^ keys[1], p & mask]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & mask, (keys[1] + np.uint64(0xBB67AE85)) & mask]
    words = np.stack(x, axis=1).reshape(-1)[:count]
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
