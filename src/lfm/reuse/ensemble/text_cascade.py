"""Ask a small language model first, and a larger one only where the small one is not sure of its answer.

    sure = exp(mean log p(token)),  the next model is asked where sure < threshold

A threshold of 0 never asks the larger ones, one of 1 nearly always. The models are in order of size or cost; all but
the last must give log-probabilities of their tokens. Answers are told whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import TextEnsemble

if TYPE_CHECKING:
    from lfm.models.handle import Backend, Model


class TextCascade(TextEnsemble):
    needs = Needs(access=Access.LABELS, sources=(2, None))
    paper = "https://arxiv.org/abs/2305.05176"

    threshold: float = Field(0.5, ge=0, le=1, description="Mean probability of a token below which the next is asked.")

    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        from lfm.reuse.ensemble._answers import CascadeBackend

        return CascadeBackend(members, [self.threshold] * (len(members) - 1))
