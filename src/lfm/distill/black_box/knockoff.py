"""Ask about unlabelled images of the user's own, and learn from what is said of them (Knockoff Nets).

    L = T^2 KL(teacher(x) || student(x)),   x from any images that are at hand

Where the teacher tells labels alone, the loss is the cross-entropy with them. Images are asked about in random order,
each once, or those first that the student is least sure of (ActiveThief). Of more images than queries the rest is left
out; of fewer, fewer queries are made.
"""

from typing import Literal

import torch
from pydantic import Field

from lfm.distill._asking import evaluated
from lfm.distill._contract import BlackBox, Inquirer, Inquiry, Taught, Terms
from lfm.distill.black_box._stored import Lesson, Stored, soft_or_hard
from lfm.method import Access, Data, Needs


class Knockoff(BlackBox):
    needs = Needs(access=Access.LABELS, data=Data.UNLABELLED, trains=True)
    paper = "https://arxiv.org/abs/1812.02766"

    temperature: float = Field(4.0, gt=0, description="Temperature of both models' probabilities in the loss.")
    order: Literal["random", "unsure"] = Field("random", description="Which images are asked about first.")
    candidates: int = Field(2000, ge=1, description="Images among which the least sure are chosen (`unsure`).")

    def inquirer(self, inquiry: Inquiry) -> Inquirer:
        return _Knockoff(self, inquiry)

    def terms(self, taught: Taught) -> Terms:
        return soft_or_hard(taught, self.temperature)


class _Knockoff(Stored):
    def __init__(self, method: Knockoff, inquiry: Inquiry) -> None:
        assert inquiry.proxy is not None, "the plan lets nothing run without data"
        super().__init__(inquiry, min(inquiry.queries, len(inquiry.proxy)))
        self._method = method
        self._images = inquiry.proxy
        self.tensors["waiting"] = torch.randperm(len(inquiry.proxy))

    def lesson(self, step: int) -> Lesson:
        wanted = min(self.wanted(step), len(self.tensors["waiting"]))
        if wanted:
            waiting = self.tensors["waiting"]
            chosen = self._unsure(wanted) if self._method.order == "unsure" else torch.arange(wanted)
            kept = torch.ones(len(waiting), dtype=torch.bool).index_fill(0, chosen, False)
            self.ask(self._pixels(waiting[chosen]))
            self.tensors["waiting"] = waiting[kept]
        return self.replay(self.inquiry.batch_size)

    def held_out(self, count: int) -> torch.Tensor:
        count = min(count, len(self.tensors["waiting"]) // 2)
        taken, self.tensors["waiting"] = self.tensors["waiting"][:count], self.tensors["waiting"][count:]
        return self._pixels(taken)

    def _unsure(self, count: int) -> torch.Tensor:
        """Return the places, among those that wait, of the images whose classes the student is least sure of."""
        places = torch.arange(min(max(self._method.candidates, count), len(self.tensors["waiting"])))
        found = []
        with torch.no_grad(), evaluated(self.inquiry.student) as student:
            for some in torch.split(places, 256):
                probs = student(self._pixels(self.tensors["waiting"][some])).softmax(-1)
                found.append(torch.special.entr(probs).sum(-1).cpu())
        return torch.cat(found).topk(count).indices

    def _pixels(self, indices: torch.Tensor) -> torch.Tensor:
        if not len(indices):
            return torch.zeros(0, *self.inquiry.space.shape, device=self.inquiry.device)
        pixels: torch.Tensor = self._images.batch(indices.tolist())["pixel_values"]
        return pixels.to(self.inquiry.device)
