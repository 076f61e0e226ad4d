"""What a memory should give for a key: values that make the model say the target, searched for by gradient steps.

All edits are searched for side by side. Each has a value of its own, so that the result is what one by one would give.

The published code counts steps and lengths in the units of two models: a rate of 0.5, and lengths over that of what
the MLP gives. In a model with shorter vectors one such step leaves the region where the model works. Here both are
counted in the length |h| of the residual stream at the end of the subject, which is what the value is added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lfm.data.requests import Request
from lfm.edit._contract import LeastSquares
from lfm.edit._locate import Asked, Memory, asked, at_places, by_text, changing, labels_of, padded, reading
from lfm.models.encode import IGNORE
from lfm.models.handle import Model
from lfm.models.local import forward

ELEMENTS = 1 << 26  # logits that are held at once
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class Values:
    """Values (n, width) at the ends of subjects, and -log P(target) (n,) with which the search ended."""

    values: torch.Tensor
    losses: torch.Tensor
    steps: int


def find_values(
    model: Model, requests: Sequence[Request], memory: Memory, method: LeastSquares, contexts: Sequence[str]
) -> Values:
    """Return what should come out of a memory (or of its block: `stream`) at the end of each subject."""
    texts = [_texts(model, request, contexts) for request in requests]
    vocabulary = forward_width(model)
    longest = max(len(text.ids) for own in texts for text in own)
    together = max(1, ELEMENTS // (longest * vocabulary * max(map(len, texts))))
    parts = [
        _Search(model, texts[start : start + together], memory, method).run()
        for start in range(0, len(texts), together)
    ]
    return Values(
        torch.cat([part.values for part in parts]),
        torch.cat([part.losses for part in parts]),
        max(part.steps for part in parts),
    )


def forward_width(model: Model) -> int:
    """Return how many logits the model gives for each token."""
    head = getattr(model.module, "get_output_embeddings", lambda: None)()
    return int(head.weight.shape[0]) if head is not None else len(model.encoder.tokenizer)


def _texts(model: Model, request: Request, contexts: Sequence[str]) -> list[Asked]:
    """Return the prompt with its target in every context, and last what is said of the subject alone."""
    found = [asked(model, request, before, target=request.target) for before in ("", *contexts)]
    about = request.subject or request.prompt
    return [*found, asked(model, Request(f"{about} is a", "", request.subject, where=request.where))]


class _Search:
    """The search for the values of some edits; those that are found drop out of the batch."""

    def __init__(self, model: Model, texts: Sequence[Sequence[Asked]], memory: Memory, method: LeastSquares) -> None:
        self._module: nn.Module = model.module
        self._texts = texts
        self._stream = memory.block.name
        self._place = self._stream if type(method).stream else memory.out.name
        self._method = method
        self._device = next(self._module.parameters()).device

    def run(self) -> Values:
        method = self._method
        own = [texts[0] for texts in self._texts]
        with torch.no_grad(), reading(self._module, [self._place, self._stream], inputs=False) as seen:
            self._logits([text.ids for text in own])
            places = [text.subject for text in own]
            start = at_places(seen[self._place], places).float()
            lengths = at_places(seen[self._stream], places).float().norm(dim=1)
        rates = method.learning_rate * lengths / start.shape[1] ** 0.5
        deltas, losses = torch.zeros_like(start), torch.zeros(len(own), device=start.device)
        first, second = torch.zeros_like(start), torch.zeros_like(start)
        said: torch.Tensor | None = None
        running = list(range(len(own)))
        step = 0
        for step in range(1, method.steps + 1):
            moved = deltas[running].clone().requires_grad_()
            loss, missed, said_now = self._loss(running, moved, lengths[running], said)
            said = said_now if said is None else said
            losses[running] = missed
            going = [row for row, one in enumerate(missed.tolist()) if one >= method.enough]
            if not going or step == method.steps:
                break
            [gradient] = torch.autograd.grad(loss.sum(), [moved])
            rows = [running[row] for row in going]
            with torch.no_grad():
                taken = gradient[going]
                first[rows] = BETAS[0] * first[rows] + (1 - BETAS[0]) * taken
                second[rows] = BETAS[1] * second[rows] + (1 - BETAS[1]) * taken**2
                size = (second[rows] / (1 - BETAS[1] ** step)).sqrt() + EPS
                deltas[rows] -= rates[rows, None] * first[rows] / (1 - BETAS[0] ** step) / size
                limit = method.clamp * lengths[rows]
                deltas[rows] *= (limit / deltas[rows].norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)[:, None]
            said = said[going]
            running = rows
        return Values((start + deltas).double().cpu(), losses.cpu(), step)

    def _loss(
        self, running: Sequence[int], deltas: torch.Tensor, lengths: torch.Tensor, said: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return of each edit the loss (n,), its part that is the target's, and what is said of the subject alone."""
        method = self._method
        texts = [text for index in running for text in self._texts[index]]
        count = len(self._texts[running[0]])
        owner = torch.arange(len(running), device=self._device).repeat_interleave(count)
        places = torch.tensor([text.subject for text in texts], device=self._device)
        rows = torch.arange(len(texts), device=self._device)

        def moved(hidden: torch.Tensor) -> torch.Tensor:
            added = by_text(hidden, len(texts)).index_put((rows, places), deltas[owner].to(hidden), accumulate=True)
            return added.view_as(hidden)

        with changing(self._module, self._place, moved):
            logits = self._logits([text.ids for text in texts])
        labels = labels_of(texts, logits.shape[1], self._device)
        wanted = labels != IGNORE
        chosen = torch.zeros(wanted.shape, device=self._device)
        scores = logits[wanted].float()
        told = scores.log_softmax(-1).gather(-1, labels[wanted][:, None])[:, 0]
        chosen = chosen.masked_scatter(wanted, told)
        means = chosen.sum(1) / wanted.sum(1).clamp_min(1)
        missed = -means.view(len(running), count)[:, :-1].mean(1)
        alone = rows.view(len(running), count)[:, -1]
        ends = [len(texts[row].ids) - 1 for row in alone.tolist()]
        now = at_places(logits[alone], ends).float().log_softmax(-1)
        before = now.detach() if said is None else said
        drift = (now.exp() * (now - before)).sum(-1)
        small = deltas.norm(dim=1) / lengths
        return missed + method.kl * drift + method.decay * small, missed.detach(), now.detach()

    def _logits(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        return forward(self._module, padded(ids, self._device))
