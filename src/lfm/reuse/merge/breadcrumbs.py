"""Keep the middle of each task vector: neither the few largest changes nor the many small ones.

For each tensor, with its changes tau_i = theta_i - theta_0 in the order of their size:

    1. drop the share `outliers` of the largest
    2. keep the share `density` that comes next; the rest becomes 0
    3. theta = theta_0 + scale * sum_i w_i tau_i

The largest changes are often artefacts of one task and the smallest noise; without both there is room for many tasks.
Shares are of all elements, rounded down. Where they add up to more than 1, fewer outliers are dropped, and at density 1
none. Changes as large as the smallest or the largest one kept are kept too (mergekit keeps as many as asked for,
whichever). In the paper's terms `outliers` is gamma and `density` is 1 - beta - gamma. Its masks are made tensor by
tensor; `scope` makes them for layers or the whole model. mergekit's `rescale` is `rescale: norm`.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import weighted_sum
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import Band, middle_bands, within


class Breadcrumbs(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2312.06795"
    per_source = ("density", "outliers")

    density: float = Field(0.9, ge=0, le=1, description="Share of the changes that is kept.")
    outliers: float = Field(0.01, ge=0, le=1, description="Share of the largest changes that is dropped (gamma).")
    scale: float = Field(0.3, description="How far to go along the sum of the task vectors.")
    normalize: bool = Field(False, description="Divide the sum by that of the weights.")
    scope: Literal["tensor", "layer", "global"] = Field(
        "tensor", description="Make the masks tensor by tensor, layer by layer, or for the model as a whole."
    )
    rescale: Literal["none", "norm"] = Field(
        "none", description="`norm` gives what is kept the L1 norm that the task vector had in the scope."
    )

    @property
    def measures(self) -> Scope:
        return self.scope

    def measure(self, extent: Extent) -> tuple[Band, ...]:
        """Return, for each source, the sizes of the changes that are kept."""
        return middle_bands(extent, rescale=self.rescale == "norm")

    def merge(self, site: Site, measured: tuple[Band, ...]) -> Array:
        kept = within(site, measured)
        return site.moved(weighted_sum(kept, site.weights, divide=self.normalize) * self.scale)
