"""Trim each task vector to its largest changes, elect a sign for every weight, and average the changes that agree.

    1. trim:   keep the `density` share (rounded down) of largest |tau_i|, tau_i = theta_i - theta_0; the rest becomes 0
    2. elect:  s = sign(sum_i w_i tau_i)
    3. merge:  tau = sum of the w_i tau_i whose sign is s, divided by the sum of their |w_i|
    4. theta = theta_0 + scale * tau

Trimming looks at the task vector as a whole, as in the paper (`scope: model`); `scope: tensor` trims every tensor to
the same density instead. All elements as large as the smallest one kept are kept. Where the sum in 2 is exactly 0,
nothing is elected and the base's weight stays.
"""

from typing import Literal

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import elect_and_average
from lfm.reuse.merge._contract import Chunk, Merge, Scan, Scope
from lfm.reuse.merge._magnitude import smallest_kept


class Ties(Merge):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2306.01708"

    density: float = Field(0.2, gt=0, le=1, description="Share of each task vector that is kept.")
    scale: float = Field(1.0, description="How far to go along the merged task vector (lambda of the paper).")
    scope: Literal["model", "tensor"] = Field("model", description="Trim the model as a whole, or tensor by tensor.")

    @property
    def measures(self) -> Scope:
        return "nothing" if self.density == 1 else self.scope

    def measure(self, scan: Scan, sources: int, size: int) -> list[float]:
        return smallest_kept(scan, sources, int(self.density * size))

    def merge(self, chunk: Chunk, measured: list[float] | None) -> torch.Tensor:
        deltas = list(chunk.deltas())
        if measured is not None:
            for delta, least in zip(deltas, measured, strict=True):
                delta *= delta.float().abs().ge_(least)
        return chunk.moved(elect_and_average(deltas, chunk.weights).mul_(self.scale))
