"""Teach a student the texts that its teacher writes after the prompts of data (sequence-level distillation).

    y ~ teacher(. | x),   L = -log student(y | x) / |y|

Kim and Rush take the teacher's likeliest text, which temperature 0 comes near to; here it is sampled unless told
otherwise. It works for any two tokenizers and for any API, and is what other ways across tokenizers have to beat.
"""

from typing import Literal

from pydantic import Field

from lfm.distill._contract import Desk, Start, Written
from lfm.method import Access, Data, Needs


class Sequence(Written):
    needs = Needs(access=Access.LABELS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1606.07947"

    answers: Literal["best", "logits", "top_k", "text"] = Field(
        "text", description="What is used of the teacher: its text, or what it says of it besides."
    )
    prompt_words: int = Field(8, ge=1, description="Words of a plain text that are its prompt.")

    @property
    def opening(self) -> int:
        return self.prompt_words

    def start(self, number: int, desk: Desk) -> Start:
        return Start(prompt=desk.prompts[number % len(desk.prompts)])
