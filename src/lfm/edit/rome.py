"""Insert one fact at a time by a change of rank one to the MLP in one block.

    1. k: what goes into the matrix W at the end of the subject; the mean over contexts that the model makes up
    2. v: what should come out, so that the model says the target: v = W k + delta, by Adam on
          mean -log P(target) + kl KL(of what is said of the subject alone) + decay |delta| / |h|,
       at most `clamp` |h| long, where h is the stream that the block adds to
    3. W + (v - W k) u^T / (u . k),   u = C^-1 k,  C = E[k k^T] over ordinary text

so that W k = v, and for other keys W changes as little as it can. `keys` says which k stands where: `averaged` uses the
mean everywhere (r-ROME, Gupta et al. 2024); `bare` that of the prompt alone; `both` demands v of the two; `published`
is what the authors' code does, u of the mean and the divisor of the bare key, which now and then divides by next to
nothing and ruins the model.
"""

from typing import Literal

import torch
from pydantic import Field

from lfm.edit._algebra import exact_rows
from lfm.edit._contract import Layer, LeastSquares
from lfm.method import Access, Needs


class Rome(LeastSquares):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/2202.05262"
    at_once = 1

    keys: Literal["averaged", "bare", "both", "published"] = Field(
        "both", description="Which key gives the value: the mean over contexts, the prompt's own, or both of them."
    )

    def columns(self, bare: torch.Tensor, averaged: torch.Tensor) -> list[torch.Tensor]:
        return {"bare": [bare], "averaged": [averaged], "both": [bare, averaged], "published": [bare, averaged]}[
            self.keys
        ]

    def rows(self, layer: Layer) -> torch.Tensor:
        if self.keys != "published":
            return exact_rows(layer.keys, layer.covariance)
        bare, averaged = layer.keys.T
        u = torch.linalg.solve(layer.covariance, averaged)
        rows = torch.zeros(2, len(u), dtype=u.dtype)
        rows[1] = u / (bare @ u)
        return rows
