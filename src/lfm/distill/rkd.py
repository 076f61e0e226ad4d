"""Match how examples lie to each other: the distances between two, and the angles of three.

    L = L_answers + distance huber(d_ij / mean d) + angle huber(cos of the angle at j in (i, j, k))

Both are of what the output layers read, whatever its width, and do not change when the student's space is turned.
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import Read, Taught, Terms
from lfm.method import Access, Data, Needs

TINY = 1e-12  # squared distance below which two examples are one


class Rkd(Read):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1904.05068"

    distance: float = Field(25.0, ge=0, description="Weight of the distances between two examples.")
    angle: float = Field(50.0, ge=0, description="Weight of the angles of three examples.")

    def terms(self, taught: Taught) -> Terms:
        [teacher], [student] = taught.teacher.hidden, taught.student.hidden
        distances = functional.smooth_l1_loss(_distances(student), _distances(teacher))
        angles = functional.smooth_l1_loss(_angles(student), _angles(teacher))
        return {**self.answers(taught), "distances": self.distance * distances, "angles": self.angle * angles}


def _distances(features: torch.Tensor) -> torch.Tensor:
    """Return distances (n, n) in units of their mean."""
    lengths = features.square().sum(-1)
    squares = lengths[:, None] + lengths - 2 * features @ features.T
    away = 1 - torch.eye(len(features), device=features.device)  # of an example to itself it is 0, without a gradient
    found = squares.clamp_min(TINY).sqrt() * away
    return found / (found.sum() / away.sum().clamp_min(1)).clamp_min(TINY)


def _angles(features: torch.Tensor) -> torch.Tensor:
    """Return cosines (n, n, n) of the angles at the first."""
    between = functional.normalize(features[None] - features[:, None], dim=-1)
    return between @ between.transpose(1, 2)
