"""Edits by gradient steps on the requests themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from lfm.checkpoint import Change, Dense
from lfm.data.requests import Request
from lfm.edit._contract import Tuned
from lfm.edit._least_squares import Update
from lfm.edit._locate import asked, labels_of, memories, padded
from lfm.errors import RequestError
from lfm.models.encode import IGNORE
from lfm.models.handle import Model
from lfm.models.local import forward


def tune(method: Tuned, model: Model, requests: Sequence[Request], batch: int | None, seed: int) -> Iterator[Update]:
    """Yield one update for each batch of requests, made in the module in memory; all of them at once if not told."""
    size = batch or len(requests)
    known = memories(model)
    chosen = [len(known) // 3] if method.layers is None else sorted(set(method.layers))
    missing = [layer for layer in chosen if not 0 <= layer < len(known)]
    if missing:
        raise RequestError(f"{model.label}: layers: has blocks 0 to {len(known) - 1}, not {missing}")
    parts = [known[layer].out for layer in chosen]
    for start in range(0, len(requests), size):
        yield _update(method, model, requests[start : start + size], [part.weight for part in parts])


def _update(method: Tuned, model: Model, requests: Sequence[Request], names: Sequence[str]) -> Update:
    module = model.module
    device = next(module.parameters()).device
    weights = [module.get_parameter(name) for name in names]
    before = [weight.detach().clone() for weight in weights]
    texts = [asked(model, request, target=request.target) for request in requests]
    batch = padded([text.ids for text in texts], device)
    labels = labels_of(texts, batch["input_ids"].shape[1], device)
    wanted = labels != IGNORE
    fixed = [p for p in module.parameters() if p.requires_grad and not any(p is weight for weight in weights)]
    for parameter in fixed:
        parameter.requires_grad_(False)
    optimiser = torch.optim.Adam(weights, lr=method.learning_rate)
    loss = torch.zeros(())
    for _ in range(method.steps):
        loss = functional.cross_entropy(forward(module, batch)[wanted].float(), labels[wanted])
        if float(loss.detach()) < method.enough:
            break
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        method.bound(before, weights)
    for parameter in fixed:
        parameter.requires_grad_(True)
    changes: dict[str, Change] = {
        name: Dense((weight.detach() - old).cpu()) for name, weight, old in zip(names, weights, before, strict=True)
    }
    optimiser.zero_grad()
    return Update(tuple(requests), changes, (float(loss.detach()),))
