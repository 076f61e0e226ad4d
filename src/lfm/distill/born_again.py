"""Let each generation of students teach the next, which is like itself: the last one is written.

    L_1 = L_answers(teacher, s_1),   L_k = L_answers(s_{k-1}, s_k),   L_answers = alpha T^2 KL + (1 - alpha) CE(y, s)

Each student begins anew, one with new weights from other ones (a seed of its own), and its teacher no longer changes.
Each takes the steps that were asked for. Teacher and student may be of one kind, as in the paper.
"""

from pydantic import Field

from lfm.distill._contract import Successive, Taught, Terms
from lfm.method import Access, Data, Needs


class BornAgain(Successive):
    needs = Needs(access=Access.PROBS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1805.04770"

    temperature: float = Field(1.0, gt=0, description="Temperature of both models' probabilities (T); 1 in the paper.")
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the teacher, against the labels; 1 without labels.")

    def terms(self, taught: Taught) -> Terms:
        return self.answers(taught)
