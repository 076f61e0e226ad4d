"""Learn what the teacher's output layer reads, and nothing else; then give the student that output layer.

    L = || W f(student) + b - f(teacher) ||^2 / width;   the student's output layer becomes  V (W . + b) + c

f is what an output layer reads, (V, c) the teacher's output layer. No labels and no temperature. The paper's
projector is a small stack of convolutions, which makes the student larger; this one is linear, so that with the
teacher's output layer it is one matrix of the student's width, and the student stays what it is. For classifiers
whose output layer is a matrix of its own.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lfm.distill._contract import Folded, Taught, Terms
from lfm.distill._features import projections, regression
from lfm.method import Access, Data, Needs


class Simkd(Folded):
    needs = Needs(access=Access.WEIGHTS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/2203.14001"

    def connectors(self, teacher: Sequence[tuple[int, ...]], student: Sequence[tuple[int, ...]]) -> nn.Module:
        return projections(teacher, student)

    def terms(self, taught: Taught) -> Terms:
        return {"features": regression(taught)}

    def head(self, extras: nn.Module, teacher: nn.Linear) -> nn.Linear:
        assert isinstance(extras, nn.ModuleList)
        projection = extras[0]
        assert isinstance(projection, nn.Linear)
        made = nn.Linear(projection.in_features, teacher.out_features)
        with torch.no_grad():
            made.weight.copy_(teacher.weight @ projection.weight)
            made.bias.copy_(teacher.weight @ projection.bias)
            if teacher.bias is not None:
                made.bias.add_(teacher.bias)
        return made
