"""Match hidden states first, which is knowledge of any task, and then the answers to one: two stages in one run.

    L = weight mean_l || W_l h_l(student) + b_l - h_l(teacher) ||^2 / width     in the first share of steps (`generic`)
    L = alpha T^2 KL(teacher || student) + (1 - alpha) CE(y, s)          in the rest

The paper's first stage has a self-supervised teacher, before it was tuned, and other images: that is one step of a
recipe with `generic: 1` and that teacher, and after it one of `response`. In one run both stages share teacher, data,
and schedule of the learning rate.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import nn

from lfm.distill._contract import Inside, Taught, Terms
from lfm.distill._features import projections, regression
from lfm.method import Access, Data, Needs


class G2sd(Inside):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/2302.14771"

    generic: float = Field(0.25, ge=0, le=1, description="Share of the steps in which hidden states are matched.")
    weight: float = Field(100.0, ge=0, description="Weight of the hidden states, for gradients of about one size.")
    layers: Literal["last", "all"] | dict[int, int] = Field(
        "all", description="Which layers are matched, as in `fitnets`."
    )

    def connectors(self, teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module:
        return projections(teacher, student)

    def terms(self, taught: Taught) -> Terms:
        if taught.progress < self.generic:
            return {"hidden": self.weight * regression(taught)}
        return self.answers(taught)
