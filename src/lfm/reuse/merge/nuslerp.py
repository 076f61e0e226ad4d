"""Spherical interpolation by weights, between two models or between their task vectors, whole or row by row.

With t = w_2 / (w_1 + w_2) (1/2 where the weights cancel out) and the angle phi between x_1 and x_2:

    S(x_1, x_2) = sin((1 - t) phi) / sin(phi) x_1 + sin(t phi) / sin(phi) x_2
    theta = S(theta_1, theta_2)                                     without a base
    theta = theta_0 + S(theta_1 - theta_0, theta_2 - theta_0)       with a base

Models tuned from one base are nearly parallel, so without the base the arc is hardly an arc; their task vectors are
far from parallel, and between those it keeps the size of the change that an average halves. Where there is no arc,
this is a straight line; a vector of zeros counts as at right angles to the other.

`unit: row` and `unit: column` turn each row or column by itself. A row is all axes but the first, a vector is one.
mergekit says `nuslerp_flatten: false` for rows, and with `nuslerp_row_wise: true` means columns; its rows of tensors
with more than two axes run along the last axis alone.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import Products, arc, combine, cosines, inner_products, placed, points
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site, Whole
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._rows import combine_columns, combine_rows, move


class Nuslerp(Elementwise):
    needs = Needs(sources=(2, 2), same_architecture=True, same_tokenizer=True)
    paper = ""
    takes_base = True

    unit: Literal["tensor", "row", "column"] = Field("tensor", description="What has a direction of its own.")

    @property
    def measures(self) -> Scope:
        return "tensor"

    @property
    def takes(self) -> Literal["elements", "rows", "tensors"]:
        takes: dict[str, Literal["elements", "rows", "tensors"]]
        takes = {"tensor": "elements", "row": "rows", "column": "tensors"}
        return takes[self.unit]

    def measure(self, extent: Extent) -> Products:
        """Return the inner products between the models, or their task vectors."""
        return inner_products(extent, points)

    def merge(self, site: Site, measured: Products) -> Array:
        one, two = arc(_t(site.weights), cosines(np.array(measured))[0, 1])
        return placed(site, combine(points(site), (float(one), float(two))))

    def merge_whole(self, tensor: Whole) -> np.ndarray[Any, Any]:
        vectors = tensor.sources if tensor.base is None else tensor.deltas()
        combine_lines = combine_columns if self.unit == "column" and vectors[0].ndim > 1 else combine_rows
        combine_lines(vectors, lambda products: arc(_t(tensor.weights), cosines(products)[0, 1]))
        return vectors[0] if tensor.base is None else move(tensor.base, vectors[0])


def _t(weights: tuple[float, ...]) -> float:
    return weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
