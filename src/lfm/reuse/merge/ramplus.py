"""Average weights that several models changed, and strengthen those that one alone changed (RAM+).

    c     = number of i with |tau_i| > epsilon,   tau_i = theta_i - theta_0
    rho_i = shared_i / unique_i:  how many of the weights that model i changed others changed too, and how many not
    tau   = mean of the changed tau_i where c > 1;   (1 + r min(rho_i, alpha)) tau_i where i alone changed the weight
    theta = theta_0 + tau

`ram` for models that share much: averaging weakens what a model shares, and its own part makes up for it. rho_i is
counted over the whole model, as the authors do; `scope: tensor` counts in every tensor, as mergekit does (it calls
this `ramplus_tl`). The authors' program is `r: 0.2, alpha: 1`. A change of epsilon or less is dropped.
"""

from typing import Literal

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Extent, Scope, Site
from lfm.reuse.merge._machine.array import Array, array, equal, total, where


class Ramplus(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2601.13572"
    weighted = False

    r: float = Field(0.1, ge=0, description="How much of rho is added to what one model alone changed.")
    alpha: float = Field(0.2, ge=0, description="The most that rho counts for.")
    epsilon: float = Field(1e-5, ge=0, description="A weight is changed where it moved by more than this.")
    scope: Literal["global", "layer", "tensor"] = Field(
        "global", description="Count over the model as a whole, over each layer, or each tensor."
    )

    @property
    def measures(self) -> Scope:
        return self.scope

    def measure(self, extent: Extent) -> tuple[float, ...]:
        """Return, for each source, the factor on what it alone changed."""

        def counted(site: Site) -> list[tuple[Array, Array]]:
            changed = self._changed(site)
            alone = equal(total(changed), array(1.0))
            return [(is_changed, by) for by in (alone, array(1.0)) for is_changed in changed]

        counts = extent.total(counted)
        unique, all_changed = counts[: extent.sources], counts[extent.sources :]
        ratios = [(every - own) / own if own else 0.0 for own, every in zip(unique, all_changed, strict=True)]
        return tuple(1 + self.r * min(float(ratio), self.alpha) for ratio in ratios)

    def merge(self, site: Site, measured: tuple[float, ...]) -> Array:
        changed = self._changed(site)
        kept = [where(is_changed, delta, 0.0) for is_changed, delta in zip(changed, site.deltas, strict=True)]
        strengthened = total([delta * factor for delta, factor in zip(kept, measured, strict=True)])
        count = total(changed)
        return site.moved(where(count > 1, total(kept) / count, strengthened))

    def _changed(self, site: Site) -> list[Array]:
        return [abs(delta) > self.epsilon for delta in site.deltas]
