"""Drop most of each task vector at random and rescale the rest: task vectors are so redundant that little is lost.

    theta = theta_0 + scale * sum_i w_i m_i o (theta_i - theta_0) / density,      m_i ~ Bernoulli(density)

Which elements are kept has nothing to do with their magnitude (compare `ties`); the expectation is that of
`task_arithmetic`. The masks depend on the seed, the tensor's name and the source's content alone: not on the order of
the sources, the threads, or how the checkpoint is split into files.
"""

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge
from lfm.reuse.merge._drop import dropped


class Dare(Merge):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2311.03099"
    random = True

    density: float = Field(0.5, gt=0, le=1, description="Share of each task vector that is kept (1 - p of the paper).")
    scale: float = Field(1.0, description="How far to go along the sum of the task vectors.")

    def merge(self, chunk: Chunk, measured: None) -> torch.Tensor:
        change = torch.zeros_like(chunk.the_base)
        for delta, weight in zip(dropped(chunk, self.density), chunk.weights, strict=True):
            change += delta.mul_(self.scale * weight)
        return chunk.moved(change)
