"""Steal with a generator that seeks where teacher and student differ, by gradients guessed from answers (DFME).

    L(x) = mean_k |l_k(x) - s_k(x)|,   l = log p - mean(log p),   p the teacher's answer, s the student's logits
    g(x) = (d / m) sum_j  [L(x + mu u_j) - L(x)] / mu  u_j,   u_j uniform on the unit sphere of the d pixels

The student minimises L, the generator maximises it through g, which is taken before its output is brought into the
range of pixels. One step of the generator and five of the student ask batch (m + 1 + 5) times; the paper spends 20
million queries. Unlike in the paper, the student takes AdamW with a cosine in place of SGD with steps, and where
`steps` are more than the queries pay for, it goes on learning from stored answers. Steps of mu vanish where a teacher
takes images of 8 bits, as endpoints do: there mu has to be 0.05 and more.
"""

import torch
from pydantic import Field

from lfm.distill._contract import Contested, Taught, Terms
from lfm.distill.black_box._contest import recovered
from lfm.method import Access, Needs


class Dfme(Contested):
    needs = Needs(access=Access.PROBS, trains=True)
    paper = "https://arxiv.org/abs/2011.14779"

    batch_size: int = Field(256, ge=2, description="Inputs in a batch.")

    def gap(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (recovered(teacher) - student).abs().mean(-1)

    def terms(self, taught: Taught) -> Terms:
        return {"l1": self.gap(taught.teacher.logits, taught.student.logits).mean()}
