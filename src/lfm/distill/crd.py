"""Tell the teacher's features of the same example from those of others, by contrast with a memory of earlier ones.

    L = L_answers + weight (C(student; teacher) + C(teacher; student)),
    C(a; b) = - log h(a, b) - sum_memory log(1 - h(a, m)),   h(a, b) = e / (e + M mean e),   e = exp(a b / tau)

a and b are what the output layers read, each by a linear map of its own in `size` dimensions, of length 1; the mean
of e is that of the first batch. The M others come from a queue of the latest examples; the paper draws them from all
of the data. Those with the example's own label are left out, and without labels nothing is.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from lfm.distill._contract import Read, Taught, Terms
from lfm.distill._features import width
from lfm.method import Access, Data, Needs

NONE = -1  # label of a place in the memory that holds no example's


class Crd(Read):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1910.10699"

    weight: float = Field(0.8, ge=0, description="Weight of the contrast.")
    tau: float = Field(0.07, gt=0, description="Temperature of the contrast.")
    size: int = Field(128, ge=1, description="Dimensions in which features are compared.")
    negatives: int = Field(
        4096, ge=1, description="Features of earlier examples to tell apart (M); the paper has 16,384."
    )

    def connectors(self, teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module:
        return _Contrast(width(teacher[0]), width(student[0]), self)

    def terms(self, taught: Taught) -> Terms:
        assert isinstance(taught.extras, _Contrast)
        [teacher], [student] = taught.teacher.hidden, taught.student.hidden
        labels = taught.labels if taught.labels is not None and len(taught.labels) == len(student) else None
        return {**self.answers(taught), "contrast": self.weight * taught.extras(teacher, student, labels)}


class _Contrast(nn.Module):
    """The maps into a common space, and the memory, which is saved with the run."""

    memory: torch.Tensor  # (2, memory, size), of the teacher and of the student
    labels: torch.Tensor
    place: torch.Tensor
    means: torch.Tensor

    def __init__(self, teacher: int, student: int, method: Crd) -> None:
        super().__init__()
        self.tau = method.tau
        self.maps = nn.ModuleList([nn.Linear(teacher, method.size), nn.Linear(student, method.size)])
        drawn = torch.randn(2, method.negatives, method.size)
        self.register_buffer("memory", functional.normalize(drawn, dim=-1))
        self.register_buffer("labels", torch.full((method.negatives,), NONE))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("means", torch.zeros(2))

    def forward(self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        made = [
            functional.normalize(one(side), dim=-1) for one, side in zip(self.maps, (teacher, student), strict=True)
        ]
        other = None if labels is None else labels[:, None] != self.labels
        loss = torch.zeros((), device=student.device)
        for side in (0, 1):
            anchors, facing = made[side], 1 - side
            scores = torch.cat(
                [(anchors * made[facing].detach()).sum(-1, keepdim=True), anchors @ self.memory[facing].clone().T], -1
            )
            exponents = (scores / self.tau).exp()
            if self.means[side] == 0:
                self.means[side] = exponents.detach().mean()
            loss = loss + _contrast(exponents, self.means[side].clone(), other)
        if self.training:
            self._remember([side.detach() for side in made], labels)
        return loss

    @torch.no_grad()
    def _remember(self, made: Sequence[torch.Tensor], labels: torch.Tensor | None) -> None:
        count = len(self.labels)
        rows = min(len(made[0]), count)
        places = (self.place + torch.arange(rows, device=self.place.device)) % count
        for side, features in enumerate(made):
            self.memory[side, places] = features[:rows].to(self.memory)
        self.labels[places] = NONE if labels is None else labels[:rows]
        self.place.copy_((self.place + rows) % count)


def _contrast(exponents: torch.Tensor, mean: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Return C, the mean over rows of e (n, 1 + M), the right one first; `other` (n, M) says which of M count."""
    noise = (exponents.shape[1] - 1) * mean
    told = torch.log1p(noise / exponents[:, 0])
    wrong = torch.log1p(exponents[:, 1:] / noise)
    return (told + (wrong if other is None else wrong * other).sum(-1)).mean()
