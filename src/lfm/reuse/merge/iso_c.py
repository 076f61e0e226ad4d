"""Sum the task vectors of each matrix and make all its singular values equal (isotropic merging).

For a matrix, with tau_i = theta_i - theta_0:

    U S V^T = sum_i w_i tau_i,    s = mean of S,    theta = theta_0 + scale * s U V^T

A sum of task vectors is ruled by the few directions that tasks share, which the equal spectrum puts on a par with those
of single tasks. All other tensors - biases, norms, convolutions - get the mean of the w_i tau_i; embeddings and heads
count as matrices: both as in the authors' code (which leaves out CLIP's text projection, by its name). They choose
`scale` on validation data. Directions with less than 1e-6 of the largest singular value count as none, so that the
sum of low-rank task vectors (LoRA) stays one of low rank: the authors' code would fill it up with arbitrary directions.
"""

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Tensorwise, Whole
from lfm.reuse.merge._spectral import added, mean, moved, polar, task_vectors


class IsoC(Tensorwise):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2502.04959"
    copies = 5.5

    scale: float = Field(1.0, description="How far to go along the merged task vector (alpha of the paper).")

    def merge(self, tensor: Whole) -> np.ndarray:
        change = added(task_vectors(tensor))
        if change.ndim != 2:
            return moved(tensor, change / len(tensor.weights), self.scale)
        directions, values = polar(change)
        return moved(tensor, directions * mean(values), self.scale)
