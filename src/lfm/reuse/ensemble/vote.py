"""Let each model vote for one class; the class with the most votes wins.

    votes(y) = sum_i w_i [argmax_y' p_i(y') = y]

It takes labels alone, so it works for models that tell nothing else. Ties go to the class that a heavier or earlier
member voted for. The answer's probabilities are shares of the votes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State


class Vote(Ensemble):
    needs = Needs(access=Access.LABELS, sources=(2, None))
    paper = "https://doi.org/10.1007/3-540-45014-9_1"
    weighted = True

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        order = sorted(range(len(members)), key=lambda index: -weights[index])
        ballots = {index: members.labels(index) for index in order}
        votes = torch.zeros(len(ballots[0]), members.knows.shape[1], dtype=torch.float64)
        for rank, index in enumerate(order):
            # Less than any difference between sums of weights could be meant to be, more than rounding.
            first = weights[index] * (1 + 1e-9 * (len(order) - rank))
            votes.scatter_add_(1, ballots[index][:, None], torch.full((len(votes), 1), first, dtype=torch.float64))
        return (votes / votes.sum(1, keepdim=True)).log().float()
