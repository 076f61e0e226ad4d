"""Add task vectors to the base, little of them in the first layers and more with every layer (LiNeS).

    theta = theta_0 + lambda_l sum_i w_i (theta_i - theta_0),      lambda_l = alpha + beta l / (L - 1)

for layer l = 0 .. L - 1 of L. Early layers hold what all tasks share, so leaving them near the base forgets less, and
merged tasks disturb each other less. Tensors outside of the layers (embeddings, the last norm, heads) take alpha, those
before the layers and those after them alike, as in the authors' code.

For several tasks the authors take alpha = 1 / (number of models), which is the default, and look for beta on validation
data; for one fine-tune, whose base is not to be forgotten, they take beta = 1 - alpha and look for alpha, from 0.
"""

from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._combine import combine
from lfm.reuse.merge._contract import Elementwise, Site
from lfm.reuse.merge._machine.array import Array


class Lines(Elementwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2410.17146"
    by_layer = True

    alpha: float | None = Field(None, ge=0, description="Scale of the first layer; 1 / (number of models) if left out.")
    beta: float = Field(0.5, ge=0, description="What the last layer's scale is above that of the first.")

    def merge(self, site: Site, measured: None) -> Array:
        scale = 1 / len(site.sources) if self.alpha is None else self.alpha
        if site.layer is not None:
            number, depth = site.layer
            scale += self.beta * number / max(depth - 1, 1)
        return site.moved(combine(site.deltas, [scale * weight for weight in site.weights]))
