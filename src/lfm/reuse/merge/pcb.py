"""Weigh every change by how large it is within its task and how well it agrees with the others (PCB-Merging).

With n task vectors tau_i, their sizes clipped to the `clip` and 1 - `clip` quantiles, and `norm` onto [0, 1]:

    intra-balancing:  a_i = exp(n * norm(|tau_i|)^2)
    inter-balancing:  b_i = tanh(tau_i * sum_j tau_j)                 (here tau_i is not clipped)
    drop and rescale: s_i = norm(max(a_i * b_i, its 1 - `ratio` quantile))
    theta = theta_0 + scale * sum_i w_i s_i tau_i / sum_i s_i

Quantiles are over the whole model, or over each tensor or layer (`scope`). Where no s_i is above 0 the base's weight
stays. The paper searches `ratio` and `scale` (w_i, in its evolutionary variant) on validation data.

This follows the function `PCB_merge` that the authors published as the details of their method. The paper's formulas
have softmax in the places of exp and tanh. Other scripts of theirs clip 0.01, or norm the tau_i in b_i.
"""

from typing import Literal, NamedTuple

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array, exp, maximum, minimum, sign, tanh, total


class Range(NamedTuple):
    """A least and a largest number."""

    low: float
    high: float

    def clip(self, values: Array) -> Array:
        return minimum(maximum(values, self.low), self.high)

    def norm(self, values: Array) -> Array:
        """Return values within the range as shares of it; 0 where there is but one value."""
        return (values - self.low) / (self.high - self.low if self.high > self.low else 1.0)


class Pcb(Elementwise):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2410.02396"

    ratio: float = Field(
        0.1, gt=0, le=1, description="Share of each task vector that takes part, those of best balance."
    )
    scale: float = Field(1.0, description="How far to go along the merged task vector (lambda of the paper).")
    clip: float = Field(1e-4, ge=0, lt=0.5, description="Share of smallest, and of largest, changes that is clipped.")
    scope: Literal["global", "layer", "tensor"] = Field(
        "global", description="Compare changes in the model as a whole, layer by layer, or tensor by tensor."
    )

    @property
    def measures(self) -> Scope:
        return self.scope

    def measure(self, extent: Extent) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
        """Return, for each source, the range of sizes to clip to, and that of balances that count."""
        sizes = self._sizes(extent)
        return sizes, self._balances(extent, sizes)

    def _sizes(self, extent: Extent) -> tuple[Range, ...]:
        size, count = extent.size, extent.sources
        low, high = int(size * self.clip), int(size * (1 - self.clip) - 1)  # counted from the smallest
        smallest = [-float(value) for value in extent.largest(lambda site: [0.0 - abs(delta) for delta in site.deltas])]
        lows = extent.kth_largest(lambda site: site.deltas, [size - low] * count) if low else smallest
        highs = extent.kth_largest(lambda site: site.deltas, [size - high] * count) if size - high < size else smallest
        return tuple(Range(*pair) for pair in zip(lows, highs, strict=True))

    def _balances(self, extent: Extent, sizes: tuple[Range, ...]) -> tuple[Range, ...]:
        """The k-th largest is looked for among those above 0, and, where it is not there, among those below."""
        size, count = extent.size, extent.sources
        rank = size - int(size * (1 - self.ratio))
        tops = extent.largest(lambda site: [sense * of for of in _balances(site, sizes) for sense in (1.0, -1.0)])
        ups = extent.kth_largest(lambda site: [maximum(of, 0.0) for of in _balances(site, sizes)], [rank] * count)
        downs = [-float(value) for value in tops[1::2]]
        if rank < size and not all(ups):
            downs = [
                -value
                for value in extent.kth_largest(
                    lambda site: [maximum(0.0 - of, 0.0) for of in _balances(site, sizes)], [size - rank + 1] * count
                )
            ]
        return tuple(
            Range(min(up or down, float(top)), float(top)) for up, down, top in zip(ups, downs, tops[::2], strict=True)
        )

    def merge(self, site: Site, measured: tuple[tuple[Range, ...], tuple[Range, ...]]) -> Array:
        sizes, counting = measured
        shares = [
            within.norm(within.clip(balance)) for within, balance in zip(counting, _balances(site, sizes), strict=True)
        ]
        clipped = [sign(delta) * within.clip(abs(delta)) for delta, within in zip(site.deltas, sizes, strict=True)]
        parts = [
            share * change * (weight * self.scale)
            for share, change, weight in zip(shares, clipped, site.weights, strict=True)
        ]
        return site.moved(total(parts) / maximum(total(shares), 1e-12))


def _balances(site: Site, sizes: tuple[Range, ...]) -> list[Array]:
    """Return a_i b_i, but for the factor e^-n, which keeps it in the range of numbers and cancels in `norm`."""
    together, count = total(site.deltas), len(site.deltas)
    found = []
    for delta, within in zip(site.deltas, sizes, strict=True):
        share = within.norm(within.clip(abs(delta)))
        found.append(exp(maximum((share * share - 1.0) * count, -60.0)) * tanh(delta * together))
    return found
