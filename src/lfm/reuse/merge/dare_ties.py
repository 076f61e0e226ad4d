"""Drop most of each task vector at random, then elect a sign for every weight and average the changes that agree.

The two ideas together: `dare` thins the task vectors out, so that fewer of them meet in one weight, and the election
of `ties` settles what is left.

    1. drop:   tau_i = m_i o (theta_i - theta_0) / density,   m_i ~ Bernoulli(density)
    2. elect:  s = sign(sum_i w_i tau_i)
    3. merge:  tau = sum of the w_i tau_i whose sign is s, divided by the sum of their |w_i|
    4. theta = theta_0 + scale * tau
"""

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import elect_and_average
from lfm.reuse.merge._contract import Chunk, Merge
from lfm.reuse.merge._drop import dropped


class DareTies(Merge):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2311.03099"
    random = True

    density: float = Field(0.5, gt=0, le=1, description="Share of each task vector that is kept (1 - p of the paper).")
    scale: float = Field(1.0, description="How far to go along the merged task vector.")

    def merge(self, chunk: Chunk, measured: None) -> torch.Tensor:
        deltas = list(dropped(chunk, self.density))
        return chunk.moved(elect_and_average(deltas, chunk.weights).mul_(self.scale))
