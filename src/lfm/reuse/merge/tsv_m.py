"""Keep the largest singular directions of each task, made orthogonal across tasks (TSV-Merge).

For a matrix whose smaller side is r, with T tasks and tau_i = theta_i - theta_0:

    U_i, S_i, V_i = the first r / T (rounded down) singular values and vectors of w_i tau_i
    theta = theta_0 + scale * U S V^T

where S holds all the singular values, and U and V are [U_1 ... U_T] and [V_1 ... V_T] made orthogonal (the nearest
orthogonal matrix), so that tasks do not get into each other's way. One task alone is given back whole. The authors
find that `scale` = 1 needs no tuning.

Tensors that are no matrices - biases, norms, convolutions - get the mean of the w_i tau_i; embeddings and heads count
as matrices: both as in the authors' code (which leaves out CLIP's text projection, by its name). Departures from it:
with more tasks than r each keeps one direction, where it keeps none; and directions that depend on others (equal
models) or have less than 1e-6 of the largest singular value (LoRA) count as none, where it has arbitrary ones instead.
"""

import numpy as np
import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Tensorwise, Whole
from lfm.reuse.merge._spectral import added, moved, polar, svd, task_vectors


class TsvM(Tensorwise):
    needs = Needs(sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2412.00081"
    copies = 8.5

    scale: float = Field(1.0, description="How far to go along the merged task vector (alpha of the paper).")

    def merge(self, tensor: Whole) -> np.ndarray:
        changes = task_vectors(tensor)
        if changes[0].ndim != 2:
            return moved(tensor, added(changes) / len(changes), self.scale)
        count = max(min(changes[0].shape) // len(changes), 1)
        lefts, values, rights = zip(*(svd(change, count) for change in changes), strict=True)
        left, right = polar(torch.cat(lefts, dim=1))[0], polar(torch.cat(rights, dim=0))[0]
        return moved(tensor, left * torch.cat(values) @ right, self.scale)
