"""Learn from what the teacher says of random images: the baseline that every other way has to beat.

    x = clip(scale u),   u ~ N(0, I) on a grid of 1/smooth of the size, enlarged;   L = T^2 KL(teacher(x) || student(x))

Of a teacher of digits (8 x 8 pixels) this teaches 94 % in 1,200 steps, if the rate is high and the noise strong: with a
rate of 1e-3 and scale 1 it is 52 %. Of one of photographs it teaches nothing (10 to 15 %). With a `pool` each image is
asked about once and stored, as if every answer had its price.
"""

import torch
from pydantic import Field

from lfm.distill._contract import DataFree, Scene, Synthesiser
from lfm.distill._noise import smooth_noise
from lfm.method import Access, Needs


class Noise(DataFree):
    needs = Needs(access=Access.PROBS, trains=True)
    paper = "https://arxiv.org/abs/1912.08987"

    learning_rate: float = Field(1e-2, ge=0, description="Peak learning rate of AdamW.")
    smooth: list[int] = Field([1, 2, 3], min_length=1, description="Sizes of blobs in pixels, in equal parts; 1: none.")
    scale: float = Field(2.0, gt=0, description="Standard deviation, in that of the data as the teacher normalises it.")
    pool: int | None = Field(None, ge=1, description="Use so many images again and again; new ones if left out.")

    def synthesiser(self, scene: Scene) -> Synthesiser:
        return _Noise(self, scene)


class _Noise(Synthesiser):
    def __init__(self, method: Noise, scene: Scene) -> None:
        super().__init__()
        self._method, self._scene = method, scene
        if method.pool is not None:
            self.tensors["pool"] = self._drawn(method.pool)

    def images(self, step: int) -> torch.Tensor:
        if self._method.pool is None:
            return self._drawn(self._scene.batch_size)
        return self.tensors["pool"][torch.randint(self._method.pool, (self._scene.batch_size,))]

    def samples(self, count: int) -> torch.Tensor:
        return self._drawn(count) if self._method.pool is None else self.tensors["pool"][:count]

    def _drawn(self, count: int) -> torch.Tensor:
        method, scene = self._method, self._scene
        return smooth_noise(count, scene.space, method.smooth, method.scale).to(scene.device)
