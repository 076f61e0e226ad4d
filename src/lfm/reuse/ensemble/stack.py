"""Learn how to join models: a multinomial logistic regression on what they all say.

    p(y | x) = softmax(b + sum_i A_i log p_i(. | x))_y,   A, b by maximum likelihood on held-out data, with a penalty

It finds out which member to believe about which class, and what it means when they differ. It needs as many held-out
examples as it has numbers to learn, or a strong penalty; the penalty pulls towards the plain average of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch.nn import functional

from lfm.method import Access, Data, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State

FLOOR = -20.0  # log-probabilities below say no more than this one


class Stack(Ensemble):
    needs = Needs(access=Access.PROBS, data=Data.FEW, sources=(1, None))
    paper = "https://doi.org/10.1016/S0893-6080(05)80023-1"

    penalty: float = Field(0.01, ge=0, description="Weight of the squared distance from the average of the logits.")
    steps: int = Field(200, ge=1, description="Iterations of LBFGS at most.")

    @property
    def learns(self) -> bool:
        return True

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        said = _features(members).double()
        classes = members.knows.shape[1]
        prior = torch.eye(classes, dtype=torch.float64).repeat(len(members), 1) / len(members)
        change = torch.zeros(len(prior), classes, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([change, bias], max_iter=self.steps, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            found = functional.cross_entropy(said @ (prior + change) + bias, labels)
            found = found + self.penalty * change.square().sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimiser.step(loss)  # type: ignore[no-untyped-call]
        return {"matrix": (prior + change).detach().float(), "bias": bias.detach().float()}

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        return (_features(members) @ state["matrix"] + state["bias"]).log_softmax(-1)


def _features(members: Members) -> torch.Tensor:
    """Return what all members say, side by side (n, members * classes)."""
    return torch.cat([members.log_probs(index).clamp_min(FLOOR) for index in range(len(members))], dim=-1)
