"""Ask the small model first, and the next larger one only where it is not sure.

    answer = p_1 where max_y p_1(y) >= threshold, else p_2 where it is sure, ... , else p_n

Members stand in the order in which they are asked, the cheapest first. A threshold of 0 never asks the second. With
`data`, `quality` chooses the lowest threshold whose accuracy on it is at least that share of what the last member
reaches. Whenever there is `data`, all members are asked about all of it, and the accuracy and the share of it that goes
on to each next member are kept for a range of thresholds: `curve.json`, the metrics, the report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State
from lfm.reuse.ensemble._cost import CostCurve, cost_curve, who_answers


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
        sure, right = _sure_and_right(members, labels)
        tries = sorted({0.0, 1.01, *sure.quantile(torch.linspace(0, 1, 101, dtype=sure.dtype)).tolist()})
        wanted = float(self.quality or 1.0) * float(right[-1].mean())
        accuracy = {t: float(right.gather(0, who_answers(sure, t)[None]).mean()) for t in tries}
        chosen = min((t for t in tries if accuracy[t] >= wanted), default=1.01)
        return {"threshold": torch.tensor(chosen, dtype=torch.float64)}

    def curve(self, members: Members, labels: torch.Tensor) -> CostCurve:
        return cost_curve(*_sure_and_right(members, labels), "accuracy")

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


def _sure_and_right(members: Members, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how sure each member but the last is (members - 1, n), and whether each is right (members, n)."""
    said = [members.log_probs(index) for index in range(len(members))]
    sure = torch.stack([part.exp().amax(-1) for part in said[:-1]])
    return sure, torch.stack([(part.argmax(-1) == labels).double() for part in said])
