"""What a cascade costs: of how many examples each further model is asked, for every threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

THRESHOLDS = (*(step / 20 for step in range(20)), 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 1.01)
TOLD = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)  # of these, those that become metrics
ASKED = "models asked"


@dataclass(frozen=True)
class CostCurve:
    """How good the answers of a cascade are, and which share of the examples goes on to each model, by threshold."""

    examples: int
    measure: str  # what `quality` is
    thresholds: tuple[float, ...]
    quality: tuple[float | None, ...]
    shares: tuple[tuple[float, ...], ...]  # of each threshold, of each model but the first

    def metrics(self, models: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Yield a few of the points, under names; `models` are called so, in their order."""
        for threshold, quality, shares in zip(self.thresholds, self.quality, self.shares, strict=True):
            if threshold not in TOLD:
                continue
            if quality is not None:
                yield f"{self.measure} at threshold {threshold:g}", quality
            for model, share in zip(models[1:], shares, strict=True):
                yield f"share asked of {model} at threshold {threshold:g}", share

    def as_dict(self, models: Sequence[str]) -> dict[str, Any]:
        """Return all of it as columns, with what to draw of them: see `lfm.recipe.summary`."""
        measure = f"{self.measure}, %"
        asked = {f"asked of {model}, %": [100 * row[i] for row in self.shares] for i, model in enumerate(models[1:])}
        columns: Mapping[str, Sequence[float | None]] = {
            "threshold": self.thresholds,
            measure: [None if value is None else 100 * value for value in self.quality],
            ASKED: [1 + sum(row) for row in self.shares],
            **asked,
        }
        charts = [
            {"title": "what asking more models brings", "x": ASKED, "y_label": measure, "y": [measure]},
            {"title": "what a threshold costs", "x": "threshold", "y_label": "asked, %", "y": list(asked)},
        ]
        return {"examples": self.examples, "columns": columns, "charts": charts}


def who_answers(sure: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return which model (n,) answers: the first that is sure enough, else the last; `sure` is (models - 1, n)."""
    enough = torch.cat([sure >= threshold, torch.ones(1, sure.shape[1], dtype=torch.bool)])
    return enough.int().argmax(0)


def cost_curve(sure: torch.Tensor, worth: torch.Tensor, measure: str) -> CostCurve:
    """Return the curve from how sure each model but the last is (models - 1, n), and what its answers are worth.

    `worth` is (models, n), or (models - 1, n) where nothing is known of the last one's answers: these are left out.
    """
    quality: list[float | None] = []
    shares = []
    for threshold in THRESHOLDS:
        who = who_answers(sure, threshold)
        known = (who < len(worth)).nonzero()[:, 0]
        quality.append(float(worth[who[known], known].mean()) if len(known) else None)
        shares.append(tuple(float((who >= model).double().mean()) for model in range(1, len(sure) + 1)))
    return CostCurve(sure.shape[1], measure, THRESHOLDS, tuple(quality), tuple(shares))
