"""Let every model write candidates, compare them in pairs, and keep the one that wins most.

    answer = argmax_i sum_j P(candidate i is better than j)

The ranker is one of the models: asked which of two answers is better, in both orders (`judge`, an endpoint will do),
or by the mean log-probability that it gives to their tokens (`likelihood`). PairRanker of LLM-Blender, without
training it: Jiang et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import TextEnsemble

if TYPE_CHECKING:
    from lfm.models.handle import Backend, Model


class BestOf(TextEnsemble):
    needs = Needs(access=Access.LABELS, sources=(1, None))
    paper = "https://arxiv.org/abs/2306.02561"

    candidates: int = Field(1, ge=1, description="Answers from each model.")
    temperature: float = Field(0.8, gt=0, description="Of candidates, where there are several and none is asked for.")
    ranker: Literal["judge", "likelihood"] = Field("judge", description="How two answers are compared.")
    by: int = Field(1, ge=1, description="The model that compares, counted from 1.")

    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        from lfm.reuse.ensemble._answers import BestOfBackend, Candidates, chosen, ranker_of

        ranker = ranker_of(self.ranker, chosen(members, self.by, "by"))
        return BestOfBackend(Candidates(members, self.candidates, self.temperature), ranker)
