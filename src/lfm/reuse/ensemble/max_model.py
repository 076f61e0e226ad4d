"""Ask, for each class, the model that is surest of it; models may know different classes.

    h(x, y) = max_i k_i(x) p_i(y | x) over the models i that know y;   -inf where none does
    k_i(x)  = P(model i knows the class of x)

The union of all classes comes out. A model that has never seen the class of an example is often sure of a wrong one,
so k is the heart of the matter. Left alone it is the same for all examples, the model's weight. `familiarity: learned`
finds it out from `data`: a logistic regression, for each model, on what all of them say. By Bayes' rule k_i(x) is the
density of x among the examples of classes that i knows, over its density among all: the correction of Tang et al. 2023
(https://arxiv.org/abs/2305.13871), without a model of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional

from lfm.method import Access, Needs
from lfm.reuse.ensemble._averaging import minimised
from lfm.reuse.ensemble._contract import Ensemble, Members, State

FLOOR = -20.0  # log-probabilities below say no more than this one


class MaxModel(Ensemble):
    needs = Needs(access=Access.PROBS, sources=(2, None))
    paper = "https://proceedings.mlr.press/v97/wu19a.html"
    weighted = True
    one_set = False

    familiarity: Literal["equal", "learned"] = Field(
        "equal", description="Whether models are thought to know every example alike, or `data` shows which they do."
    )
    penalty: float = Field(0.01, ge=0, description="Weight of the squared coefficients of that regression.")

    @property
    def learns(self) -> bool:
        return self.familiarity == "learned"

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        said = _said(members).double()
        centre, spread = said.mean(0), said.std(0) + 1e-3
        features = (said - centre) / spread
        known = members.knows[:, labels].double()  # (members, n)

        def loss(free: torch.Tensor) -> torch.Tensor:
            slopes, bias = free[:, :-1], free[:, -1:]
            found = functional.binary_cross_entropy_with_logits(slopes @ features.T + bias, known)
            return found + self.penalty * slopes.square().sum() / len(known)

        found = minimised(loss, said.new_zeros(len(known), said.shape[1] + 1), steps=200)
        slopes = found[:, :-1] / spread
        return {"slopes": slopes.float(), "bias": (found[:, -1] - slopes @ centre).float()}

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        shares = torch.tensor(list(weights), dtype=torch.float32).log()[:, None, None]
        said = torch.stack([members.log_probs(index) for index in range(len(members))])
        if "slopes" in state:
            knows = state["slopes"] @ _said(members).T + state["bias"][:, None]
            said = said + functional.logsigmoid(knows)[..., None]
        return (said + shares).amax(0).log_softmax(-1)


def _said(members: Members) -> torch.Tensor:
    """Return what all members say of the classes that they know, side by side (n, all their classes)."""
    rows = zip(range(len(members)), members.knows, strict=True)
    return torch.cat([members.log_probs(index)[:, knows].clamp_min(FLOOR) for index, knows in rows], dim=-1)
