"""`Rows`: columns of equal length that know where they came from and on which side of a split they belong."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lfm.data._check import listed
from lfm.data._spec import Part
from lfm.errors import RequestError, did_you_mean, plural

Column = Sequence[Any] | NDArray[Any]
Kind = Literal["text", "instruction", "text-label", "image-label", "image", "other"]

# The first kind whose columns are all there.
KINDS: dict[Kind, frozenset[str]] = {
    "image-label": frozenset({"image", "label"}),
    "image": frozenset({"image"}),
    "instruction": frozenset({"prompt", "completion"}),
    "text-label": frozenset({"text", "label"}),
    "text": frozenset({"text"}),
}


@dataclass(frozen=True, eq=False)
class Rows:
    """Columns of equal length, with the place each row came from.

    `columns` holds lists of str for text, an int64 array or a list of str for labels, a uint8 array (rows, height,
    width) or (rows, height, width, 3) for images, and a list of such arrays for images of different sizes. Treat all
    of it as read-only. Raises RequestError where the columns differ in length.
    """

    columns: Mapping[str, Column]
    origin: str
    """The path or name shown in messages."""
    lines: Sequence[int] | None = None
    """Line of each row in its file, counted from 1; None where a file has no lines."""
    joined: str | None = None
    """What stood between neighbouring rows: a blank line for paragraphs of a text, None for separate documents."""
    positions: Sequence[int] | None = field(default=None, repr=False)
    """Place of each row in its source, counted from 0, for messages; None where it is the row's place here."""
    split_keys: NDArray[np.uint64] | None = field(default=None, repr=False)
    """What rows are split by where that is not their present content: a turned image is split as the one it was."""

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} has {size:,}" for name, size in sizes.items())
            raise RequestError(f"{self.origin}: columns differ in length: {counts}; give each row all columns")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def kind(self) -> Kind:
        """What the rows are for, from the columns present."""
        return next((kind for kind, names in KINDS.items() if names <= self.columns.keys()), "other")

    @property
    def classes(self) -> list[int] | list[str]:
        """The distinct labels, sorted. Raises RequestError where there are none."""
        if "label" not in self.columns:
            names = listed(self.columns)
            raise RequestError(f"{self.origin}: no label column, got {names}; map one with columns: {{label: <name>}}")
        return sorted(set(_values(self.columns["label"])))

    def where(self, row: int) -> str:
        """Return the place of a row as messages name it: `reviews.jsonl:12`, or `digits.npz[12]` without lines."""
        if self.lines is not None:
            return f"{self.origin}:{self.lines[row]}"
        return f"{self.origin}[{row if self.positions is None else self.positions[row]}]"

    def take(self, indices: Sequence[int] | NDArray[np.integer]) -> Rows:
        """Return the rows at `indices`, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        chosen: list[int] = index.tolist()
        return Rows(
            columns={name: _taken(column, index) for name, column in self.columns.items()},
            origin=self.origin,
            lines=None if self.lines is None else [self.lines[i] for i in chosen],
            joined=self.joined,
            positions=chosen if self.positions is None else [self.positions[i] for i in chosen],
            split_keys=None if self.split_keys is None else self.split_keys[index],
        )

    def part(self, name: Part, held_out: float = 0.1) -> Rows:
        """Return all rows, those to train on, or those held out: about the share `held_out`.

        A row is held out if the hash of its content, as a fraction of 2^64, is below `held_out`. So it never changes
        sides when rows are added, removed or shuffled, and equal rows stay together; and what is held out at 0.1 is
        held out at 0.2 too. Raises RequestError where the part would be empty.
        """
        if name not in get_args(Part):
            raise RequestError(
                f"no part {name!r}, expected {listed(get_args(Part))}{did_you_mean(name, get_args(Part))}"
            )
        if not 0 < held_out < 1:
            raise RequestError(f"held_out must lie between 0 and 1, got {held_out}")
        if name == "all":
            return self
        # Rounded up: a whole number is below the product exactly if it is below the next whole number.
        below = self.keys < np.uint64(math.ceil(held_out * 2**64))
        chosen = np.flatnonzero(below if name == "held_out" else ~below)
        if not len(chosen):
            change = "raise" if name == "held_out" else "lower"
            raise RequestError(
                f"{self.origin}: part: {name} of {plural(len(self), 'row')} is empty at held_out: {held_out}; "
                f"{change} held_out, add rows, or keep the parts in two files"
            )
        return self.take(chosen)

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """A 64-bit hash of each row's content, the same on every machine and in every order of rows and columns."""
        if self.split_keys is not None:
            return self.split_keys
        names = sorted(self.columns)
        frames = [_framed(_encoded(name)) for name in names]
        rows = zip(*(_values(self.columns[name]) for name in names), strict=True)
        return np.fromiter((_key(frames, row) for row in rows), dtype=np.uint64, count=len(self))

    @cached_property
    def digest(self) -> str:
        """sha256, in hexadecimal, of all columns, their rows in order, and what joins them."""
        digest = hashlib.sha256(_framed(_encoded(self.joined)))
        for name in sorted(self.columns):
            digest.update(_framed(_encoded(name)))
            for value in _values(self.columns[name]):
                digest.update(_framed(type(value).__name__.encode() + b":" + _encoded(value)))
        return digest.hexdigest()


def _values(column: Column) -> Sequence[Any]:
    """Return a column's values as Python's own numbers and strings; images stay arrays."""
    if isinstance(column, np.ndarray) and column.ndim == 1:
        values: list[Any] = column.tolist()
        return values
    return column  # type: ignore[return-value]  # a stack of images is iterated like a list of them


def _taken(column: Column, index: NDArray[np.int64]) -> Column:
    return column[index] if isinstance(column, np.ndarray) else [column[i] for i in index.tolist()]


def _key(frames: Sequence[bytes], row: Sequence[Any]) -> int:
    content = b"".join(frame + _framed(_encoded(_grey(value))) for frame, value in zip(frames, row, strict=True))
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _framed(content: bytes) -> bytes:
    """Return `content` after its length, so that no two sequences of frames read the same."""
    return len(content).to_bytes(8, "little") + content


def _encoded(value: Any) -> bytes:
    """Return one value as bytes: a number as the text that shows it, since a CSV file cannot tell them apart."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}".encode() + value.tobytes()
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    # Half of a surrogate pair is no text, but a file name or an unused column may hold one.
    return text.encode("utf-8", "surrogatepass")


def _grey(value: Any) -> Any:
    """Return a colour image without colours as the grey one it is.

    A folder's grey images get three channels as soon as it holds one colour image; that must not move them.
    """
    if isinstance(value, np.ndarray) and value.ndim == 3 and (value == value[..., :1]).all():
        return np.ascontiguousarray(value[..., 0])
    return value
