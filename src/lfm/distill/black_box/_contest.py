"""A generator against the student, with a teacher between them whose gradient has to be guessed from its answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lfm.distill._asking import evaluated
from lfm.distill._contract import Contested, Inquiry
from lfm.distill.black_box._generator import new_generator, random_latents
from lfm.distill.black_box._stored import Lesson, Stored
from lfm.models.zeroth_order import ZerothOrder, estimate_rows

NOTHING = 1e-8  # stands for a probability that the teacher gives as 0

Gap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (log-probabilities, logits), (n, classes) each -> (n,)


@dataclass(frozen=True)
class Rules:
    """How generator and student take turns, and what a turn costs."""

    generator_steps: int
    student_steps: int
    replay_steps: int
    directions: int
    mu: float
    latent: int
    width: int

    @classmethod
    def of(cls, method: Contested) -> Rules:
        """Return those of a method; the generator takes one step in a turn."""
        return cls(1, method.student_steps, method.replays, method.directions, method.mu, method.latent, method.width)

    def cost(self, batch_size: int) -> int:
        """Return the queries of one turn: a point and its neighbours for the generator, a point for the student."""
        return batch_size * (self.generator_steps * (self.directions + 1) + self.student_steps)

    def lessons(self, queries: int, batch_size: int, asking: float) -> int:
        """Return the student's steps in which so many queries are spent."""
        turns = math.ceil(queries / self.cost(batch_size)) + 1
        return math.ceil(turns * (self.student_steps + self.replay_steps) / asking)


class Contest(Stored):
    """Turns of a generator that widens the gap between teacher and student, and a student that closes it.

    The generator's gradient is that of `estimate_rows` at its output before the range of pixels is applied, so that
    what is asked about is always an image. It moves only where the queries left are enough for all of its steps.
    """

    def __init__(self, inquiry: Inquiry, rules: Rules, gap: Gap, rate: float) -> None:
        super().__init__(inquiry, inquiry.queries)
        self._rules = rules
        self._gap = gap
        self._how = ZerothOrder(num_directions=rules.directions, mu=rules.mu, antithetic=False)
        self._generator = new_generator(inquiry, rules.latent, rules.width)
        self.modules["generator"] = self._generator
        self.optimisers["generator"] = torch.optim.Adam(self._generator.parameters(), lr=rate)
        self.tensors["place"] = torch.tensor(0)  # within a turn

    def lesson(self, step: int) -> Lesson:
        rules, size = self._rules, self.inquiry.batch_size
        if self.due(step) <= 0 and self.count:
            return self.replay(size)
        place = int(self.tensors["place"])
        self.tensors["place"] = torch.tensor((place + 1) % (rules.student_steps + rules.replay_steps))
        if place >= rules.student_steps:
            return self.replay(size)
        if place == 0 and self.inquiry.teacher.left > rules.cost(size) - rules.student_steps * size:
            for _ in range(rules.generator_steps):
                self._widen()
        with torch.no_grad():
            images = self._generator(random_latents(self._generator, self.inquiry))
        return self.filled(self.ask(images[: self.inquiry.teacher.left]))

    def _widen(self) -> None:
        """Move the generator a step towards images of which teacher and student say different things."""
        inquiry = self.inquiry
        raw = self._generator.raw(random_latents(self._generator, inquiry))
        with evaluated(inquiry.student):
            gradient = estimate_rows(self._agreement, raw.detach(), self._how, None)
        optimiser = self.optimisers["generator"]
        optimiser.zero_grad()
        torch.autograd.backward(raw, gradient / len(raw))
        optimiser.step()

    @torch.no_grad()
    def _agreement(self, raw: torch.Tensor) -> torch.Tensor:
        images = self._generator.image(raw)
        said = self.inquiry.teacher(images).clamp(min=math.log(NOTHING))
        return -self._gap(said, self.inquiry.student(images))


def recovered(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the teacher's logits up to what its probabilities cannot tell: log p - mean(log p), 1e-8 in place of 0."""
    known = log_probs.clamp(min=math.log(NOTHING))
    return known - known.mean(-1, keepdim=True)
