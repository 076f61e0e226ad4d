"""For every weight, take the change of the model that changed it most.

    tau = w_j tau_j  with  j = argmax_i |w_i tau_i|,   tau_i = theta_i - theta_0
    theta = theta_0 + scale * tau

Made for models tuned one after the other, each from the last: late changes of what mattered are kept. Where two
changes are equally large, the one of the earlier model in the list is taken.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array, where


class Magmax(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2407.06322"

    scale: float = Field(0.5, description="How far to go along the merged task vector (lambda of the paper).")

    def merge(self, site: Site, measured: None) -> Array:
        largest, *others = [delta * weight for delta, weight in zip(site.deltas, site.weights, strict=True)]
        for change in others:
            largest = where(abs(change) > abs(largest), change, largest)
        return site.moved(largest * self.scale)
