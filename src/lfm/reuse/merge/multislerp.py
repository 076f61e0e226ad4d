"""Average the directions of any number of models, and their lengths: `slerp` for more than two, in one step.

For each tensor, flattened, with x_i = theta_i, or theta_i - theta_0 where a base is given, and w divided by its sum:

    m = sum_i w_i x_i / |x_i|
    theta = (sum_i w_i |x_i|) m / |m|        (+ theta_0)

A plain average is shorter than what it averages, the more so the wider the angles; this one is not. Where the
directions balance out (|m| < `eps`, or below 1e-6 of the weights, where it is but rounding) it is the weighted sum of
the x_i, and so it is 0 where all are. `karcher` looks for the mean direction in the sense of angles, of which this is
the starting point.

mergekit's description has a further step, projecting onto the tangent space at m and back: the projections sum to 0
whatever the weights, so it changes nothing but rounding. Where more than two directions balance out, mergekit stops, as
it does with frozen tensors of three models and a base. It also adds 1e-8 to each |x_i| that divides.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import Products, combine, inner_products, placed, points, shares, unshareable
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array

Values = np.ndarray[Any, Any]
ROUNDING = 1e-6  # a sum of directions that is smaller has none: not in float32, nor as the root of a sum of products


class Multislerp(Elementwise):
    needs = Needs(sources=(1, None), same_architecture=True, same_tokenizer=True)
    paper = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    takes_base = True

    normalize: bool = Field(True, description="Divide the weights by their sum.")
    eps: float = Field(1e-8, gt=0, description="Length of m below which directions balance out.")

    def objections(self, weights: Sequence[float]) -> list[str]:
        problems = unshareable(weights) if self.normalize else []
        return [f"{problem}; --no-normalize takes them as they are" for problem in problems]

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, extent: Extent) -> Products:
        """Return the inner products between the models, or their task vectors."""
        return inner_products(extent, points)

    def merge(self, site: Site, measured: Products) -> Array:
        return placed(site, combine(points(site), self._coefficients(np.array(measured), site.weights)))

    def _coefficients(self, products: Values, given: Sequence[float]) -> Values:
        if len(given) == 1:
            return np.ones(1)
        weights = np.array(shares(given) if self.normalize else given)
        norms = np.sqrt(products.diagonal())
        directions = weights / np.where(norms > 0, norms, np.inf)
        length = math.sqrt(max(float(directions @ products @ directions), 0.0))
        balanced = length < max(self.eps, ROUNDING * float(np.abs(weights).sum()))
        found: Values = weights if balanced else weights @ norms * directions / length
        return found
