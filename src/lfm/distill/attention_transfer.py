"""Match where in an image, or at which tokens, the activity is: what strikes the teacher is to strike the student.

    L = L_answers + weight mean_l || a_l(student) - a_l(teacher) ||^2,   a = v / ||v||,  v = mean_channels(h^2)

Needs no map between widths. The paper has a weight of 1000 for the mean over places: as much as 16 here, of the 8 x 8
places of its last maps. Padding takes no part; of images of two sizes the larger is averaged down first.
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import Inside, Taught, Terms
from lfm.distill._features import kept, only_places, same_places
from lfm.method import Access, Data, Needs


class AttentionTransfer(Inside):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1612.03928"

    weight: float = Field(16.0, ge=0, description="Weight of the maps of attention.")

    def terms(self, taught: Taught) -> Terms:
        mask = taught.student.mask
        losses = []
        for pair in zip(taught.teacher.hidden, taught.student.hidden, strict=True):
            teacher, student = (_attention(state, mask) for state in same_places(*pair))
            losses.append((student - teacher).square().sum(-1).mean())
        return {**self.answers(taught), "attention": self.weight * torch.stack(losses).mean()}


def _attention(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return how active each place is (batch, places), of length 1."""
    if only_places(state).ndim == 4:
        return functional.normalize(state.square().mean(1).flatten(1), dim=-1)
    return functional.normalize(state.square().mean(-1) * kept(state, mask), dim=-1)
