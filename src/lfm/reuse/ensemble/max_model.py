"""Ask, for each class, the model that is surest of it; models may know different classes.

    h(x, y) = max_i p_i(y | x) over the models i that know y;   -inf where none does

The union of all classes comes out. A model that has never seen the class of an example is often sure of a wrong one,
so calibrate the members (`calibrate: members`), and weigh them (`weights`) by how much is known of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lfm.method import Access, Needs
from lfm.reuse.ensemble._contract import Ensemble, Members, State


class MaxModel(Ensemble):
    needs = Needs(access=Access.PROBS, sources=(2, None))
    paper = "https://proceedings.mlr.press/v97/wu19a.html"
    weighted = True
    one_set = False

    def combine(self, members: Members, weights: Sequence[float], state: State) -> torch.Tensor:
        shares = torch.tensor(list(weights), dtype=torch.float32).log()
        said = torch.stack([members.log_probs(index) + share for index, share in enumerate(shares)])
        return said.amax(0).log_softmax(-1)
