"""Insert many facts at once by changes of the MLPs of several blocks, each of which takes its share.

    1. z_i: what should leave the last of the blocks at the end of subject i, so that the model says target i
    2. in each block l from the first on, with what is left over R = (z - h) / (blocks from here on):
           W + R K^T (lambda (C + C_e) + K K^T)^-1,   C = E[k k^T] over ordinary text

lambda weighs what is known against what is new. C_e are the keys of earlier edits, a part of what is known (0 in the
paper, which makes one update).
"""

import torch
from pydantic import Field

from lfm.edit._algebra import regularised_rows
from lfm.edit._contract import Layer, LeastSquares
from lfm.method import Access, Needs


class Memit(LeastSquares):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/2210.07229"
    stream = True

    clamp: float = Field(0.75, gt=0, description="Largest change of a value, over the length that it has.")
    knowledge: float = Field(15_000.0, gt=0, description="lambda: how many keys all of ordinary text counts for.")
    remember: float = Field(1.0, ge=0, description="Weight of the keys of earlier edits; 0 forgets them.")

    def rows(self, layer: Layer) -> torch.Tensor:
        return regularised_rows(layer.keys, self.knowledge * layer.covariance + self.remember * layer.earlier)
