"""Match what the teacher says of the right class, and, with a weight of its own, how it ranks the others.

    L = CE(y, s) + ramp T^2 (alpha KL(b_t || b_s) + beta KL(p^_t || p^_s)),   b = (p_c, 1 - p_c)

c is the label, or without labels the teacher's first choice; p^ are the probabilities of the other classes among
themselves. KL(p_t || p_s) is the first term plus (1 - p_c of the teacher) times the second, which is therefore lost
where the teacher is sure: beta gives it back. The ramp rises from 0 to 1 over a first share of the steps, in the
paper 20 of 240 epochs. beta: 8, of teachers that are surer 6 or 2.
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import Matching, Taught, Terms
from lfm.distill._losses import cross_entropy, kl
from lfm.method import Access, Data, Needs


class Dkd(Matching):
    needs = Needs(access=Access.LOGITS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/2203.08679"

    temperature: float = Field(4.0, gt=0, description="T: higher shows more of how unlikely classes compare.")
    alpha: float = Field(1.0, ge=0, description="Weight of the right class against all others (TCKD).")
    beta: float = Field(8.0, ge=0, description="Weight of the others among themselves (NCKD).")
    labels: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the labels, where there are any.")
    ramp: float = Field(0.083, ge=0, le=1, description="Share of the steps over which alpha and beta rise from 0.")

    def terms(self, taught: Taught) -> Terms:
        teacher, student = taught.teacher.logits, taught.student.logits
        target = teacher.argmax(-1) if taught.labels is None else taught.labels
        tckd, nckd = _decoupled(teacher / self.temperature, student / self.temperature, target)
        scale = self.temperature**2 * (min(taught.progress / self.ramp, 1.0) if self.ramp else 1.0)
        terms = {"target": scale * self.alpha * tckd.mean(), "others": scale * self.beta * nckd.mean()}
        if taught.labels is not None and self.labels > 0:
            terms["labels"] = self.labels * cross_entropy(student, taught.labels)
        return terms


def _decoupled(teacher: torch.Tensor, student: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return TCKD and NCKD (n,) of logits (n, classes)."""
    among = ~functional.one_hot(target, teacher.shape[-1]).bool()
    binary, others = [], []
    for logits in (teacher, student):
        rest = logits[among].view(len(logits), -1)
        pair = torch.stack([logits.gather(-1, target[:, None])[:, 0], rest.logsumexp(-1)], -1)
        binary.append(pair.log_softmax(-1))
        others.append(rest.log_softmax(-1))
    return kl(*binary), kl(*others)
