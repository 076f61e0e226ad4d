"""Match the probabilities that the teacher gives to all classes, at a temperature.

    L = alpha T^2 D(softmax(t / T), softmax(s / T)) + (1 - alpha) CE(y, s)

D is the divergence KL(teacher || student), its reverse, or the generalised Jensen-Shannon divergence. T^2 keeps the
gradients of the first term at one size: for large T they tend to (s - t) / N. With `top_k` the teacher's k likeliest
classes and one for all others take the place of all classes, which is what an API tells.
"""

from typing import Literal

import torch
from pydantic import Field

from lfm.distill._contract import Kept, Matching, Taught, Terms
from lfm.distill._losses import cross_entropy, divergence, same_classes, with_tail
from lfm.method import Access, Data, Needs


class Response(Matching):
    needs = Needs(access=Access.PROBS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1503.02531"

    temperature: float = Field(4.0, gt=0, description="T: higher shows more of how unlikely classes compare.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher, against the labels; 1 without labels.")
    divergence: Literal["forward", "reverse", "js"] = Field(
        "forward", description="KL(teacher || student), KL(student || teacher), or Jensen-Shannon in between."
    )
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in the Jensen-Shannon mixture.")
    top_k: int | None = Field(None, ge=1, description="Use the teacher's likeliest classes, and one for all others.")
    cache_teacher: bool = Field(
        False,
        description="Keep a language model's likeliest tokens (`top_k`, or 64) for this data on disk, computed once "
        "for all students, and train without the teacher in memory.",
    )

    def kept(self) -> Kept | None:
        return Kept(self.top_k or 64, self.temperature) if self.cache_teacher else None

    def terms(self, taught: Taught) -> Terms:
        teacher, student = taught.teacher.logits, taught.student.logits
        if taught.teacher.ids is not None:
            teacher, student = same_classes(taught, self.temperature)
            teacher, student = teacher * self.temperature, student * self.temperature
        elif self.top_k is not None:
            teacher, student = with_tail(
                (teacher / self.temperature).log_softmax(-1), (student / self.temperature).log_softmax(-1), self.top_k
            )
            teacher, student = teacher * self.temperature, student * self.temperature
        alpha = 1.0 if taught.labels is None else self.alpha
        soft = divergence(teacher, student, kind=self.divergence, temperature=self.temperature, beta=self.beta)
        terms: dict[str, torch.Tensor] = {self.divergence: alpha * soft}
        if taught.labels is not None and alpha < 1:
            terms["labels"] = (1 - alpha) * cross_entropy(taught.student.logits, taught.labels)
        return terms
