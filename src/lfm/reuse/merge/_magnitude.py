"""Exact magnitude thresholds by counting, without sorting and without holding more than a chunk.

The bits of a non-negative float32, read as an integer, are in the order of its value. Counting the upper 16 bits finds
the bucket of the k-th largest magnitude, counting the lower 16 bits within that bucket finds it exactly.
"""

from __future__ import annotations

import numpy as np
import torch

from lfm.reuse.merge._contract import Chunk, Scan

HALF = 1 << 16


def smallest_kept(scan: Scan, sources: int, count: int) -> list[float]:
    """Return, for each source, the magnitude of its `count`-th largest change, in float32 (the largest, for 0)."""
    count = max(count, 1)
    upper = scan(lambda chunk: np.stack([_count(bits >> 16) for bits in _bits(chunk)]))
    buckets = [_bucket(upper[source], count) for source in range(sources)]

    def lower_halves(chunk: Chunk) -> np.ndarray:
        return np.stack(
            [
                _count(bits[bits >> 16 == bucket] & (HALF - 1))
                for bits, (bucket, _) in zip(_bits(chunk), buckets, strict=True)
            ]
        )

    lower = scan(lower_halves)
    found = [bucket * HALF + _bucket(lower[source], count - above)[0] for source, (bucket, above) in enumerate(buckets)]
    return [float(value) for value in np.array(found, dtype=np.int32).view(np.float32)]


def _bits(chunk: Chunk) -> list[np.ndarray]:
    return [(delta.float().view(torch.int32) & 0x7FFFFFFF).numpy() for delta in chunk.deltas()]


def _count(values: np.ndarray) -> np.ndarray:
    return np.bincount(values, minlength=HALF)


def _bucket(counts: np.ndarray, count: int) -> tuple[int, int]:
    """Return the bucket that holds the `count`-th largest value, and how many values lie in the buckets above it."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, count))
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0
