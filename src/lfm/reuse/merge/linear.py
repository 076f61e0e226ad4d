"""Weighted average of the weights: uniform soups, averages along a training run, federated averaging.

    theta = sum_i w_i theta_i / sum_i w_i        (without `normalize`: not divided)

With `decay`, the models are checkpoints of one run in their order, and w_i is multiplied by decay^(n - 1 - i): the last
counts most. All of these are this average:

    uniform soup    models tuned from one base with different settings, equal weights
    SWA, LAWA       the last checkpoints of one run, equal weights
    EMA             all checkpoints of one run, `decay` near 1 (with the usual correction for the start)
    FedAvg          models of clients, each weighted by how many samples it was trained on

Averaging models tuned from one base often beats each of them and costs nothing at inference. Models that share no
base lie in different valleys, and their average is as good as noise.
"""

from collections.abc import Sequence

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import combine, shares, unshareable
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array


class Linear(Elementwise):
    needs = Needs(sources=(1, None), same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2203.05482"

    normalize: bool = Field(True, description="Divide by the sum of the weights.")
    decay: float = Field(1.0, gt=0, le=1, description="Factor on the weight of a model for each one that follows it.")

    def objections(self, weights: Sequence[float]) -> list[str]:
        problems = unshareable(self._decayed(weights)) if self.normalize else []
        return [f"{problem}; --no-normalize adds them up" for problem in problems]

    def merge(self, site: Site, measured: None) -> Array:
        weights = self._decayed(site.weights)
        return combine(site.sources, shares(weights) if self.normalize else weights)

    def _decayed(self, weights: Sequence[float]) -> list[float]:
        return [weight * self.decay**age for weight, age in zip(weights, reversed(range(len(weights))), strict=True)]
