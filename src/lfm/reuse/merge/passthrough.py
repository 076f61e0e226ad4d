"""Take each tensor from one model as it is, or scaled: for models put together from layers of others.

    theta = scale theta_1

With `slices` this makes a model with layers of several ones, or with some of them twice ("frankenmerge", depth
up-scaling). Such a model usually has to be trained before it is of use. `scale` may differ by tensor: 0 for the
projections that write into the residual stream switches a layer off.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array


class Passthrough(Elementwise):
    needs = Needs(sources=(1, 1), same_architecture=True, same_tokenizer=True)
    paper = ""
    weighted = False
    per_source = ("scale",)  # so that names in filters are those of the source, where slices renumber layers
    interpolates = True

    scale: float = Field(1.0, description="Factor on the weights.")

    def merge(self, site: Site, measured: None) -> Array:
        [scale] = site.each("scale")
        return site.sources[0] * float(scale)
