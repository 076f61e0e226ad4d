"""Go from the base towards the average of its fine-tunes, as far as the angle between them says.

For each tensor, with N fine-tunes and c the mean cosine between two of their task vectors:

    t = N c / (1 + (N - 1) c)
    theta = (1 - t) theta_0 + t mean_i theta_i

Fine-tunes scatter around a centre; the wider their angle, the further the average still is from it, on the other side
from the base. A mean cosine below 0 counts as 0: such a tensor keeps the base's weights.
"""

from itertools import combinations

import numpy as np
import torch

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge, Scan, Scope


class ModelStock(Merge):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2403.19522"
    weighted = False

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, scan: Scan, sources: int, size: int) -> float:
        """Return t of a tensor."""
        products = scan(_products)
        norms = np.sqrt(products.diagonal())
        pairs = list(combinations(range(sources), 2))
        cosines = [products[i, j] / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for i, j in pairs]
        cosine = max(0.0, sum(cosines) / len(cosines))
        return sources * cosine / (1 + (sources - 1) * cosine)

    def merge(self, chunk: Chunk, measured: float) -> torch.Tensor:
        change = torch.zeros_like(chunk.the_base)
        for delta in chunk.deltas():
            change += delta
        return chunk.moved(change.mul_(measured / len(chunk.sources)))


def _products(chunk: Chunk) -> np.ndarray:
    """Return the inner products of all pairs of task vectors, in float64."""
    deltas = [delta.double() for delta in chunk.deltas()]
    return np.array([[float((one * other).sum()) for other in deltas] for one in deltas])
