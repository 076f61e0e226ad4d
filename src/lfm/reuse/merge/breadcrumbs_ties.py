"""Keep the middle of each task vector, elect a sign for every weight, and average the changes that agree.

`breadcrumbs` with the election of `ties`: of tau_i = theta_i - theta_0, for each tensor,

    1. drop the share `outliers` of largest |tau_i|, and keep the share `density` that comes next; the rest becomes 0
    2. elect:  s = sign(sum_i w_i tau_i)
    3. merge:  tau = sum of the w_i tau_i whose sign is s, divided by the sum of their |w_i|
    4. theta = theta_0 + scale * tau        (without `normalize`: not divided in 3)

For several sources whose tasks are at odds. What `breadcrumbs` says of shares and `ties` of the election holds. The
combination is mergekit's, which does not divide unless told to: `normalize: false, rules: mergekit` gives its numbers.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import elect_and_average
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import Band, middle_bands, within


class BreadcrumbsTies(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2312.06795"
    per_source = ("density", "outliers")

    density: float = Field(0.9, ge=0, le=1, description="Share of the changes that is kept.")
    outliers: float = Field(0.01, ge=0, le=1, description="Share of the largest changes that is dropped (gamma).")
    scale: float = Field(1.0, description="How far to go along the merged task vector.")
    normalize: bool = Field(True, description="Divide by the weights of the changes that agree.")
    scope: Literal["tensor", "layer", "global"] = Field(
        "tensor", description="Make the masks tensor by tensor, layer by layer, or for the model as a whole."
    )
    rescale: Literal["none", "norm"] = Field(
        "none", description="`norm` gives what is kept the L1 norm that the task vector had in the scope."
    )
    rules: Literal["paper", "mergekit"] = Field(
        "paper", description="`mergekit` elects + where signs balance, and divides by weights with their signs."
    )

    @property
    def measures(self) -> Scope:
        return self.scope

    def measure(self, extent: Extent) -> tuple[Band, ...]:
        """Return, for each source, the sizes of the changes that are kept."""
        return middle_bands(extent, rescale=self.rescale == "norm")

    def merge(self, site: Site, measured: tuple[Band, ...]) -> Array:
        kept = within(site, measured)
        change = elect_and_average(kept, site.weights, divide=self.normalize, rules=self.rules)
        return site.moved(change * self.scale)
