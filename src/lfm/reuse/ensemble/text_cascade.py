"""Ask a small language model first, and a larger one only where the small one is not sure of its answer.

    sure = exp(mean log p(token)),  the next model is asked where sure < threshold

A threshold of 0 never asks the larger ones, one of 1.01 always. The models are in order of size or cost; all but the
last must give log-probabilities of their tokens. Answers are told whole.

With `data`, all models but the last answer its prompts, and the share that goes on to each next model is kept for a
range of thresholds, with the mean confidence of the answers that stay: `curve.json`, the metrics, the report. It says
what a threshold costs, and not what it brings: a model can be sure and wrong, and the last one's answers are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Offered, TextEnsemble

if TYPE_CHECKING:
    from lfm.models.handle import Backend, Model
    from lfm.models.text import Prompt
    from lfm.reuse.ensemble._cost import CostCurve


class TextCascade(TextEnsemble):
    needs = Needs(access=Access.LABELS, sources=(2, None))
    paper = "https://arxiv.org/abs/2305.05176"
    measures = True

    threshold: float = Field(
        0.5, ge=0, le=1.01, description="Mean probability of a token below which the next is asked."
    )
    tokens: int = Field(64, ge=1, description="Tokens of an answer to a prompt of `data`, at most.")

    def problems(self, offered: Offered) -> Iterator[str]:
        for name, access in offered[:-1]:
            if access < Access.PROBS:
                yield (
                    f"{name}: offers labels, and all models but the last must tell how probable their tokens are; give "
                    "it `access: probs` if it does, or put it last"
                )

    def backend(self, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        from lfm.reuse.ensemble._answers import CascadeBackend

        return CascadeBackend(members, [self.threshold] * (len(members) - 1))

    def curve(self, members: Sequence[Model], prompts: Sequence[Prompt]) -> CostCurve:
        from lfm.reuse.ensemble._answers import confidences
        from lfm.reuse.ensemble._cost import cost_curve

        sure = confidences(members[:-1], prompts, self.tokens)
        return cost_curve(sure, sure, "mean confidence of what stays")
