"""Safetensors headers, read as if somebody hostile had written them.

The format: 8 bytes with the header's length (little endian), that much JSON
`{name: {"dtype": ..., "shape": [...], "data_offsets": [start, stop]}}`, then the bytes, without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from lfm.errors import RequestError, UnsafeError

MAX_HEADER = 100_000_000  # the reference implementation's own limit
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
FLOATING = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Spec:
    """One tensor as a header describes it: dtype (safetensors' name) and shape; where its bytes lie, if anywhere."""

    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_BITS[self.dtype] // 8

    @property
    def floating(self) -> bool:
        """Whether arithmetic on it means something: a plain floating-point type, not integers, flags or 8-bit codes."""
        return self.dtype in FLOATING

    def same_as(self, other: Spec) -> bool:
        return self.shape == other.shape and self.floating == other.floating

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> tuple[dict[str, Spec], dict[str, str]]:
    """Return the tensors (in the order of their bytes) and the metadata of one safetensors file.

    Reads the header only. Raises UnsafeError for anything that is not exactly what the format allows.
    """
    try:
        return _read(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None


def _read(path: Path) -> tuple[dict[str, Spec], dict[str, str]]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise UnsafeError(f"{path}: not a safetensors file: {size} bytes, the header alone takes 8 or more")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, size - 8):
            raise UnsafeError(
                f"{path}: not a safetensors file, or cut off: its header claims {length:,} bytes, the file has {size:,}"
            )
        raw = file.read(length)
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeError(f"{path}: header: __metadata__ must map strings to strings")
    return _layout(path, header, 8 + length, size), metadata


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise UnsafeError(f"{path}: not a safetensors file: its header is no JSON object")
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_int=_natural, parse_constant=_impossible
        )
    except (ValueError, RecursionError) as error:
        raise UnsafeError(f"{path}: the safetensors header cannot be understood: {error}") from None
    if not isinstance(header, dict):
        raise AssertionError("a text that starts with { is a JSON object")
    return header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands in it twice")
    for text in (*names, *names.values()):
        if isinstance(text, str):
            text.encode()  # half a surrogate pair is no Unicode: a ValueError
    return names


def _natural(digits: str) -> int:
    if len(digits) > 18 or digits[0] == "-":
        _impossible(digits)
    return int(digits)


def _impossible(number: str) -> NoReturn:
    raise ValueError(f"impossible number {number[:40]}")


def _layout(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, Spec]:
    """Check that the tensors tile the rest of the file exactly, and return them in file order."""
    entries = [(*_entry(path, name, value), name) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry[0], entry[1], entry[3]))
    position, specs = 0, {}
    for begin, end, spec, name in entries:
        if begin != position:
            raise UnsafeError(
                f"{path}: tensor {name[:80]!r} starts at byte {begin:,} where {position:,} was due: hole or overlap"
            )
        position = end
        specs[name] = Spec(spec.dtype, spec.shape, path, start + begin)
    if start + position != size:
        raise UnsafeError(
            f"{path}: the header describes {start + position:,} bytes, the file has {size:,}: "
            f"{'cut off' if start + position > size else 'bytes that belong to no tensor'}; download or save it again"
        )
    return specs


def _entry(path: Path, name: str, value: Any) -> tuple[int, int, Spec]:
    def refuse(why: str) -> UnsafeError:
        return UnsafeError(f"{path}: tensor {name[:80]!r}: {why}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise refuse(f"unknown dtype {str(dtype)[:80]!r}")
    if not _naturals(shape) or _too_large(shape):
        raise refuse(f"impossible shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"impossible data_offsets {str(offsets)[:80]}")
    spec = Spec(dtype, tuple(shape))
    if spec.size * ITEM_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise refuse(f"{spec} takes {spec.nbytes:,} bytes, its data_offsets span {offsets[1] - offsets[0]:,}")
    return offsets[0], offsets[1], spec


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _too_large(shape: list[int]) -> bool:
    """Whether strides of this shape overflow, even if it has no elements; stops at the first axis that is too much."""
    total = 1
    for extent in shape:
        total *= max(extent, 1)
        if total >= 2**60:
            return True
    return False


def write_header(specs: Mapping[str, Spec], names: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header bytes, and each tensor's offset in the file, for tensors laid end to end."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in names:
        spec = specs[name]
        if name in entries:
            raise RequestError(f"no tensor can be called {name!r} in a safetensors file")
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        starts[name] = position
        position += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start aligned, so that a reader may map them
    header = struct.pack("<Q", len(raw)) + raw
    return header, {name: len(header) + start for name, start in starts.items()}
