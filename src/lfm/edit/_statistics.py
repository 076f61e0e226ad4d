"""Which directions the inputs of a matrix take in ordinary text: E[k k^T], by text that the model makes up.

Kept in lfm's cache folder by what the model holds, where from and how much; nothing but models of the same weights
share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from lfm.checkpoint import cache_folder
from lfm.edit._locate import by_text, padded, reading
from lfm.models.handle import Model
from lfm.models.samples import sampled_tokens

LENGTH = 128  # tokens of a text that the model makes up
TOGETHER = 16  # texts that are read at once


@dataclass(frozen=True)
class Statistics:
    """E[k k^T] (width, width) of the input of each module, in float64, and how many tokens it was taken from."""

    covariances: dict[str, torch.Tensor]
    tokens: int

    def effective_rank(self, name: str) -> float:
        """Return how many directions the inputs take: e to the entropy of the spectrum."""
        spectrum = torch.linalg.eigvalsh(self.covariances[name]).clamp_min(0)
        shares = spectrum / spectrum.sum()
        return float(torch.special.entr(shares).sum().exp())


def statistics(
    model: Model, names: Sequence[str], tokens: int, *, digest: str | None, seed: int, texts: list[torch.Tensor] | None
) -> Statistics:
    """Return the statistics of the inputs of modules over given texts, or over texts that the model makes up.

    With the `digest` of the model's weights, what it makes up is asked for only once.
    """
    if texts is not None:
        return _measured(model, names, _cut(texts, tokens))
    key = hashlib.sha256(json.dumps([digest, sorted(names), tokens, seed, LENGTH]).encode()).hexdigest()
    path = cache_folder() / "statistics" / f"{key[:32]}.safetensors"
    if digest is not None and path.is_file():
        kept = load_file(path)
        count = int(kept.pop("tokens"))
        return Statistics(kept, count)
    made = sampled_tokens(model, -(-tokens // LENGTH), LENGTH, seed=seed)
    found = _measured(model, names, _cut(made, tokens))
    if digest is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        save_file({**found.covariances, "tokens": torch.tensor(found.tokens)}, draft)
        draft.replace(path)
    return found


def _cut(texts: Sequence[torch.Tensor], tokens: int) -> list[list[int]]:
    """Return the first so many tokens."""
    found: list[list[int]] = []
    left = tokens
    for text in texts:
        if left <= 1:
            break
        found.append(text[:left].tolist())
        left -= len(text)
    return [text for text in found if len(text) > 1]


def _measured(model: Model, names: Sequence[str], texts: Sequence[Sequence[int]]) -> Statistics:
    module = model.module
    device = next(module.parameters()).device
    sums: dict[str, torch.Tensor] = {}
    count = 0
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with torch.no_grad(), reading(module, names, inputs=True) as seen:
        for start in range(0, len(order), TOGETHER):
            batch = padded([texts[index] for index in order[start : start + TOGETHER]], device)
            module(**batch)
            kept = batch["attention_mask"].bool()
            for name in names:
                keys = by_text(seen[name], len(kept))[kept].double()
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + keys.T @ keys
            count += int(kept.sum())
    return Statistics({name: (total / count).cpu() for name, total in sums.items()}, count)
