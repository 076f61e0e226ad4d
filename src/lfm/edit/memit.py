"""Insert many facts at once by changes of the MLPs of several blocks, each of which takes its share.

    1. z_i: what should leave the last of the blocks at the end of subject i, so that the model says target i
    2. in each block l from the first on, with what is left over R = (z - h) / (blocks from here on):
           W + R K^T (lambda (C + C_e) + K K^T)^-1,   C = E[k k^T] over ordinary text

lambda weighs what is known against what is new: one edit alone gets 1 / (1 + lambda / k^T C^-1 k) of its value. The
authors' 15,000 suits keys as rare as those of GPT-J; left out, lambda is a tenth of the mean of k^T C^-1 k. C_e are
the keys of earlier edits, a part of what is known (0 in the paper, which makes one update).
"""

import torch
from pydantic import Field

from lfm.edit._algebra import regularised_rows
from lfm.edit._contract import Layer, LeastSquares
from lfm.method import Access, Needs

SHARE = 0.1  # lambda over k^T C^-1 k, where it is not given


class Memit(LeastSquares):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/2210.07229"
    stream = True

    knowledge: float | None = Field(
        None, gt=0, description="lambda: how many keys ordinary text counts for; by the keys themselves if left out."
    )
    remember: float = Field(1.0, ge=0, description="Weight of the keys of earlier edits; 0 forgets them.")

    def rows(self, layer: Layer) -> torch.Tensor:
        weight = self.knowledge
        if weight is None:
            weight = SHARE * float((layer.keys * torch.linalg.solve(layer.covariance, layer.keys)).sum(0).mean())
        return regularised_rows(layer.keys, weight * layer.covariance + self.remember * layer.earlier)
