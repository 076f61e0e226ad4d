"""Select the weights that the models disagree on, weigh each matrix by its energy, erase minority signs (SCE).

For each tensor, with tau_i = theta_i - theta_0:

    1. select:     keep the share `select_topk` of the elements whose variance over the models is largest (of those
                   where it is not 0, rounded down); the rest becomes 0
    2. calculate:  q_i = sum of squares of tau_i,  divided by the sum of all q
    3. erase:      s = sign(sum_i tau_i);  tau_i becomes 0 where its sign is not s
    4. theta = theta_0 + sum_i q_i tau_i / (sum of the q_i of those not erased)

For models made from one base to be fused, with nothing to tune: the weights of the models come out of the changes
themselves, matrix by matrix. One model alone has no variance, so nothing of it is selected unless `select_topk` is 1.
All elements that vary as much as the least selected are selected. mergekit gives all models the same weight where the
mean squares add up to less than 1e-6, which they do in most fine-tunes, and elects + where signs balance:
`rules: mergekit`.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._consensus import average_agreeing, elect
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array, array, sign, total, where
from lfm.reuse.merge._trim import from_size

TINY = 1e-6  # of mergekit


class Sce(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2408.07990"
    weighted = False

    select_topk: float = Field(1.0, ge=0, le=1, description="Share of the elements that is selected (tau), 1 for all.")
    rules: Literal["paper", "mergekit"] = Field(
        "paper", description="`mergekit` weighs small changes alike, and elects + where signs balance."
    )

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, extent: Extent) -> tuple[float, tuple[float, ...]]:
        """Return the variance from which elements are selected, and the weight of each source."""
        least = self._least_variance(extent)
        energies = extent.total(lambda site: [(delta, delta) for delta in _selected(site, least)])
        whole, small = float(energies.sum()), TINY * extent.size if self.rules == "mergekit" else 0.0
        alike = whole == 0 or whole < small
        return least, tuple(1 / len(energies) if alike else float(energy) / whole for energy in energies)

    def merge(self, site: Site, measured: tuple[float, tuple[float, ...]]) -> Array:
        least, weights = measured
        deltas = _selected(site, least)
        elected = elect(deltas, self.rules)
        weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
        floor = TINY if self.rules == "mergekit" else 0.0
        return site.moved(average_agreeing(weighted, elected, weights, least=floor))

    def _least_variance(self, extent: Extent) -> float:
        if self.select_topk == 1:
            return 0.0
        varying = extent.total(lambda site: [(sign(_variance(site)), array(1.0))])
        count = int(self.select_topk * int(varying[0]))
        return from_size(extent.kth_largest(lambda site: [_variance(site)], [count])[0])


def _selected(site: Site, least: float) -> list[Array]:
    if least == 0:
        return site.deltas
    return [where(_variance(site) >= least, delta, 0.0) for delta in site.deltas]


def _variance(site: Site) -> Array:
    """Return the variance over the sources, 0 exactly where they are equal: hence measured from the first of them."""
    apart = [delta - site.deltas[0] for delta in site.deltas]
    mean = total(apart) / len(apart)
    return total([(one - mean) * (one - mean) for one in apart]) / len(apart)
