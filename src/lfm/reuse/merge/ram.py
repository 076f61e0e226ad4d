"""Average every weight over the models that changed it, and only over those (RAM).

    c = number of i with |tau_i| > epsilon,   tau_i = theta_i - theta_0
    theta = theta_0 + (sum of these tau_i) / max(c, 1)

For models tuned by reinforcement learning, which changes few weights, and other ones for every task: an average over
all models would dilute what only one of them has learned. A change of epsilon or less is dropped.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array, maximum, total, where


class Ram(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2601.13572"
    weighted = False

    epsilon: float = Field(1e-5, ge=0, description="A weight is changed where it moved by more than this.")

    def merge(self, site: Site, measured: None) -> Array:
        changed = [abs(delta) > self.epsilon for delta in site.deltas]
        kept = [where(is_changed, delta, 0.0) for is_changed, delta in zip(changed, site.deltas, strict=True)]
        return site.moved(total(kept) / maximum(total(changed), 1.0))
