"""Isotropic merging that gives each task some directions of its own besides those that tasks share.

For a matrix whose smaller side is r, with T tasks, tau_i = theta_i - theta_0 and k = `common` * r, moved so that T
divides r - k:

    common:    U_0, S_0, V_0 = the first k singular values and vectors of sum_i w_i tau_i
    specific:  U_i, S_i, V_i = the first (r - k) / T of w_i tau_i - U_0 U_0^T w_i tau_i,  for each task
    theta = theta_0 + scale * s U V^T

where s is the mean of all those singular values, and U and V are [U_1 ... U_T U_0] and [V_1 ... V_T V_0] made
orthogonal (the nearest orthogonal matrix). With `common` = 1 this is `iso_c`; it pays the more tasks there are.

Tensors that are no matrices - biases, norms, convolutions - get the mean of the w_i tau_i; embeddings and heads count
as matrices: both as in the authors' code. They choose `scale` on validation data. Directions with less than 1e-6 of the
largest singular value count as none.
"""

import numpy as np
import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Tensorwise, Whole
from lfm.reuse.merge._spectral import added, mean, moved, polar, svd, task_vectors


class IsoCts(Tensorwise):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2502.04959"
    copies = 7.5

    scale: float = Field(1.0, description="How far to go along the merged task vector (alpha of the paper).")
    common: float = Field(0.8, ge=0, le=1, description="Share of the directions that is common to the tasks.")

    def merge(self, tensor: Whole) -> np.ndarray:
        changes = task_vectors(tensor)
        change = added(changes)
        if change.ndim != 2:
            return moved(tensor, change / len(changes), self.scale)
        left, values, right = self._directions(changes, change)
        return moved(tensor, polar(left)[0] @ polar(right)[0] * mean(values), self.scale)

    def _directions(self, changes: list[torch.Tensor], change: torch.Tensor) -> list[torch.Tensor]:
        """Return the task-specific and common U, S and Vh, put together."""
        each = specific_directions(min(change.shape), len(changes), self.common)
        common = svd(change, min(change.shape) - each * len(changes))
        shared = common[0]
        found = [svd(one - shared @ (shared.T @ one.double()), each) for one in changes]
        lefts, values, rights = zip(*found, common, strict=True)
        return [torch.cat(lefts, dim=1), torch.cat(values), torch.cat(rights, dim=0)]


def specific_directions(size: int, tasks: int, common: float) -> int:
    """Return how many directions each task has to itself, out of `size`: rounded, as long as there are as many."""
    return min(round((size - int(size * common)) / tasks), size // tasks)
