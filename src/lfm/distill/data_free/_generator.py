"""A network that makes images of any size out of random numbers: a projection, two enlargements, three convolutions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from lfm.distill._contract import Space


class Generator(nn.Module):
    """Latent vectors (batch, latent) to images in a space, as the generators of the papers (after DCGAN) do.

    It ends in a batch norm without weights and a sigmoid over the range of the pixels (`range`: what it makes at first
    is grey), in a sigmoid alone (`free`), or in a batch norm that is cut to that range (`norm`: images have the mean
    and the contrast that the teacher's input is normalised to).
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, space: Space, latent: int, width: int, end: Literal["range", "free", "norm"] = "range") -> None:
        super().__init__()
        channels, height, breadth = space.shape
        self.latent, self.end = latent, end
        self.sizes = [(-(-height // cut), -(-breadth // cut)) for cut in (4, 2, 1)]
        self.width = width
        self.project = nn.Linear(latent, width * self.sizes[0][0] * self.sizes[0][1])
        self.first = nn.BatchNorm2d(width)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in ((width, width), (width, max(width // 2, 1)), (max(width // 2, 1), channels))
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(max(width // 2, 1))])
        self.last = nn.BatchNorm2d(channels, affine=False)
        self.register_buffer("low", space.low.clone(), persistent=False)
        self.register_buffer("high", space.high.clone(), persistent=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.image(self.raw(z))

    def raw(self, z: torch.Tensor) -> torch.Tensor:
        """Return what `image` brings into the range of pixels: a step in it, however large, stays an image."""
        x = self.first(self.project(z).view(len(z), self.width, *self.sizes[0]))
        for conv, norm, size in zip(self.convs, self.norms, self.sizes[1:], strict=False):
            x = functional.leaky_relu(norm(conv(functional.interpolate(x, size=size))), 0.2)
        found: torch.Tensor = self.convs[-1](x)
        if self.end != "free":
            found = self.last(found.tanh() if self.end == "norm" else found)
        return found

    def image(self, raw: torch.Tensor) -> torch.Tensor:
        """Return normalised images from what `raw` gives."""
        if self.end == "norm":
            return torch.minimum(torch.maximum(raw, self.low), self.high)
        return self.low + raw.sigmoid() * (self.high - self.low)


def latents(count: int, generator: Generator, device: torch.device) -> torch.Tensor:
    """Return random inputs of a generator."""
    return torch.randn(count, generator.latent).to(device)
