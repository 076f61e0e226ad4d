"""Train all weights, or the upper blocks of them, optionally more slowly towards the input.

    theta = argmin_theta mean L(f(x; theta), y),  from theta_0

`freeze` fixes the embeddings and the lower share of the blocks; `layer_decay` multiplies the learning rate once for
every block below the top, since lower layers are the more general ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lfm.method import Data, Needs
from lfm.tune._contract import Tune

if TYPE_CHECKING:
    from torch import nn

    from lfm.models.anatomy import Anatomy


class Full(Tune):
    needs = Needs(data=Data.LABELLED, trains=True)
    paper = "https://arxiv.org/abs/1801.06146"

    freeze: float = Field(0.0, ge=0, le=1, description="Share of the blocks, from the input on, that is not trained.")
    layer_decay: float = Field(1.0, gt=0, le=1, description="Learning rate of a block over that of the next one up.")

    def groups(self, module: nn.Module, anatomy: Anatomy) -> list[Mapping[str, Any]]:
        blocks = len(anatomy.blocks)
        groups: list[Mapping[str, Any]] = []
        for name, parameter in module.named_parameters():
            depth = anatomy.depth(name)
            if (self.freeze and depth < self.freeze) or not parameter.requires_grad:
                continue
            below_top = round((1 - depth) * (blocks + 1))
            groups.append(
                {
                    "params": [parameter],
                    "lr": self.learning_rate * self.layer_decay**below_top,
                    "weight_decay": self.weight_decay if parameter.ndim > 1 else 0.0,
                }
            )
        return groups
