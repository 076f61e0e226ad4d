"""A generator seeks images on which teacher and student differ, the student learns to agree on them.

    G: max mean |T(x) - S(x)|,   x = G(z);   S: min the divergence, for `turn` steps of its own
    G besides: batch_norm R_bn + one_hot CE(T(x), argmax T(x)) - balance H(mean softmax T(x))

The first paper has no batch norms in the generator's loss and no replay. On digits (8 x 8 pixels) 1,600 steps with both
teach 97 to 98 % (one seed), 1,200 without them nothing (9 %, one seed); noise teaches 94 % in 1,200.
"""

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import DataFree, Scene, Synthesiser
from lfm.distill.data_free._game import Game, Rules, imbalance
from lfm.distill.data_free._generator import Generator
from lfm.distill.data_free._inversion import Norms, ask
from lfm.method import Access, Needs


class Adversarial(DataFree):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/1912.11006"

    turn: int = Field(5, ge=1, description="Steps of the student for each one of the generator.")
    gap: Literal["absolute", "logarithm"] = Field("absolute", description="What the generator widens; or its log.")
    replay: float = Field(0.5, ge=0, lt=1, description="Share of a batch that is taken from earlier turns.")
    bank: int = Field(25_000, ge=0, description="Images of earlier turns that are kept.")
    generator_rate: float = Field(1e-3, gt=0, description="Learning rate of the generator.")
    latent: int = Field(100, ge=1, description="Random numbers that an image is made of.")
    width: int = Field(64, ge=2, description="Channels of the generator.")
    batch_norm: float = Field(1.0, ge=0, description="Weight of the statistics of batch norms; 0 in the first paper.")
    one_hot: float = Field(0.0, ge=0, description="Weight of how sure the teacher is.")
    balance: float = Field(0.0, ge=0, description="Weight of how alike classes are in a batch.")
    shift: int = Field(1, ge=0, description="Images are rolled by up to so many pixels when they are learned.")
    flip: bool = Field(False, description="Mirror half of the batches; for photographs, not for digits.")

    def synthesiser(self, scene: Scene) -> Synthesiser:
        rules = Rules(self.turn, self.generator_rate, self.replay, self.bank, self.shift, self.flip)
        generator = Generator(scene.space, self.latent, self.width, end="free")
        return Game(scene, generator, _Gap(self, scene).loss, rules)


class _Gap:
    def __init__(self, method: Adversarial, scene: Scene) -> None:
        self._method, self._scene = method, scene
        self._norms = Norms.of(scene.teacher.module)

    def loss(self, images: torch.Tensor, turn: int) -> torch.Tensor:
        """Return what the generator minimises."""
        method, scene = self._method, self._scene
        with self._norms.watched() as norms:
            said = ask(scene.teacher.module, images)
        apart = (said - ask(scene.student, images)).abs().mean()
        loss = -(apart if method.gap == "absolute" else (apart + 1).log())
        if method.batch_norm:
            loss = loss + method.batch_norm * norms.distance()
        if method.one_hot:
            loss = loss + method.one_hot * functional.cross_entropy(said, said.argmax(1))
        if method.balance:
            loss = loss + method.balance * imbalance(said)
        return loss
