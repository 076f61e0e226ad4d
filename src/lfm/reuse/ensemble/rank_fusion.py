"""Add up the places that models give to each class (reciprocal rank fusion).

    score(y) = sum_i w_i / (k + rank_i(y)),   rank 1 for the most probable class

Only the order counts, so members need no common scale: a member whose probabilities are far too sure weighs no more
than others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State


class RankFusion(Ensemble):
    needs = Needs(access=Access.PROBS, sources=(2, None))
    paper = "https://doi.org/10.1145/1571941.1572114"
    weighted = True

    k: float = Field(60.0, ge=0, description="The larger, the less the first places stand out.")

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        total = torch.zeros(0)
        for index, weight in enumerate(weights):
            order = members.log_probs(index).argsort(dim=-1, descending=True, stable=True)
            ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(1, order.shape[-1] + 1).expand_as(order))
            part = weight / (self.k + ranks.float())
            total = part if not index else total + part
        return (total / total.sum(-1, keepdim=True)).log()
