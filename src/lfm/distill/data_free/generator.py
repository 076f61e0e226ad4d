"""A generator learns to make images of which the teacher is sure, of all classes alike, and its features strong.

    G: one_hot CE(T(x), argmax T(x)) - activation mean |f_T(x)| - balance H(mean softmax T(x)) + batch_norm R_bn
    x = G(z);   f_T: what the teacher's output layer reads

The first paper has no batch norms here, no replay, and a rate of 0.2 with batches of 512. On digits (8 x 8 pixels) 800
steps with batch norms teach 95 % and without them 69 % (one seed each); noise teaches 94 % in 1,200.
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._contract import DataFree, Scene, Synthesiser
from lfm.distill.data_free._game import Game, Rules, imbalance
from lfm.distill.data_free._generator import Generator as Network
from lfm.distill.data_free._inversion import Norms, ask_features
from lfm.method import Access, Needs


class Generator(DataFree):
    needs = Needs(access=Access.WEIGHTS, trains=True)
    paper = "https://arxiv.org/abs/1904.01186"

    turn: int = Field(2, ge=1, description="Steps of the student for each one of the generator.")
    replay: float = Field(0.5, ge=0, lt=1, description="Share of a batch that is taken from earlier turns.")
    bank: int = Field(25_000, ge=0, description="Images of earlier turns that are kept.")
    generator_rate: float = Field(1e-3, gt=0, description="Learning rate of the generator.")
    latent: int = Field(100, ge=1, description="Random numbers that an image is made of.")
    width: int = Field(64, ge=2, description="Channels of the generator.")
    one_hot: float = Field(1.0, ge=0, description="Weight of how sure the teacher is.")
    activation: float = Field(0.1, ge=0, description="Weight of the size of its features.")
    balance: float = Field(5.0, ge=0, description="Weight of how alike classes are in a batch.")
    batch_norm: float = Field(5.0, ge=0, description="Weight of the statistics of batch norms; 0 in the first paper.")
    shift: int = Field(1, ge=0, description="Images are rolled by up to so many pixels when they are learned.")
    flip: bool = Field(False, description="Mirror half of the batches; for photographs, not for digits.")

    def synthesiser(self, scene: Scene) -> Synthesiser:
        rules = Rules(self.turn, self.generator_rate, self.replay, self.bank, self.shift, self.flip)
        generator = Network(scene.space, self.latent, self.width, end="norm")
        return Game(scene, generator, _Sure(self, scene).loss, rules)


class _Sure:
    def __init__(self, method: Generator, scene: Scene) -> None:
        self._method, self._scene = method, scene
        self._norms = Norms.of(scene.teacher.module)

    def loss(self, images: torch.Tensor, turn: int) -> torch.Tensor:
        """Return what the generator minimises."""
        method = self._method
        with self._norms.watched() as norms:
            said, features = ask_features(self._scene.teacher, images)
        loss = method.one_hot * functional.cross_entropy(said, said.argmax(1))
        loss = loss - method.activation * features.abs().mean() + method.balance * imbalance(said)
        if method.batch_norm:
            loss = loss + method.batch_norm * norms.distance()
        return loss
