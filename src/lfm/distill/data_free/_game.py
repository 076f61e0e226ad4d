"""A generator and a student that take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lfm.distill._contract import Scene, Synthesiser
from lfm.distill.data_free._generator import Generator, latents
from lfm.distill.data_free._inversion import descend, moved

Loss = Callable[[torch.Tensor, int], torch.Tensor]  # images with a gradient, number of the turn -> one number


@dataclass(frozen=True)
class Rules:
    """How the two take turns: `turn` steps of the student for each one of the generator.

    `replay` is the share of a batch that are images of earlier turns, drawn from the `bank` newest of them.
    """

    turn: int
    rate: float
    replay: float
    bank: int
    shift: int
    flip: bool


class Game(Synthesiser):
    """Images of a generator that minimises a loss of them while the student learns from them."""

    def __init__(self, scene: Scene, generator: Generator, loss: Loss, rules: Rules) -> None:
        super().__init__()
        self._scene, self._loss, self._rules = scene, loss, rules
        self._generator = generator.to(scene.device)
        self.modules["generator"] = self._generator
        self.optimisers["generator"] = torch.optim.Adam(self._generator.parameters(), rules.rate, betas=(0.5, 0.999))
        self.tensors["bank"] = torch.zeros((rules.bank, *scene.space.shape), device=scene.device)
        self.tensors["kept"] = torch.tensor(0)  # images so far; the newest take the place of the oldest

    def images(self, step: int) -> torch.Tensor:
        rules, size = self._rules, self._scene.batch_size
        turn, place = divmod(step, rules.turn)
        if not place:
            descend(self._loss(self._made(size), turn), self.optimisers["generator"])
        with torch.no_grad():
            fresh = self._made(size)
        old = self.earlier(int(rules.replay * size))
        if not place and rules.bank:
            self._keep(fresh[: rules.bank])
        return moved(torch.cat([fresh[: size - len(old)], old]), rules.shift, rules.flip)

    def earlier(self, count: int) -> torch.Tensor:
        """Return so many images of earlier turns; none before the second."""
        bank: torch.Tensor = self.tensors["bank"]
        held = min(int(self.tensors["kept"]), len(bank))
        return bank[torch.randint(held, (count,)).to(bank.device)] if held else bank[:0]

    def _keep(self, images: torch.Tensor) -> None:
        places = (self.tensors["kept"] + torch.arange(len(images))) % self._rules.bank
        self.tensors["bank"][places.to(images.device)] = images
        self.tensors["kept"] = self.tensors["kept"] + len(images)

    def samples(self, count: int) -> torch.Tensor:
        with torch.no_grad():
            made: torch.Tensor = self._made(max(count, 2))  # a batch norm takes two
        return made[:count]

    def _made(self, count: int) -> torch.Tensor:
        images: torch.Tensor = self._generator(latents(count, self._generator, self._scene.device))
        return images


def imbalance(said: torch.Tensor) -> torch.Tensor:
    """Return the negative entropy of the mean probabilities of a batch of logits: least when classes are alike."""
    entropy: torch.Tensor = torch.special.entr(said.softmax(1).mean(0)).sum()
    return -entropy
