"""Ask one model alone, the one that was right about the most similar examples of `data`.

    i(x) = argmax_i  sum over the k examples z most similar to x of p_i(y_z | z);   p(y | x) = p_i(x)(y | x)

For specialists: `data` holds examples of all their tasks, and which model is good at which is found out from them.
What is like none of the examples goes to the first model, so let that be the one they were all made from. Models may
know different classes. Examples are compared without asking anybody, by pooled pixels or by words (`by: input`), or by
what the first model says of them (`by: first`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional

from lfm.method import Access, Data, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State
from lfm.reuse.ensemble._likeness import rarity

ROUNDING = 1e-5  # of a cosine in float32: equal examples are as similar as can be


class Route(Ensemble):
    needs = Needs(access=Access.PROBS, data=Data.FEW, sources=(2, None))
    paper = "https://arxiv.org/abs/2302.03202"
    one_set = False

    by: Literal["input", "first"] = Field("input", description="What makes examples similar.")
    k: int = Field(16, ge=1, description="Examples that decide.")
    unlike: float = Field(
        0.01, ge=0, lt=1, description="Inputs less similar to any example than this share of the examples: unknown."
    )

    @property
    def learns(self) -> bool:
        return True

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        seen = self._features(members)
        state = {"rarity": rarity(seen)}
        state["centre"] = (seen * state["rarity"]).mean(0)
        state["examples"] = _directions(seen, state)
        right = [members.log_probs(index).gather(1, labels[:, None])[:, 0].exp() for index in range(len(members))]
        alike = (state["examples"] @ state["examples"].T).fill_diagonal_(-torch.inf).amax(1).double()
        least = alike.quantile(self.unlike) - ROUNDING if self.unlike else -torch.inf
        return {**state, "right": torch.stack(right), "threshold": torch.as_tensor(least, dtype=torch.float64)}

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        chosen = self._chosen(members, state)
        found = torch.full((len(chosen), members.knows.shape[1]), -torch.inf)
        for index in range(len(members)):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                found[rows] = members.log_probs(index, rows)
        return found

    def _chosen(self, members: Members, state: State) -> torch.Tensor:
        """Return the member (n,) that answers for each example."""
        alike = _directions(self._features(members), state) @ state["examples"].T
        nearest = alike.topk(min(self.k, alike.shape[1]))
        best = state["right"][:, nearest.indices].sum(-1).argmax(0)
        return best.masked_fill(nearest.values[:, 0] < float(state["threshold"]), 0)

    def _features(self, members: Members) -> torch.Tensor:
        if self.by == "input":
            return members.looks()
        said = members.log_probs(0).exp()
        return said[:, members.knows[0]]


def _directions(features: torch.Tensor, state: State) -> torch.Tensor:
    """Return features (n, width) of length 1, as seen from the middle of the examples."""
    return functional.normalize(features * state["rarity"] - state["centre"], dim=1)
