"""Spherical interpolation between two models: along the arc, not the chord, so that norms do not shrink halfway.

For each tensor, flattened, with angle phi between a and b:

    theta = sin((1 - t) phi) / sin(phi) a + sin(t phi) / sin(phi) b

Where the arc is not defined (a zero tensor, or a and b parallel or opposite to within 1e-6) this is (1 - t) a + t b.
Fine-tunes of one base are nearly parallel, so there it differs little from an average.
"""

import math

import numpy as np
import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Chunk, Merge, Scan, Scope


class Slerp(Merge):
    needs = Needs(sources=(2, 2), same_architecture=True, same_tokenizer=True)
    paper = "https://dl.acm.org/doi/10.1145/325334.325242"
    weighted = False

    t: float = Field(0.5, ge=0, le=1, description="Where on the arc: 0 is the first model, 1 the second.")

    @property
    def measures(self) -> Scope:
        return "tensor"

    def measure(self, scan: Scan, sources: int, size: int) -> tuple[float, float]:
        """Return the coefficients of a and b."""
        aa, ab, bb = scan(_products).tolist()
        if aa == 0 or bb == 0:
            return 1 - self.t, self.t
        phi = math.acos(max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb))))
        if math.sin(phi) < 1e-6:
            return 1 - self.t, self.t
        return math.sin((1 - self.t) * phi) / math.sin(phi), math.sin(self.t * phi) / math.sin(phi)

    def merge(self, chunk: Chunk, measured: tuple[float, float]) -> torch.Tensor:
        a, b = chunk.sources
        return a.mul_(measured[0]).add_(b.mul_(measured[1]))


def _products(chunk: Chunk) -> np.ndarray:
    a, b = (source.double() for source in chunk.sources)
    return torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()]).numpy()
