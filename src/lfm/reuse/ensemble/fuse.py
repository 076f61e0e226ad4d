"""Let every model write an answer, show the best ones to one of the models, and let it write the final answer.

The prompt of the fuser holds the request and the candidates, the best first where they are ranked (see `best_of`), else
in the order of the models. Takes a fuser that follows instructions. GenFuser of LLM-Blender, without training it: Jiang
et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import TextEnsemble

if TYPE_CHECKING:
    from lfm.models.handle import Backend, Model


class Fuse(TextEnsemble):
    needs = Needs(access=Access.LABELS, sources=(1, None))
    paper = "https://arxiv.org/abs/2306.02561"

    fuser: int = Field(1, ge=1, description="The model that writes the final answer, counted from 1.")
    keep: int = Field(3, ge=1, description="Candidates that it is shown.")
    candidates: int = Field(1, ge=1, description="Answers from each model.")
    temperature: float = Field(0.8, gt=0, description="Of candidates, where there are several and none is asked for.")
    ranker: Literal["no", "judge", "likelihood"] = Field("judge", description="How candidates are compared, if so.")
    by: int = Field(1, ge=1, description="The model that compares, counted from 1.")

    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        from lfm.reuse.ensemble._answers import Candidates, FuseBackend, chosen, ranker_of

        ranker = None if self.ranker == "no" else ranker_of(self.ranker, chosen(members, self.by, "by"))
        candidates = Candidates(members, self.candidates, self.temperature)
        return FuseBackend(candidates, ranker, chosen(members, self.fuser, "fuser"), self.keep)
