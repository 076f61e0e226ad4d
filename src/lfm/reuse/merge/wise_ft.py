"""Interpolate between a base and its fine-tune, to keep what the base could do outside the tuning data.

    theta = (1 - alpha) theta_0 + alpha theta_1  =  theta_0 + alpha (theta_1 - theta_0)

alpha = 0 returns the base and alpha = 1 the fine-tune, bit for bit; weights that tuning left alone stay so. Half-way
usually wins under distribution shift at little or no cost on the tuning task. Statistics of BatchNorm are interpolated
like weights.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array


class WiseFt(Elementwise):
    needs = Needs(sources=(1, 1), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2109.01903"
    weighted = False
    interpolates = True

    alpha: float = Field(0.5, ge=0, le=1, description="0 is the base, 1 the fine-tune.")

    def merge(self, site: Site, measured: None) -> Array:
        if self.alpha == 1:
            return site.sources[0]
        return site.moved(site.deltas[0] * self.alpha)
