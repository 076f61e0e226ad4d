"""Scores of how well a model would serve a task, from a small labelled sample and without training.

One file a score. Models need not know the sample's classes: what they make of the examples is compared with the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lfm.evaluate.transfer.centroid import centroid
from lfm.evaluate.transfer.h_score import h_score, h_score_shrunk
from lfm.evaluate.transfer.leep import leep
from lfm.evaluate.transfer.logme import logme
from lfm.evaluate.transfer.nce import nce
from lfm.method import Access

Kind = Literal["features", "probs", "answers"]
NEEDED = {"features": Access.LOGITS, "probs": Access.PROBS, "answers": Access.LABELS}


@dataclass(frozen=True)
class Score:
    """One way to score a model: what of it is looked at, and the function of that (n, ...) and labels (n,)."""

    of: Kind
    compute: Callable[[Any, Any], float]

    @property
    def access(self) -> Access:
        """What the model must offer."""
        return NEEDED[self.of]


SCORES: dict[str, Score] = {
    "logme": Score("features", logme),
    "h_score": Score("features", h_score),
    "h_score_shrunk": Score("features", h_score_shrunk),
    "leep": Score("probs", leep),
    "nce": Score("answers", nce),
    "centroid": Score("features", centroid),
}

__all__ = ["SCORES", "Score", "centroid", "h_score", "h_score_shrunk", "leep", "logme", "nce"]
