"""Weighted average of the weights: a uniform soup when all weights are equal.

    theta = sum_i w_i theta_i / sum_i w_i        (without `normalize`: not divided)

Averaging models tuned from one base often beats each of them and costs nothing at inference. Models that share no
base lie in different valleys, and their average is as good as noise.
"""

from collections.abc import Sequence

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge


class Linear(Merge):
    needs = Needs(sources=(1, None), same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2203.05482"

    normalize: bool = Field(True, description="Divide by the sum of the weights.")

    def objections(self, weights: Sequence[float]) -> list[str]:
        if self.normalize and not abs(sum(weights)) > 1e-6 * sum(abs(weight) for weight in weights):
            return [f"weights that sum to 0 cannot be normalised, got {list(weights)}; --no-normalize adds them up"]
        return []

    def merge(self, chunk: Chunk, measured: None) -> torch.Tensor:
        total = sum(chunk.weights) if self.normalize else 1.0
        merged = chunk.sources[0].mul_(chunk.weights[0] / total)
        for source, weight in zip(chunk.sources[1:], chunk.weights[1:], strict=True):
            merged += source.mul_(weight / total)
        return merged
