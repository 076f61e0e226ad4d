"""Drop changes at random, small ones more often than large ones, and rescale the rest (MAGPRUNE); add them up.

For each row of a tensor (of m elements: all axes but the first; a vector is one row), with tau_i = theta_i - theta_0:

    1. rank the |tau_i| of the row:  r = 0 for the smallest to m - 1 for the largest
    2. keep each with probability  p = density - epsilon + 2 epsilon r / (m - 1),  and divide it by p
    3. theta = theta_0 + scale * sum_i w_i tau_i

Between `dare_linear` (epsilon 0: chance alone) and trimming (size alone): large changes matter more, and what is small
still counts in expectation, which is that of `task_arithmetic`. `epsilon` is half the paper's, as in mergekit; it is
narrower where p would leave [0, 1]: at density 1 nothing is dropped, and at an epsilon as large as the density the
smallest change of a row always. Equal sizes are ranked in the order they stand in.

mergekit rescales what is kept to the L1 norm that the tensor's changes had, not by 1/p: `rescale: norm`. It takes the
second axis alone for a row, where a tensor has more than two, and stops at an epsilon that is too wide.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import weighted_sum
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import rescaled, restoring_factors, shares_by_rank, thinned


class DellaLinear(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2406.11617"
    per_source = ("density", "epsilon")

    density: float = Field(0.5, ge=0, le=1, description="Share of each task vector that is kept (1 - p of the paper).")
    epsilon: float = Field(
        0.15, ge=0, le=0.5, description="How much more often than the mean the largest change of a row is kept."
    )
    scale: float = Field(1.0, description="How far to go along the sum of the task vectors (lambda).")
    normalize: bool = Field(False, description="Divide the sum by that of the weights.")
    rescale: Literal["expectation", "norm", "none"] = Field(
        "expectation", description="What is kept is divided by p, or given the L1 norm of all, or left alone."
    )

    @property
    def measures(self) -> Scope:
        return "tensor" if self.rescale == "norm" else "nothing"

    def measure(self, extent: Extent) -> tuple[float, ...]:
        """Return, for each source, what its changes are multiplied by."""
        return restoring_factors(extent, lambda site: thinned(site, shares_by_rank(site), divide=False))

    def merge(self, site: Site, measured: tuple[float, ...] | None) -> Array:
        kept = thinned(site, shares_by_rank(site), divide=self.rescale == "expectation")
        return site.moved(weighted_sum(rescaled(kept, measured), site.weights, divide=self.normalize) * self.scale)
