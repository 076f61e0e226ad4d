"""Compare two merged checkpoints, weight by weight, without holding either in memory."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _checkpoints import from_bfloat16

CHUNK = 1 << 20


@dataclass
class Difference:
    """How far two checkpoints are from each other: in bfloat16 steps (ulps), and beside their change to the base."""

    weights: int = 0
    differing: int = 0
    beyond_one: int = 0
    largest_ulps: float = 0.0
    squares: float = 0.0
    ours_squares: float = 0.0
    peer_squares: float = 0.0

    def add(self, ours: np.ndarray, peer: np.ndarray, base: np.ndarray) -> None:
        """Count a chunk, given as bfloat16 bits."""
        x, y, origin = (from_bfloat16(bits) for bits in (ours, peer, base))
        ulps = np.abs(x - y) / _ulp(np.maximum(np.abs(x), np.abs(y)))
        self.weights += len(x)
        self.differing += int(np.count_nonzero(ulps))
        self.beyond_one += int(np.count_nonzero(ulps > 1))
        self.largest_ulps = float(np.max(ulps, initial=self.largest_ulps))
        self.squares += _squares(x - y)
        self.ours_squares += _squares(x - origin)
        self.peer_squares += _squares(y - origin)

    def summary(self) -> dict[str, float | None]:
        """Return shares of the weights, the largest difference, and root mean squares over that of the peer's change.

        The last two are None where the peer changed nothing.
        """
        change = math.sqrt(self.peer_squares)
        return {
            "differing": self.differing / self.weights,
            "beyond_one_ulp": self.beyond_one / self.weights,
            "largest_ulps": self.largest_ulps,
            "relative_rms": math.sqrt(self.squares) / change if change else None,
            "change_ratio": math.sqrt(self.ours_squares) / change if change else None,
        }


def compare(ours: Path, peer: Path, base: Path) -> dict[str, float | None]:
    """Return how two merges differ; ValueError if they do not hold the same bfloat16 tensors."""
    one, other, origin = (_tensors(folder) for folder in (ours, peer, base))
    if {name: shape for name, (_, _, shape) in one.items()} != {name: shape for name, (_, _, shape) in other.items()}:
        raise ValueError("the outputs hold different tensors")
    difference = Difference()
    for name, place in one.items():
        size = math.prod(place[2])
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            difference.add(*(_read(each[name], start, count) for each in (one, other, origin)))
    return difference.summary()


def _squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _ulp(size: np.ndarray) -> np.ndarray:
    """Return the distance of neighbouring bfloat16 numbers (8 significant bits) around numbers of that size."""
    _, exponent = np.frexp(size)
    return np.ldexp(np.float32(1.0), np.maximum(exponent - 8, -133))


Place = tuple[Path, int, tuple[int, ...]]


def _tensors(folder: Path) -> dict[str, Place]:
    """Return file, first byte and shape of every tensor of a checkpoint."""
    places: dict[str, Place] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path.name}: {name} is {entry['dtype']}, expected BF16")
            places[name] = (path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return places


def _read(place: Place, start: int, count: int) -> np.ndarray:
    path, first, _ = place
    return np.fromfile(path, "<u2", count, offset=first + 2 * start)
