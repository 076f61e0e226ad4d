"""For every weight, take the change of the model that changed it most.

    tau = w_j tau_j  with  j = argmax_i |w_i tau_i|,   tau_i = theta_i - theta_0
    theta = theta_0 + scale * tau

Made for models tuned one after the other, each from the last: late changes of what mattered are kept. Where two
changes are equally large, the one of the earlier model in the list is taken.
"""

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge


class Magmax(Merge):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2407.06322"

    scale: float = Field(0.5, description="How far to go along the merged task vector (lambda of the paper).")

    def merge(self, chunk: Chunk, measured: None) -> torch.Tensor:
        largest = torch.zeros_like(chunk.the_base)
        for delta, weight in zip(chunk.deltas(), chunk.weights, strict=True):
            delta *= weight
            torch.where(delta.abs() > largest.abs(), delta, largest, out=largest)
        return chunk.moved(largest.mul_(self.scale))
