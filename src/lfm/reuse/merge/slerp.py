"""Spherical interpolation between two models: along the arc, not the chord, so that norms do not shrink halfway.

For each tensor, flattened, with angle phi between a and b:

    theta = sin((1 - t) phi) / sin(phi) a + sin(t phi) / sin(phi) b

Where a and b are parallel or opposite to within 1e-6 there is no arc, and this is (1 - t) a + t b. A tensor of zeros
has no direction and counts as at right angles to the other. Fine-tunes of one base are nearly parallel, so there it
differs little from an average; `nuslerp` with a base takes the arc between their task vectors.

mergekit's `base_model` is the first model here. It goes straight already where |cos phi| > 0.9995, which is the case
for most siblings of one base: `straight_from: 0.9995` gives its numbers.
"""

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import Products, arc, combine, cosines, inner_products
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array


class Slerp(Elementwise):
    needs = Needs(sources=(2, 2), same_architecture=True, same_tokenizer=True)
    paper = "https://dl.acm.org/doi/10.1145/325334.325242"
    weighted = False

    t: float = Field(0.5, ge=-1, le=2, description="Where on the arc: 0 is the first model, 1 the second.")
    straight_from: float = Field(1.0, gt=0, le=1, description="Go straight where |cosine| is above this.")

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, extent: Extent) -> Products:
        """Return the inner products between the models."""
        return inner_products(extent, lambda site: site.sources)

    def merge(self, site: Site, measured: Products) -> Array:
        cosine = cosines(np.array(measured))[0, 1]
        one, two = arc(self.t, cosine, straight_from=self.straight_from)
        return combine(site.sources, (float(one), float(two)))
