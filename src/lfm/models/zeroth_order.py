"""Gradients from values alone: how a function that can only be asked changes along random directions u.

    g = (c / q) sum_i  [f(x + mu u_i) - f(x)] / mu  u_i                      one-sided, 1 + q queries
    g = (c / q) sum_i  [f(x + mu u_i) - f(x - mu u_i)] / (2 mu)  u_i         antithetic, 2 q queries

`gaussian`: u ~ N(0, I), c = 1; the mean is the gradient of f smoothed by that Gaussian (Nesterov and Spokoiny 2017).
`sphere`: u uniform on the unit sphere, c = d (Flaxman, Kalai and McMahan 2005). `coordinate`: u one of q different
axes, c = d; with q = d it is the plain finite difference. As mu goes to 0 all three are right in the mean, and
antithetic pairs have an error of mu^2 in place of mu. With q directions the cosine to the gradient is about
sqrt(q / (q + d)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from lfm.errors import LfmError

Loss = Callable[[torch.Tensor], torch.Tensor]  # (k, *shape of x) -> (k,)


class ZerothOrder(BaseModel):
    """How a gradient is estimated."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    directions: Literal["gaussian", "sphere", "coordinate"] = Field("sphere", description="What is stepped along.")
    num_directions: int = Field(32, ge=1, description="How many; of coordinates, no more than there are.")
    mu: float = Field(1e-3, gt=0, description="Length of a step.")
    antithetic: bool = Field(True, description="Step both ways; else compare each step with the point itself.")
    batch_size: int = Field(64, ge=1, description="Points that are asked about at a time.")

    def queries(self, size: int) -> int:
        """Return how many values an estimate at a point of so many numbers takes."""
        count = _count(self, size)
        return 2 * count if self.antithetic else 1 + count


class Counted:
    """A loss that counts its queries and refuses those beyond `limit`, before they are made."""

    def __init__(self, loss: Loss, limit: int | None = None) -> None:
        self._loss = loss
        self.limit = limit
        self.queries = 0

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        if self.limit is not None and self.queries + len(points) > self.limit:
            raise LfmError(f"{self.queries + len(points)} queries are more than the {self.limit} allowed")
        self.queries += len(points)
        return self._loss(points)


def through(decode: Callable[[torch.Tensor], torch.Tensor], loss: Loss) -> Loss:
    """Return the loss as a function of a latent: `decode` makes (k, *shape of x) of (k, *shape of the latent).

    A latent of few numbers takes few queries (Tu et al. 2019, AutoZOOM); its gradient needs none of `decode`'s.
    """

    def of_latent(latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return loss(decode(latents))

    return of_latent


def estimate(loss: Loss, x: torch.Tensor, how: ZerothOrder, generator: torch.Generator) -> torch.Tensor:
    """Return an estimate of the gradient of `loss` at `x`, in the shape of `x`.

    `loss` is given stacks of points, `how.batch_size` at most, and returns a value for each. Directions come from
    `generator` one by one on its device, so that the batch size changes neither them nor the estimate beyond rounding.
    """
    gradient, size = torch.zeros_like(x), x.numel()
    count = _count(how, size)
    scale = (1.0 if how.directions == "gaussian" else float(size)) / count
    centre = None if how.antithetic else _ask(loss, x[None])[0]
    per_batch = max(1, how.batch_size // 2 if how.antithetic else how.batch_size)
    for steps in _stacks(_directions(how, x, count, generator), per_batch):
        points = x + how.mu * steps
        if centre is None:
            slopes = _differences(loss, points, x - how.mu * steps, how.batch_size) / (2 * how.mu)
        else:
            slopes = (_ask(loss, points) - centre) / how.mu
        gradient += torch.tensordot(slopes.to(x.dtype), steps, dims=1)
    return gradient * scale


def estimate_rows(loss: Loss, x: torch.Tensor, how: ZerothOrder, generator: torch.Generator | None) -> torch.Tensor:
    """Return an estimate of the gradient of each row's own loss, in the shape of `x` (rows, ...).

    `loss` is given all rows at a time and returns a value for each, which depends on that row alone; every row steps
    along directions of its own. It takes `how.queries(...)` values a row; `how.batch_size` has no part in it, and axes
    (`coordinate`) cannot be stepped along.
    """
    if how.directions == "coordinate":
        raise ValueError("rows step along random directions: gaussian or sphere")
    shape = (-1, *[1] * (x.ndim - 1))
    scale = (1.0 if how.directions == "gaussian" else float(x[0].numel())) / how.num_directions
    centre = None if how.antithetic else _ask(loss, x)
    gradient = torch.zeros_like(x)
    for _ in range(how.num_directions):
        steps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        if how.directions == "sphere":
            steps = steps / steps.flatten(1).norm(dim=1).view(shape)
        ahead = _ask(loss, x + how.mu * steps)
        behind = _ask(loss, x - how.mu * steps) if centre is None else centre
        slopes = (ahead - behind) / (2 * how.mu if how.antithetic else how.mu)
        gradient += slopes.to(x.dtype).view(shape) * steps
    return gradient * scale


def _count(how: ZerothOrder, size: int) -> int:
    return min(how.num_directions, size) if how.directions == "coordinate" else how.num_directions


def _ask(loss: Loss, points: torch.Tensor) -> torch.Tensor:
    values = loss(points).detach().to(points.device)
    if values.shape != points.shape[:1]:
        raise ValueError(f"the loss of {len(points)} points must be {len(points)} values, got {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise LfmError("the loss is not a finite number at some point that was asked about; take a smaller mu")
    return values


def _differences(loss: Loss, ahead: torch.Tensor, behind: torch.Tensor, batch_size: int) -> torch.Tensor:
    if 2 * len(ahead) > batch_size:  # a batch with room for a single point
        return _ask(loss, ahead) - _ask(loss, behind)
    values = _ask(loss, torch.cat([ahead, behind]))
    return values[: len(ahead)] - values[len(ahead) :]


def _directions(how: ZerothOrder, x: torch.Tensor, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    if how.directions == "coordinate":
        order = torch.randperm(x.numel(), generator=generator, device=generator.device)[:count]
        for place in order.tolist():
            step = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
            step[place] = 1.0
            yield step.view_as(x)
        return
    for _ in range(count):
        step = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        yield step / step.norm() if how.directions == "sphere" else step


def _stacks(steps: Iterator[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    held: list[torch.Tensor] = []
    for step in steps:
        held.append(step)
        if len(held) == size:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)
