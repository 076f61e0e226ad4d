"""What inputs are made by: statistics of batch norms, variation, disagreement; a pool that grows in rounds.

Gradients go to what is optimised alone (`descend`), so the models that are looked into collect none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lfm.distill._contract import Scene, Space, Synthesiser
from lfm.distill._losses import kl
from lfm.errors import RequestError
from lfm.models.anatomy import anatomy
from lfm.models.handle import Model
from lfm.models.local import forward

Moments = tuple[torch.Tensor, torch.Tensor]  # mean and biased variance of each channel
PIXELS = "pixel_values"


# --- looking into models --------------------------------------------------------------------------------------------


@dataclass
class Norms:
    """The batch norms of a model, with the statistics of what it was trained on.

    `seen` are those of the inputs of each, in order, of the last batch that went through while they were `watched`;
    `means` holds the channel means of each image there. A teacher is in evaluation mode, so its own do not change.
    """

    parts: list[_BatchNorm]
    seen: list[Moments] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module) -> Norms:
        """Find them; those that keep no statistics do not count."""
        return cls([part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats])

    @classmethod
    def needed(cls, teacher: Model, method: str) -> Norms:
        """Find them in a teacher. Raises RequestError for one without, where a method is nothing without them."""
        found = cls.of(teacher.module)
        if not found.parts:
            raise RequestError(
                f"{teacher.label}: has no batch norms, and {method} goes by what they know of the data; "
                "see noise, boundary or impressions, which take none"
            )
        return found

    @contextmanager
    def watched(self) -> Iterator[Norms]:
        """Note the statistics of what goes through while this is open."""
        self.seen, self.means = [], []
        handles = [part.register_forward_pre_hook(self._note) for part in self.parts]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0]
        others = [dim for dim in range(x.ndim) if dim != 1]
        self.seen.append((x.mean(others), x.var(others, unbiased=False)))
        self.means.append(x.flatten(2).mean(2) if x.ndim > 2 else x)

    def distance(self, first: float = 1.0, past: Sequence[Moments] = (), momentum: float = 0.0) -> torch.Tensor:
        """Return sum over norms of ||mean - running mean|| + ||variance - running variance||, the first times `first`.

        With `past` statistics the batch's count as `momentum * past + (1 - momentum) * batch`.
        """
        total = torch.zeros(())
        for index, (part, (mean, variance)) in enumerate(zip(self.parts, self.seen, strict=True)):
            if past:
                mean = momentum * past[index][0] + (1 - momentum) * mean
                variance = momentum * past[index][1] + (1 - momentum) * variance
            found = (mean - part.running_mean).norm() + (variance - part.running_var).norm()  # type: ignore[operator]
            total = total.to(found.device) + found * (first if index == 0 else 1.0)
        return total

    def features(self) -> torch.Tensor:
        """Return the channel means of each image at every norm, side by side (batch, width)."""
        return torch.cat(self.means, 1)


def ask(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return a module's logits as it answers when in use; its statistics stay as they are, gradients go through."""
    training = module.training
    module.eval()
    try:
        return forward(module, {PIXELS: images}).float()
    finally:
        module.train(training)


