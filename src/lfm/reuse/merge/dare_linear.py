"""Drop most of each task vector at random and rescale the rest: task vectors are so redundant that little is lost.

    theta = theta_0 + scale * sum_i w_i m_i o (theta_i - theta_0) / density,      m_i ~ Bernoulli(density)

Which elements are kept has nothing to do with their magnitude (compare `ties`, `della_linear`); the expectation is
that of `task_arithmetic`. The masks depend on the seed, the tensor's name and the source's content alone: not on the
order of the sources, the threads, or how the checkpoint is split into files.

mergekit does not divide by the density, but gives what is kept the L1 norm that the tensor's changes had:
`rescale: norm`. That is close to it for large tensors, and biased for small ones.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import weighted_sum
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._trim import rescaled, restoring_factors, thinned


class DareLinear(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2311.03099"
    per_source = ("density",)

    density: float = Field(0.5, ge=0, le=1, description="Share of each task vector that is kept (1 - p of the paper).")
    scale: float = Field(1.0, description="How far to go along the sum of the task vectors.")
    normalize: bool = Field(False, description="Divide the sum by that of the weights.")
    rescale: Literal["expectation", "norm", "none"] = Field(
        "expectation", description="What is kept is divided by the density, or given the L1 norm of all, or left alone."
    )

    @property
    def measures(self) -> Scope:
        return "tensor" if self.rescale == "norm" else "nothing"

    def measure(self, extent: Extent) -> tuple[float, ...]:
        """Return, for each source, what its changes are multiplied by."""
        return restoring_factors(extent, lambda site: thinned(site, site.each("density"), divide=False))

    def merge(self, site: Site, measured: tuple[float, ...] | None) -> Array:
        kept = thinned(site, site.each("density"), divide=self.rescale == "expectation")
        return site.moved(weighted_sum(rescaled(kept, measured), site.weights, divide=self.normalize) * self.scale)
