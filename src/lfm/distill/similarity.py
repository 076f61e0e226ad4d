"""Match which examples of a batch are alike: inputs that are alike to the teacher are to be so to the student.

    L = L_answers + weight mean_l || g_l(student) - g_l(teacher) ||^2 / n^2,   g = rows of (h h^T), each of length 1

h are the hidden states of the n examples, flattened, whatever their shapes; padding counts as 0.
The paper has a weight of 3000, without the teacher's answers; beside them a tenth did better (on digits).
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import Inside, Taught, Terms
from lfm.distill._features import kept
from lfm.method import Access, Data, Needs


class Similarity(Inside):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1907.09682"

    weight: float = Field(300.0, ge=0, description="Weight of the likeness of examples.")

    def terms(self, taught: Taught) -> Terms:
        mask = taught.student.mask
        losses = [
            (_likeness(student, mask) - _likeness(teacher, mask)).square().mean()
            for teacher, student in zip(taught.teacher.hidden, taught.student.hidden, strict=True)
        ]
        return {**self.answers(taught), "similarity": self.weight * torch.stack(losses).mean()}


def _likeness(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return how alike the examples are (n, n), each row of length 1."""
    flat = (state * kept(state, mask)[..., None] if state.ndim == 3 else state).flatten(1)
    return functional.normalize(flat @ flat.T, dim=-1)
