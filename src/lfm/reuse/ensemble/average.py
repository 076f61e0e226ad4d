"""Average what models say: the plainest ensemble, and hard to beat.

    probabilities:  p = sum_i w_i p_i
    logits:         p ~ prod_i p_i^w_i      (the mean of the logits)
    w_i >= 0, sum_i w_i = 1

Averaged probabilities are safe where one member is sure and wrong: it cannot rule out what others believe. Averaged
logits can, and are sharper. `choose` takes the weights from held-out data: in proportion to accuracy, or those with
the least negative log-likelihood. Language models are averaged token by token, if they have one tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from lfm.method import Access, Needs
from lfm.reuse.ensemble._averaging import averaged, best_weights
from lfm.reuse.ensemble._contract import Ensemble, Members, State


class Average(Ensemble):
    needs = Needs(access=Access.PROBS, sources=(1, None))
    paper = "https://doi.org/10.1007/3-540-45014-9_1"
    weighted = True
    writes = True

    of: Literal["probabilities", "logits"] = Field("probabilities", description="What is averaged.")
    choose: Literal["equal", "accuracy", "likelihood"] = Field(
        "equal", description="Weights where none are given: equal, by accuracy on `data`, or the most likely ones."
    )

    @property
    def learns(self) -> bool:
        return self.choose != "equal"

    def learn(self, members: Members, labels: torch.Tensor, weights: Sequence[float]) -> State:
        if self.choose == "accuracy":
            right = [(members.labels(i) == labels).double().mean() for i in range(len(members))]
            return {"weights": torch.stack(right)}
        said = torch.stack([members.log_probs(i) for i in range(len(members))]).double()
        return {"weights": best_weights(said, labels, self.of)}

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        chosen = state["weights"].tolist() if "weights" in state else list(weights)
        used = [index for index, weight in enumerate(chosen) if weight > 0]  # one alone is itself, to the last bit
        shares = torch.tensor([chosen[index] for index in used], dtype=torch.float32)
        return averaged([members.log_probs(index) for index in used], shares / shares.sum(), self.of)
