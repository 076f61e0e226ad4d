"""Add up what fine-tunes of one base have learned, in the linear model that touches the base.

    f(x) = f(x; w_0) + J(x; w_0) sum_i c_i D_i,    D_i = w_i - w_0

In it every member changes the logits by an amount of its own, whatever the others are: a member can be added or
removed at any time, and with all weights 1/n (the default) the result is the mean of the linear models of all members.
The cost of an answer is that of two passes through the base, however many members there are. Members are added up in
their order, and those of weight 0 not at all: an ensemble without a member has no bit that depends on it.

It holds where fine-tunes stay near their base; members that were tuned in its linear model lose nothing. Buffers, such
as the running statistics of BatchNorm, stay those of the base. All models have the same weights, classes included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import TunedEnsemble

if TYPE_CHECKING:
    from lfm.models.handle import Backend, Model


class Tangent(TunedEnsemble):
    needs = Needs(access=Access.WEIGHTS, sources=(1, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2307.08114"
    weighted = True

    def backend(self, base: Model, members: Sequence[Model], weights: Sequence[float]) -> Backend:
        from lfm.reuse.ensemble._tangent import TangentBackend

        return TangentBackend(base, members, weights)
