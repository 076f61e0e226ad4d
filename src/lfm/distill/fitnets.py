"""Match hidden states: the student's, by a learned linear map of the teacher's width, are drawn to the teacher's.

    L = L_answers + weight mean_l || W_l h_l(student) + b_l - h_l(teacher) ||^2 / width

With `layers: all` it is how small encoders are taught (TinyBERT). The maps are trained along and thrown away; of one
width they begin as a copy. Padding takes no part; of images of two sizes the larger is averaged down. The paper uses
a non-linear regressor and a stage of its own; here all is learned at once (a stage of its own: `g2sd`).
"""

from collections.abc import Sequence

from pydantic import Field
from torch import nn

from lfm.distill._contract import Inside, Taught, Terms
from lfm.distill._features import projections, regression
from lfm.method import Access, Data, Needs


class Fitnets(Inside):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1412.6550"

    weight: float = Field(1.0, ge=0, description="Weight of the hidden states.")

    def connectors(self, teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module:
        return projections(teacher, student)

    def terms(self, taught: Taught) -> Terms:
        return {**self.answers(taught), "hidden": self.weight * regression(taught)}
