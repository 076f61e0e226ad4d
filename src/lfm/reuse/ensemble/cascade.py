"""Ask the small model first, and the next larger one only where it is not sure.

    answer = p_1 where max_y p_1(y) >= threshold, else p_2 where it is sure, ... , else p_n

Members stand in the order in which they are asked, the cheapest first. A threshold of 0 never asks the second. With
`data`, `quality` chooses the lowest threshold whose accuracy on it is at least that share of what the last member
reaches; the curve of accuracy against calls goes into the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State

CURVE = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)


class Cascade(Ensemble):
    needs = Needs(access=Access.PROBS, sources=(2, None))
    paper = "https://arxiv.org/abs/2305.05176"

    threshold: float = Field(0.9, ge=0, le=1.01, description="Confidence from which an answer stands; 0 to 1.")
    quality: float | None = Field(
        None, gt=0, description="Choose the threshold by `data`: this share of the last member's accuracy, cheapest."
    )

    @property
    def learns(self) -> bool:
        return self.quality is not None

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        said = [members.log_probs(index) for index in range(len(members))]
        sure = torch.stack([part.exp().amax(-1) for part in said])
        right = torch.stack([(part.argmax(-1) == labels).double() for part in said])
        tries = sorted({0.0, 1.01, *sure[:-1].quantile(torch.linspace(0, 1, 101, dtype=sure.dtype)).tolist()})
        wanted = float(self.quality or 1.0) * float(right[-1].mean())
        enough = [t for t in tries if float(_answered(right, sure, t)[0]) >= wanted]
        chosen = min(enough, default=1.01)
        curve = torch.tensor([(t, *_answered(right, sure, t)) for t in CURVE], dtype=torch.float64)
        return {"threshold": torch.tensor(chosen, dtype=torch.float64), "curve": curve}

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        threshold = float(state["threshold"]) if "threshold" in state else self.threshold
        found = members.log_probs(0).clone()
        open_ = torch.arange(len(found))
        for index in range(1, len(members)):
            open_ = open_[found[open_].exp().amax(-1) < threshold]
            if not len(open_):
                break
            found[open_] = members.log_probs(index, open_)
        return found


def _answered(right: torch.Tensor, sure: torch.Tensor, threshold: float) -> tuple[float, float]:
    """Return the accuracy of a cascade, and the share of examples that go beyond the first member."""
    last = len(right) - 1
    who = torch.full((right.shape[1],), last)
    for index in range(last - 1, -1, -1):
        who[sure[index] >= threshold] = index
    return float(right.gather(0, who[None]).mean()), float((who > 0).double().mean())
