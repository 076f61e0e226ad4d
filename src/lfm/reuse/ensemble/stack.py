"""Learn how to join models: a multinomial logistic regression on what they all say.

    p(y | x) = softmax(b + sum_i A_i log p_i(. | x))_y,   A, b by maximum likelihood on held-out data, with a penalty

It finds out which member to believe about which class, and what it means when they differ. It needs as many held-out
examples as it has numbers to learn, or a strong penalty; the penalty pulls towards the plain average of the logits.
With `folds`, the penalty is the one under which each part of the data is the most likely by what the others teach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch.nn import functional

from lfm.method import Access, Data, Needs
from lfm.reuse.ensemble._averaging import minimised
from lfm.reuse.ensemble._contract import Ensemble, Members, State

FLOOR = -20.0  # log-probabilities below say no more than this one
PENALTIES = tuple(10 ** (step / 2) for step in range(-10, 3))  # 1e-5 to 10


class Stack(Ensemble):
    needs = Needs(access=Access.PROBS, data=Data.FEW, sources=(1, None))
    paper = "https://doi.org/10.1016/S0893-6080(05)80023-1"

    penalty: float = Field(0.01, ge=0, description="Weight of the squared distance from the average of the logits.")
    folds: int = Field(0, ge=0, description="Choose the penalty by so many folds of `data`; below 2, take it as is.")
    steps: int = Field(200, ge=1, description="Iterations of LBFGS at most.")

    @property
    def learns(self) -> bool:
        return True

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        said = _features(members).double()
        prior = torch.eye(members.knows.shape[1], dtype=torch.float64).repeat(len(members), 1) / len(members)
        penalty = self.penalty if self.folds < 2 else self._best_penalty(said, labels, prior)
        matrix, bias = self._fitted(said, labels, prior, penalty)
        chosen = {"penalty": torch.tensor(penalty, dtype=torch.float64)} if self.folds >= 2 else {}
        return {"matrix": matrix.float(), "bias": bias.float(), **chosen}

    def _best_penalty(self, said: torch.Tensor, labels: torch.Tensor, prior: torch.Tensor) -> float:
        """Return the penalty of the least loss on parts (each with its share of every class) left out of the fit."""
        place = torch.empty_like(labels)
        place[labels.argsort(stable=True)] = torch.arange(len(labels)) % self.folds
        losses = dict.fromkeys(PENALTIES, 0.0)
        for fold in range(min(self.folds, len(labels))):
            left, kept = place == fold, place != fold
            for penalty in PENALTIES:
                matrix, bias = self._fitted(said[kept], labels[kept], prior, penalty)
                scores = said[left] @ matrix + bias
                losses[penalty] += float(functional.cross_entropy(scores, labels[left], reduction="sum"))
        return min(losses, key=lambda penalty: losses[penalty])

    def _fitted(
        self, said: torch.Tensor, labels: torch.Tensor, prior: torch.Tensor, penalty: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (members * classes, classes) and b (classes,), float64."""

        def loss(free: torch.Tensor) -> torch.Tensor:
            change, bias = free[:-1], free[-1]
            return functional.cross_entropy(said @ (prior + change) + bias, labels) + penalty * change.square().sum()

        found = minimised(loss, prior.new_zeros(len(prior) + 1, prior.shape[1]), self.steps)
        return prior + found[:-1], found[-1]

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        return (_features(members) @ state["matrix"] + state["bias"]).log_softmax(-1)


def _features(members: Members) -> torch.Tensor:
    """Return what all members say, side by side (n, members * classes)."""
    return torch.cat([members.log_probs(index).clamp_min(FLOOR) for index in range(len(members))], dim=-1)
