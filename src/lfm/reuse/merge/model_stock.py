"""Go from the base towards the average of its fine-tunes, as far as the angle between them says.

For each tensor, with N fine-tunes and c the mean cosine between two of their task vectors:

    t = N c / (1 + (N - 1) c)
    theta = (1 - t) theta_0 + t mean_i theta_i

Fine-tunes scatter around a centre; the wider their angle, the further the average still is from it, on the other side
from the base. A mean cosine below 0 counts as 0: such a tensor keeps the base's weights. A task vector of zeros counts
as at right angles to the others. `filter_wise` finds a t for every row (all axes but the first) instead of one for the
tensor.

mergekit takes a negative c as it is and so moves away from the average (`extrapolate`), and divides by no product of
two norms below 1e-6, so that small changes look at right angles (`least_product: 1e-6`). Its rows of tensors with more
than two axes run along the last axis alone.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import Products, inner_products
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site, Whole
from lfm.reuse.merge._machine.array import Array, total
from lfm.reuse.merge._rows import combine_rows, move

Values = np.ndarray[Any, Any]


class ModelStock(Elementwise):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2403.19522"
    weighted = False

    filter_wise: bool = Field(False, description="Find how far to go for every row instead of every tensor.")
    extrapolate: bool = Field(False, description="Go away from an average of fine-tunes that point apart.")
    least_product: float = Field(0.0, ge=0, description="Least product of two norms that divides.")

    @property
    def measures(self) -> Scope:
        return "tensor"

    @property
    def takes(self) -> Literal["elements", "rows", "tensors"]:
        return "rows" if self.filter_wise else "elements"

    def measure(self, extent: Extent) -> Products:
        """Return the inner products between the task vectors."""
        return inner_products(extent, lambda site: site.deltas)

    def merge(self, site: Site, measured: Products) -> Array:
        return site.moved(total(site.deltas) * (float(self._t(np.array(measured))) / len(site.sources)))

    def merge_whole(self, tensor: Whole) -> Values:
        deltas, count = tensor.deltas(), len(tensor.sources)

        def coefficients(products: Values) -> Sequence[Values]:
            return [self._t(products) / count] * count

        combine_rows(deltas, coefficients)
        return move(tensor.the_base, deltas[0])

    def _t(self, products: Values) -> Values:
        """Return how far to go, from inner products [n, n] or, for many rows, [n, n, rows]."""
        count = len(products)
        norms = np.sqrt(np.einsum("ii...->i...", products))
        cosines = []
        for i, j in combinations(range(count), 2):
            divisor = np.maximum(norms[i] * norms[j], self.least_product)
            cosines.append(np.clip(products[i, j] / np.where(divisor > 0, divisor, 1.0), -1, 1))
        cosine = np.mean(cosines, axis=0)
        cosine = cosine if self.extrapolate else np.maximum(cosine, 0.0)
        divisor = 1 + (count - 1) * cosine
        lost = np.abs(divisor) < 1e-6  # only as far apart as they can be: no finite step leads to a centre
        return np.where(lost, 0.0, count * cosine / np.where(lost, 1.0, divisor))
