"""Insert facts as MEMIT does, with changes that ordinary text does not see at all.

    W + R K^T P (K_e K_e^T P + K K^T P + l2 1)^-1

P projects onto the directions that ordinary text hardly takes: those of the smallest eigenvalues of C = E[k k^T] that
together hold the share `null_space` of its trace. (The authors' code compares eigenvalues with the number 0.02, which
means something else for every model.) K_e are the keys of earlier edits, which are to give what they give.
"""

import torch
from pydantic import Field

from lfm.edit._contract import Layer, LeastSquares
from lfm.method import Access, Needs


class AlphaEdit(LeastSquares):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/2410.02355"
    stream = True

    null_space: float = Field(0.02, ge=0, lt=1, description="Share of the spectrum that edits may use.")
    l2: float = Field(1e-2, gt=0, description="Weight of a small change, over the mean square of the keys.")

    def rows(self, layer: Layer) -> torch.Tensor:
        eigenvalues, vectors = torch.linalg.eigh(layer.covariance)
        free = vectors[:, eigenvalues.cumsum(0) <= self.null_space * eigenvalues.sum()]
        projected = free.T @ layer.keys
        earlier = free.T @ layer.earlier @ free
        small = self.l2 * layer.keys.square().sum(0).mean() * torch.eye(free.shape[1], dtype=free.dtype)
        rows: torch.Tensor = torch.linalg.solve(earlier + projected @ projected.T + small, projected).T @ free.T
        return rows
