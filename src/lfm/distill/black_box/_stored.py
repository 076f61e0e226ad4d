"""What black-box methods share: a store of all inputs that were paid for, which the student learns from again."""

from __future__ import annotations

import torch

from lfm.distill._asked import of_bytes, to_bytes
from lfm.distill._contract import Inquirer, Inquiry, Taught, Terms
from lfm.distill._losses import cross_entropy, divergence
from lfm.distill._noise import smooth_noise

Lesson = tuple[torch.Tensor, torch.Tensor]


class Stored(Inquirer):
    """An inquirer that keeps what it asked about, as images of 8 bits, and what was said of them."""

    def __init__(self, inquiry: Inquiry, room: int) -> None:
        super().__init__()
        self.inquiry = inquiry
        self.tensors = {
            "inputs": torch.zeros(room, *inquiry.space.shape, dtype=torch.uint8),
            "said": torch.zeros(room, inquiry.teacher.classes),
            "count": torch.tensor(0),
        }

    @property
    def count(self) -> int:
        """Inputs in the store."""
        return int(self.tensors["count"])

    def due(self, step: int) -> int:
        """Return how many inputs may be asked about at a step, for the queries to last as long as they should."""
        of = self.inquiry
        share = min(1.0, (step + 1) / max(1.0, of.steps * of.asking))
        return int(of.queries * share) - (of.queries - of.teacher.left)

    def wanted(self, step: int) -> int:
        """Return how many inputs to ask about at a step: a batch to begin with, then what is due, not in small bits."""
        least = min(self.inquiry.batch_size, self.inquiry.teacher.left)
        if self.count == 0:
            return least
        due = self.due(step)
        return due if due >= least else 0

    def ask(self, images: torch.Tensor) -> Lesson:
        """Ask about normalised images, as they are in 8 bits, and store them with what was said."""
        before, after = self.count, self.count + len(images)
        pixels = to_bytes(images.detach(), self.inquiry.space)
        rounded = of_bytes(pixels, self.inquiry.space, self.inquiry.device)
        said = self.inquiry.teacher(rounded)
        self.tensors["inputs"][before:after] = pixels.cpu()
        self.tensors["said"][before:after] = said.cpu()
        self.tensors["count"] = torch.tensor(after)
        return rounded, said

    def replay(self, count: int) -> Lesson:
        """Return stored inputs, drawn by chance, and what was said of them."""
        return self._at(torch.randint(self.count, (count,)))

    def filled(self, lesson: Lesson) -> Lesson:
        """Return a lesson with stored inputs behind it, up to the size of a batch."""
        lacking = self.inquiry.batch_size - len(lesson[0])
        if lacking <= 0:
            return lesson
        images, said = self.replay(lacking)
        return torch.cat([lesson[0], images]), torch.cat([lesson[1], said])

    def known(self, count: int) -> Lesson:
        return self._at(torch.linspace(0, self.count - 1, min(count, self.count)).long())

    def held_out(self, count: int) -> torch.Tensor:
        return smooth_noise(count, self.inquiry.space)

    def _at(self, indices: torch.Tensor) -> Lesson:
        images = of_bytes(self.tensors["inputs"][indices], self.inquiry.space, self.inquiry.device)
        return images, self.tensors["said"][indices].to(self.inquiry.device)


def soft_or_hard(taught: Taught, temperature: float) -> Terms:
    """Return T^2 KL(teacher || student), or the cross-entropy where the teacher tells labels alone."""
    if taught.labels is not None:
        return {"labels": cross_entropy(taught.student.logits, taught.labels)}
    return {"kl": divergence(taught.teacher.logits, taught.student.logits, temperature=temperature)}
