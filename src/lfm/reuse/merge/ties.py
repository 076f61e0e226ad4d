"""Trim each task vector to its largest changes, elect a sign for every weight, and average the changes that agree.

    1. trim:   keep the `density` share (rounded down) of largest |tau_i|, tau_i = theta_i - theta_0; the rest becomes 0
    2. elect:  s = sign(sum_i w_i tau_i)
    3. merge:  tau = sum of the w_i tau_i whose sign is s, divided by the sum of their |w_i|
    4. theta = theta_0 + scale * tau        (without `normalize`: not divided in 3)

For models of different tasks: what one of them changed little, or against the others, does not spoil the rest.
Trimming looks at the task vector as a whole, as in the paper; `scope: tensor` trims every tensor to the same density
instead, as mergekit does, and `scope: layer` every layer. All elements as large as the smallest one kept are kept
(mergekit keeps as many as asked for, whichever). Where the sum in 2 is exactly 0, nothing is elected and the base's
weight stays; mergekit elects + there, and divides by weights with their signs, so that a negative weight cancels
itself: `rules: mergekit`. Its `rescale` is `rescale: norm`.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import elect_and_average
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import Band, bands, number_kept, within


class Ties(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2306.01708"
    per_source = ("density",)

    density: float = Field(0.2, ge=0, le=1, description="Share of each task vector that is kept.")
    scale: float = Field(1.0, description="How far to go along the merged task vector (lambda of the paper).")
    normalize: bool = Field(True, description="Divide by the weights of the changes that agree.")
    scope: Literal["global", "layer", "tensor"] = Field(
        "global", description="Trim the model as a whole, layer by layer, or tensor by tensor."
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
        kept = [number_kept(density, extent.size) for density in extent.each("density")]
        return bands(extent, [0] * len(kept), kept, rescale=self.rescale == "norm")

    def merge(self, site: Site, measured: tuple[Band, ...]) -> Array:
        trimmed = within(site, measured)
        change = elect_and_average(trimmed, site.weights, divide=self.normalize, rules=self.rules)
        return site.moved(change * self.scale)
