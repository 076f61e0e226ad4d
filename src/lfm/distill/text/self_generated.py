"""Teach a language model with texts that its teacher makes up, and no data at all.

    x ~ teacher,   L = T^2 KL(teacher(x) || student(x))   over all tokens, over the top k and a tail, or -log student(x)

What is used of the teacher is the best that it offers, or less (`answers`). With `begin: vocabulary` texts begin with
each token of the vocabulary in turn and three to five that follow greedily, then they are sampled (LLM-QAT): more
varied, and less like what the teacher was trained on. With `prompts`, such as topics, the teacher goes on from these,
and what it writes is learned. Texts are sampled in batches, with a cache of keys and values.
"""

from typing import Literal

from pydantic import Field

from lfm.distill._contract import Desk, Start, Written
from lfm.method import Access, Needs


class SelfGenerated(Written):
    needs = Needs(access=Access.LABELS, trains=True)
    paper = "https://arxiv.org/abs/2305.17888"

    begin: Literal["start", "vocabulary"] = Field(
        "start", description="What texts begin with: what begins all texts, or each token of the vocabulary in turn."
    )
    prompts: list[str] = Field([], description="Texts to go on from, in turn, such as topics or class names.")

    def start(self, number: int, desk: Desk) -> Start:
        if self.prompts:
            return Start(prompt=self.prompts[number % len(self.prompts)])
        if self.begin == "start":
            return Start()
        return Start(token=desk.vocabulary[number % len(desk.vocabulary)], greedy=3 + number % 3)
