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

from lfm.distill._contract import BlackBox, Inquirer, Inquiry, Taught, Terms
from lfm.distill.black_box._contest import Contest, Rules, recovered
from lfm.method import Access, Needs


class Dfme(BlackBox):
    needs = Needs(access=Access.PROBS, trains=True)
    paper = "https://arxiv.org/abs/2011.14779"

    batch_size: int = Field(256, ge=2, description="Inputs in a batch.")
    directions: int = Field(1, ge=1, description="Random directions for a gradient (m).")
    mu: float = Field(1e-3, gt=0, description="Length of a step along them.")
    student_steps: int = Field(5, ge=1, description="Steps of the student for each of the generator's.")
    generator_rate: float = Field(1e-4, gt=0, description="Learning rate of the generator (Adam).")
    latent: int = Field(256, ge=1, description="Random numbers that an image is made from.")
    width: int = Field(64, ge=2, description="Channels of the generator.")

    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        return Contest(inquiry, self._rules(), _gap, self.generator_rate)

    def lessons(self, queries: int) -> int:
        return self._rules().lessons(queries, self.batch_size, self.asking)

    def terms(self, taught: Taught) -> Terms:
        return {"l1": _gap(taught.teacher.logits, taught.student.logits).mean()}

    def _rules(self) -> Rules:
        return Rules(1, self.student_steps, 0, self.directions, self.mu, self.latent, self.width)


def _gap(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return (recovered(teacher) - student).abs().mean(-1)
