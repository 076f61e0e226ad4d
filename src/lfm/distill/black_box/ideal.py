"""Train a generator against the student alone, and ask the teacher about each image it makes once (after IDEAL).

    L_G = CE(s(G(z)), y) + balance sum_k  pbar_k log pbar_k,   y random classes, pbar the student's mean probabilities

The generator makes images that the student takes for given classes, all of them equally often; its gradient passes
through the student, so that it costs no queries. Every image is asked about once and stored; the student learns from
the store. A label is enough of an answer. The generator begins anew for every batch that is asked about, so that no
batch repeats another (`fresh`). Steps, rates and weights are ours, found on digits, not the paper's.
"""

import torch
from pydantic import Field
from torch.nn import functional

from lfm.distill._asking import evaluated
from lfm.distill._contract import BlackBox, Inquirer, Inquiry, Taught, Terms
from lfm.distill.black_box._generator import Generator, new_generator, random_latents
from lfm.distill.black_box._stored import Lesson, Stored, soft_or_hard
from lfm.method import Access, Needs


class Ideal(BlackBox):
    needs = Needs(access=Access.LABELS, trains=True)
    paper = "https://arxiv.org/abs/2205.11158"

    temperature: float = Field(4.0, gt=0, description="Temperature of both models' probabilities in the loss.")
    balance: float = Field(5.0, ge=0, description="Weight of the classes' balance.")
    generator_steps: int = Field(5, ge=1, description="Steps of the generator for each batch that is asked about.")
    generator_rate: float = Field(1e-3, gt=0, description="Learning rate of the generator (Adam).")
    fresh: bool = Field(True, description="Begin with a new generator for each of them, or go on with the old one.")
    latent: int = Field(100, ge=1, description="Random numbers that an image is made from.")
    width: int = Field(16, ge=2, description="Channels of the generator.")

    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        return _Ideal(self, inquiry)

    def terms(self, taught: Taught) -> Terms:
        return soft_or_hard(taught, self.temperature)


class _Ideal(Stored):
    def __init__(self, method: Ideal, inquiry: Inquiry) -> None:
        super().__init__(inquiry, inquiry.queries)
        self._method = method
        self._begin()

    def lesson(self, step: int) -> Lesson:
        wanted = self.wanted(step)
        while wanted > 0:
            if self._method.fresh:
                self._begin()
            size = min(wanted, self.inquiry.batch_size)
            self.ask(self._made()[:size])
            wanted -= size
        return self.replay(self.inquiry.batch_size)

    def _begin(self) -> None:
        method = self._method
        generator = new_generator(self.inquiry, method.latent, method.width)
        self.modules["generator"] = generator
        self.optimisers["generator"] = torch.optim.Adam(generator.parameters(), lr=method.generator_rate)

    def _made(self) -> torch.Tensor:
        """Return a batch that the student takes for random classes, once the generator has learned to make it."""
        inquiry, method = self.inquiry, self._method
        generator, optimiser = self.modules["generator"], self.optimisers["generator"]
        assert isinstance(generator, Generator)
        z = random_latents(generator, inquiry)
        wished = torch.randint(inquiry.teacher.classes, (len(z),)).to(inquiry.device)
        parameters = list(generator.parameters())
        with evaluated(inquiry.student) as student:
            for _ in range(method.generator_steps):
                logits = student(generator(z))
                mean = logits.softmax(-1).mean(0)
                loss = functional.cross_entropy(logits, wished) - method.balance * torch.special.entr(mean).sum()
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
                optimiser.step()
        with torch.no_grad():
            found: torch.Tensor = generator(z)
        return found
