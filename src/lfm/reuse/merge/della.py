"""Drop changes at random, small ones more often (MAGPRUNE), elect a sign for every weight, average what agrees.

    1. drop:   of tau_i = theta_i - theta_0 keep each element with a probability p that rises with the rank of its size
               within its row, from density - epsilon to density + epsilon, and divide it by p
    2. elect:  s = sign(sum_i w_i tau_i)
    3. merge:  tau = sum of the w_i tau_i whose sign is s, divided by the sum of their |w_i|
    4. theta = theta_0 + scale * tau        (without `normalize`: not divided in 3)

`dare_ties` with an eye for size. What `della_linear` says of ranks, epsilon and masks and `ties` of the election holds.
mergekit rescales to the L1 norm instead of by 1/p: `rescale: norm, rules: mergekit` is its way.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import elect_and_average
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import rescaled, restoring_factors, shares_by_rank, thinned


class Della(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2406.11617"
    per_source = ("density", "epsilon")

    density: float = Field(0.5, ge=0, le=1, description="Share of each task vector that is kept (1 - p of the paper).")
    epsilon: float = Field(
        0.15, ge=0, le=0.5, description="How much more often than the mean the largest change of a row is kept."
    )
    scale: float = Field(1.0, description="How far to go along the merged task vector (lambda).")
    normalize: bool = Field(True, description="Divide by the weights of the changes that agree.")
    rescale: Literal["expectation", "norm", "none"] = Field(
        "expectation", description="What is kept is divided by p, or given the L1 norm of all, or left alone."
    )
    rules: Literal["paper", "mergekit"] = Field(
        "paper", description="`mergekit` elects + where signs balance, and divides by weights with their signs."
    )

    @property
    def measures(self) -> Scope:
        return "tensor" if self.rescale == "norm" else "nothing"

    def measure(self, extent: Extent) -> tuple[float, ...]:
        """Return, for each source, what its changes are multiplied by."""
        return restoring_factors(extent, lambda site: thinned(site, shares_by_rank(site), divide=False))

    def merge(self, site: Site, measured: tuple[float, ...] | None) -> Array:
        kept = rescaled(thinned(site, shares_by_rank(site), divide=self.rescale == "expectation"), measured)
        change = elect_and_average(kept, site.weights, divide=self.normalize, rules=self.rules)
        return site.moved(change * self.scale)
