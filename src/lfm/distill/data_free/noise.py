"""Learn from what the teacher says of random images: the baseline that every other way has to beat.

    x = clip(sigma u),   u ~ N(0, I) on a grid of 1/smooth of the size, enlarged;   L = T^2 KL(teacher(x) || student(x))

Of a teacher of digits this teaches 60 to 88 % of what there is to learn, of one of photographs nothing (10 to 15 %).
With a `pool` each image is asked about once and stored, as if every answer had its price.
"""

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import DataFree, Scene, Synthesiser
from lfm.method import Access, Needs


class Noise(DataFree):
    needs = Needs(access=Access.PROBS, trains=True)
    paper = "https://arxiv.org/abs/1912.08987"

    kind: Literal["gaussian", "uniform"] = Field("gaussian", description="Law of the numbers.")
    smooth: list[int] = Field([1, 2, 4], description="Sizes of blobs, in pixels, drawn in equal parts; 1: none.")
    scale: float = Field(1.0, gt=0, description="Standard deviation, in that of the data as the teacher normalises it.")
    pool: int | None = Field(None, ge=1, description="Use so many images again and again; new ones if left out.")

    def synthesiser(self, scene: Scene) -> Synthesiser:
        return _Noise(self, scene)


class _Noise(Synthesiser):
    def __init__(self, method: Noise, scene: Scene) -> None:
        super().__init__()
        self._method = method
        self._scene = scene
        if method.pool is not None:
            self.tensors["pool"] = torch.cat([self._drawn() for _ in range(-(-method.pool // scene.batch_size))])

    def images(self, step: int) -> torch.Tensor:
        if self._method.pool is None:
            return self._drawn()
        return self.tensors["pool"][torch.randint(self._method.pool, (self._scene.batch_size,))]

    def _drawn(self) -> torch.Tensor:
        scene, sizes = self._scene, self._method.smooth
        counts = torch.randint(len(sizes), (scene.batch_size,)).bincount(minlength=len(sizes)).tolist()
        return torch.cat([self._blobs(size, count) for size, count in zip(sizes, counts, strict=True) if count])

    def _blobs(self, size: int, count: int) -> torch.Tensor:
        channels, height, width = self._scene.space.shape
        grid = (count, channels, max(-(-height // size), 1), max(-(-width // size), 1))
        low, high = self._scene.space.low, self._scene.space.high
        if self._method.kind == "uniform":
            small = low + torch.rand(grid) * (high - low)
        else:
            small = torch.randn(grid) * self._method.scale
        whole = functional.interpolate(small, size=(height, width), mode="bicubic") if size > 1 else small
        return whole.clamp(low, high).to(self._scene.device)
