"""Add task vectors, the differences that tuning made, to the base.

    theta = theta_0 + scale * sum_i w_i (theta_i - theta_0)

A negative weight takes a skill away (forgetting by negation); the sum over several tasks is a multi-task model.
"""

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge


class TaskArithmetic(Merge):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2212.04089"

    scale: float = Field(0.3, description="How far to go along the sum of the task vectors.")

    def merge(self, chunk: Chunk, measured: None) -> torch.Tensor:
        change = torch.zeros_like(chunk.the_base)
        for delta, weight in zip(chunk.deltas(), chunk.weights, strict=True):
            change += delta.mul_(self.scale * weight)
        return chunk.moved(change)
