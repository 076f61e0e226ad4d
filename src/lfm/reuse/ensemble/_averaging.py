"""Averages of log-probabilities, and the weights that make the best of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from lfm.reuse.ensemble._stepping import averaged


def best_weights(said: torch.Tensor, labels: torch.Tensor, of: str) -> torch.Tensor:
    """Return the weights (members,) of the average with the least negative log-likelihood.

    `said` are log-probabilities (members, n, classes), float64. For probabilities by expectation maximisation, which
    never leaves the simplex and cannot overshoot; for logits, whose loss is convex, by LBFGS on a softmax.
    """
    if of == "probabilities":
        right = said.gather(-1, labels.expand(len(said), -1)[..., None])[..., 0].exp()
        weights = torch.full((len(said),), 1 / len(said), dtype=torch.float64)
        for _ in range(500):
            shares = weights[:, None] * right
            weights = (shares / shares.sum(0).clamp_min(1e-300)).mean(1)
            weights = weights / weights.sum()
        return weights
    finite = said.clamp_min(-1e4)

    def loss(free: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((free.softmax(0)[:, None, None] * finite).sum(0), labels)

    return minimised(loss, torch.zeros(len(said), dtype=torch.float64), steps=100).softmax(0)


def minimised(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the numbers at which a smooth convex loss is least, by LBFGS from `start`."""
    free = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([free], max_iter=steps, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        found = loss(free)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimiser.step(step)  # type: ignore[no-untyped-call]
    return free.detach()


def best_temperature(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the T > 0 for which softmax(scores / T) gives the labels the highest likelihood (Guo et al. 2017).

    Labels that are ruled out are left out: no temperature gives them any mass. It is 1 where nothing is left.
    """
    possible = scores.gather(-1, labels[:, None])[:, 0].isfinite()
    if not possible.any():
        return 1.0
    finite, labels = scores[possible].double().clamp_min(-1e4), labels[possible]
    low, high = -3.0, 3.0  # of the logarithm; the loss has one minimum in 1/T
    for _ in range(60):
        thirds = [low + (high - low) / 3, high - (high - low) / 3]
        losses = [float(functional.cross_entropy(finite / torch.tensor(t).exp(), labels)) for t in thirds]
        low, high = (low, thirds[1]) if losses[0] < losses[1] else (thirds[0], high)
    return float(torch.tensor((low + high) / 2).exp())


__all__ = ["averaged", "best_temperature", "best_weights", "minimised"]
