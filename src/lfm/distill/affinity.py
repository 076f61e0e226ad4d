"""Match which places of an image, or tokens of a text, are alike; estimated in time linear in their number.

    L = L_answers + weight mean || F_t^T F_t - F_s^T F_s ||^2 / places^2

F are the hidden states of all places, each of length 1; of layers that give one vector, those of the batch. With
`projections` k the norm is estimated by || (F_t^T F_t - F_s^T F_s) Z ||^2 / k with k random Gaussian vectors Z, whose
mean is the exact value, and neither matrix is ever formed. Needs no labels, and no map between widths.
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import Inside, Taught, Terms
from lfm.distill._features import by_places, kept, same_places
from lfm.method import Access, Data, Needs


class Affinity(Inside):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/2302.10899"

    weight: float = Field(10.0, ge=0, description="Weight of the affinity of places.")
    projections: int | None = Field(16, ge=1, description="Random vectors of the estimate; exact if null.")

    def terms(self, taught: Taught) -> Terms:
        mask = taught.student.mask
        losses = []
        for pair in zip(taught.teacher.hidden, taught.student.hidden, strict=True):
            teacher, student = (_directions(state, mask) for state in same_places(*pair))
            losses.append(_difference(teacher, student, self.projections))
        return {**self.answers(taught), "affinity": self.weight * torch.stack(losses).mean()}


def _directions(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the direction of each place (batch, places, width); padding is 0."""
    found = functional.normalize(by_places(state), dim=-1)
    return found * kept(state, mask)[..., None] if state.ndim == 3 else found


def _difference(teacher: torch.Tensor, student: torch.Tensor, count: int | None) -> torch.Tensor:
    """Return the mean squared difference of the affinities of `teacher` and `student` (batch, places, width)."""
    batch, places, _ = teacher.shape
    if count is None:
        found = (teacher @ teacher.transpose(1, 2) - student @ student.transpose(1, 2)).square().sum((1, 2))
    else:
        z = torch.randn(batch, places, count, device=teacher.device)
        seen = [side @ (side.transpose(1, 2) @ z) for side in (teacher, student)]
        found = (seen[0] - seen[1]).square().sum((1, 2)) / count
    return found.mean() / places**2
