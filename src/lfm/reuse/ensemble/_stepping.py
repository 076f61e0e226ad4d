"""Next tokens by several models of one vocabulary: every member reads the text with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from lfm.models.writing import Stepper

Of = Literal["probabilities", "logits"]


class AveragedStepper(Stepper):
    """Averages what its members say of the next token; one of weight 1 beside zeros is reproduced bit for bit.

        probabilities:  log p = log sum_i w_i p_i
        logits:         p ~ exp(sum_i w_i log p_i)

    Weights are made to sum to 1; members of weight 0 are never asked. The logits of each member are divided by its
    temperature, those of the average by `temperature`.
    """

    def __init__(
        self,
        members: Sequence[Stepper],
        weights: Sequence[float],
        of: Of = "probabilities",
        temperatures: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        asked = [index for index, weight in enumerate(weights) if weight > 0]
        self._members = [members[index] for index in asked]
        self._weights = torch.tensor([weights[index] / sum(weights) for index in asked])
        self._temperatures = None if temperatures is None else [temperatures[index] for index in asked]
        self._temperature = temperature
        self._of = of

    @property
    def pads(self) -> bool:
        return all(member.pads for member in self._members)

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._average([member.start(prompts) for member in self._members])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._average([member.step(tokens) for member in self._members])

    def select(self, rows: torch.Tensor) -> None:
        for member in self._members:
            member.select(rows)

    def _average(self, said: list[torch.Tensor]) -> torch.Tensor:
        if self._temperatures is not None:
            said = [warmed(member, each) for member, each in zip(said, self._temperatures, strict=True)]
        return warmed(averaged(said, self._weights, self._of), self._temperature)


def warmed(said: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log-probabilities at a temperature; those at 1 as they are."""
    return said if temperature == 1 else (said / temperature).log_softmax(-1)


def averaged(said: Sequence[torch.Tensor], weights: torch.Tensor, of: Of) -> torch.Tensor:
    """Return log-probabilities (n, vocabulary) from those of each member, weighted by `weights` (members,)."""
    if len(said) == 1:
        return said[0]
    device = said[0].device
    if of == "logits":
        # 0 * -inf is no number: what any member rules out is ruled out
        parts = [weight * member.to(device) for weight, member in zip(weights.tolist(), said, strict=True)]
        return torch.stack(parts).sum(0).log_softmax(-1)
    total = said[0] + weights[0].log().to(device)
    for weight, member in zip(weights[1:], said[1:], strict=True):
        total = torch.logaddexp(total, member.to(device) + weight.log().to(device))
    return total
