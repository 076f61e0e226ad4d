"""Let teacher and student learn together, each from the labels and from what the other says at the time.

    L = CE(y, s) + weight KL(t || s)  +  CE(y, t) + weight KL(s || t),   gradients through the second of each KL alone

The teacher is no better than the student at first: give it as a new model (`module:`, `config:`), or one that is to
go on learning. The student is what is written.
"""

from pydantic import Field

from lfm.distill._contract import Online, Taught, Terms
from lfm.distill._losses import cross_entropy, divergence
from lfm.method import Access, Data, Needs


class Mutual(Online):
    needs = Needs(access=Access.WEIGHTS, data=Data.LABELLED, trains=True)
    paper = "https://arxiv.org/abs/1706.00384"

    temperature: float = Field(1.0, gt=0, description="Temperature of both models' probabilities (T).")
    weight: float = Field(1.0, ge=0, description="Weight of the other's answers, against the labels.")

    def terms(self, taught: Taught) -> Terms:
        teacher, student, labels = taught.teacher.logits, taught.student.logits, taught.labels
        terms = {
            "answers": self.weight * divergence(teacher.detach(), student, temperature=self.temperature),
            "teacher_answers": self.weight * divergence(student.detach(), teacher, temperature=self.temperature),
        }
        if labels is not None:
            terms |= {"labels": cross_entropy(student, labels), "teacher_labels": cross_entropy(teacher, labels)}
        return terms
