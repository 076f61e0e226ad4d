"""Train members that share their weights and differ by a vector on each side of every layer, all of them at once.

    W_i = W o (s_i r_i^T),   computed as   W_i x = (W (x o r_i)) o s_i
    p = 1/M sum_i p(. | x; W_i)

A member costs one vector for the inputs of a layer, one for its outputs, and biases, where a model costs a matrix; all
members answer in one pass of M times the batch. Vectors are drawn around 1, or are random signs (`start: signs`), for
long runs from scratch: members differ more then, and a model that was trained before is broken by them.

Norms, embeddings and whatever else is no matrix are shared. A member adds b o s_i + c_i, with c_i = 0 at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from lfm.method import Access, Data, Needs
from lfm.reuse.ensemble._contract import Course, JointEnsemble, Layer, State


class BatchEnsemble(JointEnsemble):
    needs = Needs(access=Access.WEIGHTS, data=Data.LABELLED, trains=True)
    paper = "https://arxiv.org/abs/2002.06715"

    start: Literal["normal", "signs"] = Field(
        "normal", description="What vectors are drawn from: numbers around 1, or 1 and -1 evenly."
    )
    spread: float = Field(0.5, ge=0, description="Standard deviation of the numbers around 1.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps over which the learning rate rises.")

    def course(self, steps: int) -> Course:
        rising = math.ceil(self.warmup * steps)

        def rate(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return (math.cos(math.pi * (step - rising) / max(1, steps - rising)) + 1) / 2

        return Course(steps, rate, (steps,))

    def draw(self, layers: Sequence[Layer], chance: torch.Generator) -> State:
        state: State = {}
        for layer in layers:
            state[f"r.{layer.name}"] = self._vectors(layer.reads, chance)
            state[f"s.{layer.name}"] = self._vectors(layer.writes, chance)
            if layer.shifts:
                state[f"c.{layer.name}"] = torch.zeros(self.members, layer.writes)
        return state

    def _vectors(self, width: int, chance: torch.Generator) -> torch.Tensor:
        """Return a vector for each member (members, width)."""
        if self.start == "signs":
            return torch.randint(0, 2, (self.members, width), generator=chance).float() * 2 - 1
        return 1 + self.spread * torch.randn(self.members, width, generator=chance)
