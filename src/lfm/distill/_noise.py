"""Images of smooth noise: random numbers on a coarse grid, enlarged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from lfm.distill._contract import Space

BLOBS = (1, 2, 3)  # pixels


def smooth_noise(count: int, space: Space, sizes: Sequence[int] = BLOBS, scale: float = 2.0) -> torch.Tensor:
    """Return normalised images (count, channels, height, width) whose blobs have one of these sizes each, by chance.

    The numbers are normal with standard deviation `scale`, that of the data as the teacher normalises it, cut to the
    range of pixels.
    """
    counts = torch.randint(len(sizes), (count,)).bincount(minlength=len(sizes)).tolist()
    return torch.cat([_blobs(number, size, space, scale) for size, number in zip(sizes, counts, strict=True)])


def _blobs(count: int, size: int, space: Space, scale: float) -> torch.Tensor:
    channels, height, width = space.shape
    images = torch.randn(count, channels, -(-height // size), -(-width // size)) * scale
    if not count:
        images = torch.zeros(0, channels, height, width)
    elif size > 1:
        images = functional.interpolate(images, size=(height, width), mode="bicubic")
    return torch.minimum(torch.maximum(images, space.low), space.high)
