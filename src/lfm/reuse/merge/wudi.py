"""Optimise the merged task vector of each linear layer, without data, to disturb no task (WUDI-Merging).

For a matrix, with tau_i = theta_i - theta_0, from tau = sum_i w_i tau_i on, `steps` steps of Adam on

    loss = sum_i |(tau - w_i tau_i) (w_i tau_i)^T|^2 / |w_i tau_i|^2          (Frobenius norms)
    theta = theta_0 + scale * tau

The rows of a task vector are sums of inputs that the layer saw in tuning: what tau does to them beyond tau_i is
interference. Made for full fine-tunes of transformers, where it needs neither data nor a search for `scale`; it is the
costliest merge here, at up to 2 `steps` rows columns^2 operations for a matrix.

As in the authors' code only linear layers change; embeddings, output heads over tokens, biases, norms and convolutions
stay the base's. `others: average` gives them the mean of the w_i tau_i. The learning rate is a step in weights, so it
fits weights of the usual size; for RoBERTa the authors take 2e-5.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Tensorwise, Whole
from lfm.reuse.merge._spectral import added, moved, task_vectors

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Wudi(Tensorwise):
    needs = Needs(sources=(2, None), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://arxiv.org/abs/2503.08099"
    copies = 8.0

    steps: int = Field(300, ge=0, description="Number of steps; 0 gives the sum of the task vectors.")
    learning_rate: float = Field(1e-5, gt=0, description="How far a weight goes in a step, about.")
    scale: float = Field(1.0, description="How far to go along the merged task vector.")
    others: Literal["base", "average"] = Field(
        "base", description="What tensors that are no linear layers become: the base's, or their task vectors' mean."
    )

    def merge(self, tensor: Whole) -> np.ndarray:
        if tensor.the_base.ndim == 2 and not tensor.is_table:
            return moved(tensor, self._least_interference(task_vectors(tensor)), self.scale)
        if self.others == "base":
            return tensor.the_base
        changes = task_vectors(tensor)
        return moved(tensor, added(changes) / len(changes), self.scale)

    def _least_interference(self, changes: list[torch.Tensor]) -> torch.Tensor:
        """Adam (Kingma & Ba 2015). The gradient at tau is that at the start, and what `grown` gives for tau - start."""
        merged = added(changes)
        start, (first_gradient, grown) = merged.clone(), _gradient(merged, changes)
        mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
        for step in range(1, self.steps + 1):
            gradient = grown(merged - start).add_(first_gradient)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = square.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
            merged.addcdiv_(mean, size, value=-self.learning_rate / (1 - BETAS[0] ** step))
        return merged


def _gradient(
    merged: torch.Tensor, changes: list[torch.Tensor]
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the gradient of the loss, and the linear function that it grows by when the merged task vector moves."""
    gradient = torch.zeros_like(merged)
    rows = []
    for change in changes:
        size = float(change.double().square().sum())
        if size:  # a task without changes minds nothing
            rows.append(change * (2 / size) ** 0.5)
            gradient += (merged - change) @ rows[-1].T @ rows[-1]
    if not rows:
        return gradient, torch.zeros_like
    together = torch.cat(rows)
    if 2 * len(together) < merged.shape[1]:  # what takes fewer operations: of both, the results are the same
        return gradient, lambda move: move @ together.T @ together
    curvature = together.T @ together
    return gradient, lambda move: move @ curvature
