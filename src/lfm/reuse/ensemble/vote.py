"""Let each model vote for one class; the class with the most votes wins.

    votes(y) = sum_i w_i [argmax_y' p_i(y') = y]

It takes labels alone, so it works for models that tell nothing else. The answer's probabilities are shares of the
votes. Of several classes with the most votes, `ties` says which one wins:

- `weight`: the one that the heaviest model voted for, of equally heavy models the earlier. It takes nothing that the
  vote itself does not, and believes whom the weights believe; therefore it is the default.
- `first`: the one that the earliest model voted for, whatever its weight.
- `probable`: the one of the largest sum_i w_i p_i(y), for models that give probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, Offered, State

ROUNDING = 1e-9  # relative, of a sum of weights: less than any difference that could be meant
LEAD = 1e-6  # share of the votes that a winner among equals is given: what float32 can tell apart


class Vote(Ensemble):
    needs = Needs(access=Access.LABELS, sources=(2, None))
    paper = "https://doi.org/10.1007/3-540-45014-9_1"
    weighted = True

    ties: Literal["weight", "first", "probable"] = Field(
        "weight", description="Which of the classes with the most votes wins: see above."
    )

    def problems(self, offered: Offered) -> Iterator[str]:
        if self.ties == "probable":
            for name, access in offered:
                if access < Access.PROBS:
                    yield (
                        f"{name}: offers labels, and `ties: probable` compares probabilities; use `ties: weight`, or "
                        "give the model `access: probs` if it tells them"
                    )

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        ballots = torch.stack([members.labels(index) for index in range(len(members))])
        votes = torch.zeros(ballots.shape[1], members.knows.shape[1], dtype=torch.float64)
        for ballot, weight in zip(ballots, weights, strict=True):
            votes.scatter_add_(1, ballot[:, None], torch.full((len(votes), 1), weight, dtype=torch.float64))
        shares = votes / votes.sum(1, keepdim=True)
        most = shares >= shares.amax(1, keepdim=True) * (1 - ROUNDING)
        tied = (most.sum(1) > 1).nonzero()[:, 0]
        if len(tied):
            shares[tied, self._winners(members, weights, ballots, most, tied)] += LEAD
        return (shares / shares.sum(1, keepdim=True)).log().float()

    def _winners(
        self, members: Members, weights: Sequence[float], ballots: torch.Tensor, most: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the class (m,) that wins in each of `rows`, one of those with the `most` votes (n, classes)."""
        voters = [index for index, weight in enumerate(weights) if weight > 0]
        if self.ties == "probable":
            said = [weights[index] * members.log_probs(index, rows).exp() for index in voters]
            return torch.stack(said).sum(0).masked_fill(~most[rows], -1).argmax(1)
        order = sorted(voters, key=lambda index: -weights[index]) if self.ties == "weight" else voters
        chosen = torch.zeros(len(rows), dtype=torch.long)
        for index in reversed(order):
            theirs = ballots[index, rows]
            chosen = torch.where(most[rows, theirs], theirs, chosen)
        return chosen
