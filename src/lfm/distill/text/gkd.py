"""Teach a language model on texts of its own, which the teacher judges token by token (generalised, on-policy).

    y ~ student(. | x) with probability lmbda, else of the data or the teacher;   m = beta p + (1 - beta) q
    L = T^2 mean over tokens of y of  beta KL(p || m) + (1 - beta) KL(q || m),   p the teacher, q the student at T

Its limits are defined as KL(p || q) at beta 0 and KL(q || p) at 1. No gradient goes through the sampling, and the loss
is on the tokens of completions alone. Unlike in TRL, T^2 keeps the size of gradients when T changes, and T does not set
the temperature that texts are sampled with.
"""

from typing import Literal

from pydantic import Field

from lfm.distill._contract import OnPolicy, Taught, Terms
from lfm.distill._losses import jensen_shannon
from lfm.method import Access, Data, Needs


class Gkd(OnPolicy):
    needs = Needs(access=Access.PROBS, data=Data.UNLABELLED, trains=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2306.13649"

    lmbda: float = Field(0.5, ge=0, le=1, description="Probability that the student writes the texts of a batch.")
    beta: float = Field(0.5, ge=0, le=1, description="Weight of the teacher in the mixture; 0 and 1 are the two KLs.")
    seq_kd: bool = Field(False, description="Let the teacher write what the student does not, in place of the data.")
    temperature: float = Field(1.0, gt=0, description="T: temperature of both models' probabilities in the loss.")

    def author(self, chance: float) -> Literal["student", "teacher", "data"]:
        if chance < self.lmbda:
            return "student"
        return "teacher" if self.seq_kd else "data"

    def terms(self, taught: Taught) -> Terms:
        found = jensen_shannon(
            taught.teacher.logits, taught.student.logits, beta=self.beta, temperature=self.temperature
        )
        return {"jsd": found}
