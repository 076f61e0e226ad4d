"""Take over from another model what is nearly the same there: a change of at most `t` in each weight.

    theta = W theta_1 + (1 - W) theta_0,     W = min(t / |theta_1 - theta_0|, 1)

That is to say: weights that differ by no more than `t` become those of the other model, and all others move by `t`
towards it. With a small t the base keeps its abilities and takes on some of the other's manner.

mergekit divides by 1e-6 at least, so with t < 1e-6 it moves even less where the models differ by less than that.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array, sign, where


class Nearswap(Elementwise):
    needs = Needs(sources=(1, 1), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    weighted = False

    t: float = Field(1e-4, ge=0, description="Most that a weight changes.")

    def merge(self, site: Site, measured: None) -> Array:
        [source], [delta] = site.sources, site.deltas
        return where(abs(delta) <= self.t, source, site.moved(sign(delta) * self.t))
