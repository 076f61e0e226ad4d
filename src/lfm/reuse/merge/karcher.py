"""Mean direction of any number of models on the sphere, weighted, with the mean of their lengths.

For each tensor, flattened, with w divided by its sum and u_i = theta_i / |theta_i|: the Karcher mean m is the point of
the unit sphere with the least sum of w_i angle(m, u_i)^2, found by steps

    tau = sum_i w_i phi_i / sin(phi_i) (u_i - cos(phi_i) m),     phi_i = angle(m, u_i)
    m = cos(|tau|) m + sin(|tau|) tau / |tau|                    until |tau| < `tol`, at most `max_iter` times
    theta = (sum_i w_i |theta_i|) m

from the normalised mean of the u_i. For two models it is `slerp`. m is a combination of the models, so the steps are
taken on its coefficients, with nothing but the inner products between the models. Where the directions balance out
there is no mean direction, and this is the weighted average; tensors of zeros have no direction and only shorten.

mergekit takes no weights, starts from the first model where directions balance out, and gives zeros where all lengths
are below `tol`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import Products, combine, cosines, inner_products, shares, unshareable
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array

Values = np.ndarray[Any, Any]


class Karcher(Elementwise):
    needs = Needs(sources=(1, None), same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2603.04972"

    max_iter: int = Field(10, ge=0, description="Most steps towards the mean direction.")
    tol: float = Field(1e-5, gt=0, description="Length of a step, and angle, that counts as nothing.")

    def objections(self, weights: Sequence[float]) -> list[str]:
        if min(weights, default=0.0) < 0:
            return [f"weights of a mean direction are not negative, got {list(weights)}"]
        return unshareable(weights)

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, extent: Extent) -> Products:
        """Return the inner products between the models."""
        return inner_products(extent, lambda site: site.sources)

    def merge(self, site: Site, measured: Products) -> Array:
        return combine(site.sources, self._coefficients(np.array(measured), np.array(shares(site.weights))))

    def _coefficients(self, products: Values, weights: Values) -> Values:
        norms = np.sqrt(products.diagonal())
        directed = norms > 0
        among = cosines(products)
        np.fill_diagonal(among, directed)
        pull = weights * directed
        length = np.sqrt(max(pull @ among @ pull, 0.0))
        if length < self.tol * pull.sum() or not length:
            return weights
        mean = self._mean(among, pull / pull.sum(), pull / length)
        found: Values = weights @ norms * mean / np.where(directed, norms, 1.0)
        return found

    def _mean(self, among: Values, pull: Values, mean: Values) -> Values:
        """Return the mean direction as coefficients of the u_i, whose cosines are `among`."""
        for _ in range(self.max_iter):
            cosine = np.clip(among @ mean, -1, 1)
            angle = np.arccos(cosine)
            sine = np.sin(angle)
            seen = (angle >= self.tol) & (sine > 1e-6)  # in the opposite direction, no way is the shortest
            step = pull * np.where(seen, angle, 0.0) / np.where(seen, sine, 1.0)
            step = step - (step @ cosine) * mean
            length = np.sqrt(max(step @ among @ step, 0.0))
            if length < self.tol:
                break
            mean = np.cos(length) * mean + np.sin(length) * step / length
            mean /= np.sqrt(mean @ among @ mean)
        return mean
