"""What a method may find out about a tensor, a layer or all of them before it decides on single elements.

The k-th largest magnitude is found by counting, without sorting and without holding more than a chunk: the bits of a
non-negative float32, read as an integer, are in the order of its value. Counting the upper halves finds the bucket of
the k-th largest; counting the lower halves within that bucket finds it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm.reuse.merge._contract import Site
from lfm.reuse.merge._layout import Target
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._machine.kernels import HALF, Output, Totals
from lfm.reuse.merge._machine.program import Kept, Wanted, compile_program
from lfm.reuse.merge._stream import Stream

Values = np.ndarray[Any, Any]
SMALL = 1 << 16  # elements; so many are looked at directly, which beats counting
BATCH = 1 << 22  # elements that one thread looks at before its counts are added to those of others
Look = Callable[[Site], Sequence[Array]]


@dataclass
class TensorExtent:
    """One tensor, or several: see `Extent` in `_contract`."""

    stream: Stream
    targets: Sequence[Target]
    pool: ThreadPoolExecutor | None = None
    kept: Kept | None = None  # of the one tensor, if it is one

    @property
    def sources(self) -> int:
        return len(self.targets[0].sources)

    @property
    def size(self) -> int:
        return sum(target.spec.size for target in self.targets)

    def each(self, name: str) -> tuple[Any, ...]:
        return self.stream.site(self.targets[0]).each(name)

    def total(self, of: Callable[[Site], Sequence[tuple[Array, Array]]]) -> Values:
        def look(target: Target) -> Values:
            return self._scan(target, Wanted(products=of(self.stream.site(target)), kept=self.kept)).products

        # In the order of the tensors, whatever the order in which they were done.
        found: Values = np.add.accumulate(np.stack(self._map(look, self.targets)), axis=0)[-1]
        return found

    def largest(self, of: Look) -> Values:
        def look(target: Target) -> Values:
            return self._scan(target, Wanted(largest=of(self.stream.site(target)))).largest

        found: Values = np.max(np.stack(self._map(look, self.targets)), axis=0)
        return found

    def kth_largest(self, of: Look, ranks: Sequence[int]) -> list[float]:
        size = self.size
        asked = [index for index, rank in enumerate(ranks) if 0 < rank < size]
        found = [float("inf") if rank <= 0 else 0.0 for rank in ranks]
        if not asked:
            return found

        def wanted(site: Site) -> list[Array]:
            arrays = of(site)
            return [arrays[index] for index in asked]

        few = [ranks[index] for index in asked]
        values = self._by_partition(wanted, few) if size <= SMALL else self._by_counting(wanted, few)
        for index, value in zip(asked, values, strict=True):
            found[index] = value
        return found

    # --- how

    def _scan(self, target: Target, wanted: Wanted) -> Totals:
        program = compile_program(wanted)
        totals = Totals.of(program)
        self.stream.scan(target, program, totals, kept=wanted.kept)
        if wanted.kept is not None:
            wanted.kept.filled.update(program.keeps)
        return totals

    def _by_partition(self, of: Look, ranks: Sequence[int]) -> list[float]:
        parts: list[list[Values]] = [[] for _ in ranks]
        for target in self.targets:
            site = self.stream.site(target)
            for index, array in enumerate(of(site)):
                key = (
                    ("size", array) if site.base is not None and array in site.deltas else None
                )  # what all tensors share is made once
                program = self.stream.program(key, lambda array=array: Wanted(abs(array)))  # type: ignore[misc]
                out = Output(np.empty(target.spec.size, np.float32), "F32")
                self.stream.scan(target, program, Totals.of(program), out)
                parts[index].append(out.values)
        joined = [np.concatenate(part) for part in parts]
        return [
            float(np.partition(values, len(values) - rank)[len(values) - rank])
            for values, rank in zip(joined, ranks, strict=True)
        ]

    def _by_counting(self, of: Look, ranks: Sequence[int]) -> list[float]:
        seen: dict[Array, int] = {}  # several ranks may be asked of one array: it is counted once
        place = [seen.setdefault(array, len(seen)) for array in of(self.stream.site(self.targets[0]))]
        once = [place.index(number) for number in range(len(seen))]
        upper = self._count(lambda site: Wanted(high=[of(site)[index] for index in once]))
        buckets = [_bucket(upper[number], rank) for number, rank in zip(place, ranks, strict=True)]
        lower = self._count(
            lambda site: Wanted(low=[(array, bucket) for array, (bucket, _) in zip(of(site), buckets, strict=True)])
        )
        bits = [
            bucket * HALF + _bucket(counts, rank - above)[0]
            for counts, rank, (bucket, above) in zip(lower, ranks, buckets, strict=True)
        ]
        return [float(value) for value in np.array(bits, dtype=np.uint32).view(np.float32)]

    def _count(self, wanted: Callable[[Site], Wanted]) -> Values:
        """Return counts over all tensors: sums of integers, so that no order shows."""
        key = object()

        def look(batch: Sequence[Target]) -> Values:
            totals: Totals | None = None
            for target in batch:
                site = self.stream.site(target)
                program = self.stream.program((key, site), lambda site=site: wanted(site))  # type: ignore[misc]
                totals = Totals.of(program) if totals is None else totals
                self.stream.scan(target, program, totals)
            if totals is None:
                raise AssertionError("a batch holds a tensor at least")
            return totals.counts.astype(np.int64)

        batches = _batches(self.targets)
        found: Values | None = None
        for counts in map(look, batches) if self.pool is None else self.pool.map(look, batches):
            found = counts if found is None else np.add(found, counts, out=found)
        return np.zeros((0, HALF), np.int64) if found is None else found

    def _map(self, look: Callable[[Any], Values], items: Sequence[Any]) -> list[Values]:
        if self.pool is None or len(items) == 1:
            return [look(item) for item in items]
        return list(self.pool.map(look, items))


def _batches(targets: Sequence[Target]) -> list[list[Target]]:
    found: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if size + target.spec.size > BATCH and found[-1]:
            found.append([])
            size = 0
        found[-1].append(target)
        size += target.spec.size
    return found


def _bucket(counts: Values, rank: int) -> tuple[int, int]:
    """Return the bucket that holds the `rank`-th largest value, and how many values lie in the buckets above it."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, rank))
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0
