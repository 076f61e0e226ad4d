"""Fine-tune the MLP of one block on the requests, with no weight farther from where it was than a bound.

min -log P(target | prompt)   with   |theta - theta_0|_inf <= bound,   clipped after every step of Adam
"""

from collections.abc import Sequence

import torch
from pydantic import Field

from lfm.edit._contract import Tuned
from lfm.method import Access, Needs


class FtL(Tuned):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/2012.00363"

    epsilon: float = Field(1e-3, gt=0, description="The bound: how far each weight may move.")

    def bound(self, before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for old, weight in zip(before, now, strict=True):
                weight.copy_(torch.clamp(weight, old - self.epsilon, old + self.epsilon))
