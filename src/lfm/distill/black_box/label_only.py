"""Ask for labels alone, and spend a part of the queries on points close to the boundaries between classes.

    a, b with different labels:   c = (a + b) / 2;   a := c where c has the label of a, else b := c;   again

The first points are smooth random images. Pairs of them with different labels are halved towards each other, so that
after k queries two points are 1/2^k of their distance apart and a boundary lies in between. All points that were asked
about are stored, and the student learns their labels. On digits this does no better than as many random images alone
(`noise_pool` with labels).
"""

import torch
from pydantic import Field

from lfm.distill._asked import of_bytes
from lfm.distill._contract import BlackBox, Inquirer, Inquiry, Taught, Terms
from lfm.distill._losses import cross_entropy
from lfm.distill._noise import smooth_noise
from lfm.distill.black_box._stored import Lesson, Stored
from lfm.method import Access, Needs


class LabelOnly(BlackBox):
    needs = Needs(access=Access.LABELS, trains=True)
    most = Access.LABELS

    boundary: float = Field(0.5, ge=0, lt=1, description="Share of the queries for points close to boundaries.")
    halvings: int = Field(5, ge=1, le=8, description="Queries for each pair of points (k).")

    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        return _LabelOnly(self, inquiry)

    def terms(self, taught: Taught) -> Terms:
        labels = taught.teacher.logits.argmax(-1) if taught.labels is None else taught.labels
        return {"labels": cross_entropy(taught.student.logits, labels)}


class _LabelOnly(Stored):
    def __init__(self, method: LabelOnly, inquiry: Inquiry) -> None:
        super().__init__(inquiry, inquiry.queries)
        self._method = method
        self.tensors["sources"] = torch.zeros(inquiry.queries, dtype=torch.bool)

    def lesson(self, step: int) -> Lesson:
        wanted = self.wanted(step)
        near = int(wanted * self._method.boundary) // self._method.halvings if self.count else 0
        pairs = self._pairs(near)
        spent = len(pairs[0]) * self._method.halvings
        if wanted - spent:
            before = self.count
            self.ask(smooth_noise(wanted - spent, self.inquiry.space))
            self.tensors["sources"][before : self.count] = True
        if spent:
            self._halve(*pairs)
        return self.replay(self.inquiry.batch_size)

    def _pairs(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return places of random points in the store, in pairs with different labels, so many or fewer."""
        places = self.tensors["sources"].nonzero()[:, 0]
        if not count or not len(places):
            return places[:0], places[:0]
        one, other = (places[torch.randint(len(places), (4 * count,))] for _ in range(2))
        labels = self.tensors["said"].argmax(-1)
        differ = (labels[one] != labels[other]).nonzero()[:count, 0]
        return one[differ], other[differ]

    def _halve(self, one: torch.Tensor, other: torch.Tensor) -> None:
        inquiry, inputs = self.inquiry, self.tensors["inputs"]
        a, b = (of_bytes(inputs[places], inquiry.space, inquiry.device) for places in (one, other))
        label = self.tensors["said"][one].argmax(-1).to(a.device)
        for _ in range(self._method.halvings):
            middle, said = self.ask((a + b) / 2)
            same = (said.argmax(-1) == label).view(-1, 1, 1, 1)
            a, b = torch.where(same, middle, a), torch.where(same, b, middle)
