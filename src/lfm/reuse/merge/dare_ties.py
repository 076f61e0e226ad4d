"""Drop most of each task vector at random, then elect a sign for every weight and average the changes that agree.

The two ideas together: `dare_linear` thins the task vectors out, so that fewer of them meet in one weight, and the
election of `ties` settles what is left.

    1. drop:   tau_i = m_i o (theta_i - theta_0) / density,   m_i ~ Bernoulli(density)
    2. elect:  s = sign(sum_i w_i tau_i)
    3. merge:  tau = sum of the w_i tau_i whose sign is s, divided by the sum of their |w_i|
    4. theta = theta_0 + scale * tau        (without `normalize`: not divided in 3)

What `dare_linear` says of masks and `ties` of the election holds. mergekit does not divide in 3 unless told to, and
rescales to the L1 norm: `normalize: false, rescale: norm, rules: mergekit` is its way.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import elect_and_average
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import rescaled, restoring_factors, thinned


class DareTies(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2311.03099"
    per_source = ("density",)

    density: float = Field(0.5, ge=0, le=1, description="Share of each task vector that is kept (1 - p of the paper).")
    scale: float = Field(1.0, description="How far to go along the merged task vector.")
    normalize: bool = Field(True, description="Divide by the weights of the changes that agree.")
    rescale: Literal["expectation", "norm", "none"] = Field(
        "expectation", description="What is kept is divided by the density, or given the L1 norm of all, or left alone."
    )
    rules: Literal["paper", "mergekit"] = Field(
        "paper", description="`mergekit` elects + where signs balance, and divides by weights with their signs."
    )

    @property
    def measures(self) -> Scope:
        return "tensor" if self.rescale == "norm" else "nothing"

    def measure(self, extent: Extent) -> tuple[float, ...]:
        """Return, for each source, what its changes are multiplied by."""
        return restoring_factors(extent, lambda site: thinned(site, site.each("density"), divide=False))

    def merge(self, site: Site, measured: tuple[float, ...] | None) -> Array:
        kept = rescaled(thinned(site, site.each("density"), divide=self.rescale == "expectation"), measured)
        change = elect_and_average(kept, site.weights, divide=self.normalize, rules=self.rules)
        return site.moved(change * self.scale)