def ask_features(teacher: Model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a teacher's logits, and what its output layer reads. Raises RequestError where it has no single one."""
    module = teacher.module
    head = anatomy(module).head
    if head is None:
        raise RequestError(f"{teacher.label}: has no single output layer whose input could be looked at")
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(head).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        return ask(module, images), seen[-1]
    finally:
        handle.remove()


def descend(loss: torch.Tensor, *optimisers: torch.optim.Optimizer, before: Callable[[], None] | None = None) -> None:
    """Take one step of each optimiser; nothing but what they optimise gets a gradient, which `before` can look at."""
    leaves = [leaf for optimiser in optimisers for group in optimiser.param_groups for leaf in group["params"]]
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = gradient
    if before is not None:
        before()
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()


def class_weights(teacher: Model) -> torch.Tensor:
    """Return the rows of a teacher's output layer (classes, width). Raises RequestError where it has no single one."""
    module = teacher.module
    head = anatomy(module).head
    weight = None if head is None else getattr(module.get_submodule(head), "weight", None)
    if not isinstance(weight, torch.Tensor) or len(weight) != len(teacher.encoder.classes or ()):
        raise RequestError(f"{teacher.label}: has no output layer with a row for each class; see inversion or noise")
    return weight.detach().flatten(1)


# --- losses ---------------------------------------------------------------------------------------------------------


def variation(images: torch.Tensor) -> torch.Tensor:
    """Return the sum of the l2 norms of differences along rows, columns and both diagonals, over the whole batch."""
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    # where all differences are 0 the norm has no slope; a small constant gives it the slope 0
    return sum((part.square().sum() + 1e-12).sqrt() - 1e-6 for part in (right, down, falling, rising))  # type: ignore[return-value]


def agreement(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 3.0) -> torch.Tensor:
    """Return 1 - JS(teacher || student), of probabilities at a temperature within [0.01, 0.99] (Yin et al. 2020)."""
    p, q = ((logits / temperature).softmax(1).clamp(0.01, 0.99) for logits in (teacher, student))
    middle = (0.5 * (p + q)).clamp(0.01, 0.99)
    apart = 0.5 * ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)).mean()
    return 1 - apart.clamp(0, 1)


def disagreement(teacher: torch.Tensor, student: torch.Tensor, *, agreed: bool = True) -> torch.Tensor:
    """Return the mean of KL(teacher || student); with `agreed` only of images that both give to one class."""
    apart = kl(teacher.log_softmax(1), student.log_softmax(1))
    if agreed:
        apart = apart * (teacher.argmax(1) == student.argmax(1))
    return apart.mean()


def balanced_classes(count: int, classes: int) -> torch.Tensor:
    """Return `count` classes, each as often as any other (up to one), in random order."""
    every = torch.arange(classes).repeat(-(-count // classes))
    # the first full turns are the same for all; which classes come once more is drawn
    rest = torch.randperm(classes)[: count % classes]
    return torch.cat([every[: count - count % classes], rest])[torch.randperm(count)]


# --- images ---------------------------------------------------------------------------------------------------------


def moved(images: torch.Tensor, most: int, flip: bool = False) -> torch.Tensor:
    """Return images rolled by up to `most` pixels each way, all alike, and mirrored half of the time with `flip`."""
    if most:
        down, right = torch.randint(-most, most + 1, (2,)).tolist()
        images = images.roll((down, right), (-2, -1))
    return images.flip(-1) if flip and float(torch.rand(())) < 0.5 else images


def noise(count: int, space: Space, device: torch.device) -> torch.Tensor:
    """Return standard normal images."""
    return torch.randn((count, *space.shape)).to(device)


def within(images: torch.Tensor, space: Space) -> torch.Tensor:
    """Return images with all pixels inside of their range."""
    low, high = space.low.to(images.device), space.high.to(images.device)
    return torch.minimum(torch.maximum(images, low), high)


class Pool(Synthesiser):
    """Images that are made in rounds while the student learns; it learns from a random choice of all there are.

    `make(round)` returns the images of a round. Rounds are spread evenly over the first `spread` of the steps.
    """

    def __init__(
        self,
        scene: Scene,
        make: Callable[[int], torch.Tensor],
        *,
        rounds: int,
        spread: float,
        shift: int,
        flip: bool,
        most: int | None = None,
    ) -> None:
        super().__init__()
        self._scene, self._make = scene, make
        self._due = [int(index * spread * scene.steps / rounds) for index in range(rounds)]
        self._shift, self._flip, self._most = shift, flip, most
        self.tensors["pool"] = torch.empty((0, *scene.space.shape), device=scene.device)

    def images(self, step: int) -> torch.Tensor:
        for index, due in enumerate(self._due):
            if due == step:
                whole = torch.cat([self.tensors["pool"], self._make(index).detach()])
                self.tensors["pool"] = whole if self._most is None else whole[-self._most :]
        return moved(self._chosen(self._scene.batch_size), self._shift, self._flip)

    def samples(self, count: int) -> torch.Tensor:
        return self._chosen(count)

    def _chosen(self, count: int) -> torch.Tensor:
        pool = self.tensors["pool"]
        return pool[torch.randint(len(pool), (count,)).to(pool.device)]
