"""Add task vectors, the differences that tuning made, to the base.

    theta = theta_0 + scale * sum_i w_i (theta_i - theta_0)        (with `normalize`: divided by sum_i w_i)

A negative weight takes a skill away (forgetting by negation); the sum over several tasks is a multi-task model; and
three models of an analogy, with weights 1, -1 and 1, give the fourth. Where the weights sum to 0, `normalize` divides
by nothing.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import combine
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array


class TaskArithmetic(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2212.04089"

    scale: float = Field(0.3, description="How far to go along the sum of the task vectors.")
    normalize: bool = Field(False, description="Divide by the sum of the weights.")

    def merge(self, site: Site, measured: None) -> Array:
        whole = sum(site.weights) if self.normalize and abs(sum(site.weights)) >= 1e-8 else 1.0
        return site.moved(combine(site.deltas, [self.scale * weight / whole for weight in site.weights]))
