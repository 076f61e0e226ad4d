"""Dropping elements of task vectors at random and rescaling the rest (DARE)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lfm.reuse.merge._contract import Chunk


def dropped(chunk: Chunk, density: float) -> Iterator[torch.Tensor]:
    """Yield each task vector with a random share `density` of its elements kept and divided by it; the rest is 0."""
    limit = min(round(density * 2**32), 2**32 - 1)
    for index, delta in enumerate(chunk.deltas()):
        if density < 1:
            delta.masked_fill_(torch.from_numpy(chunk.random_bits(index) >= limit), 0.0)
        yield delta.div_(density)
