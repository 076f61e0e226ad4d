"""Choosing the next token from log-probabilities: greedily, or at random from a generator of each text's own."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from lfm.models.text import Sampling


def generators(seed: int | None, prompts: Sequence[Hashable]) -> list[torch.Generator]:
    """Return a generator for every prompt, which depends on the seed, the prompt, and how often it came before.

    So an answer does not change with what else is asked in the same call, and a prompt asked twice has two answers.
    Without a seed they are drawn from the system.
    """
    base = secrets.token_hex(16) if seed is None else str(seed)
    before: Counter[Hashable] = Counter()
    made = []
    for prompt in prompts:
        key = f"{base}|{before[prompt]}|{prompt!r}".encode()
        before[prompt] += 1
        made.append(torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big")))
    return made


def choose(log_probs: torch.Tensor, how: Sampling, draws: Sequence[torch.Generator]) -> list[int]:
    """Return one token for each row of log-probabilities (n, vocabulary)."""
    if how.temperature == 0 or how.top_k == 1:
        greedy: list[int] = log_probs.argmax(-1).tolist()
        return greedy
    scaled = log_probs.double().cpu() / how.temperature
    ranked = how.top_k > 0 or how.top_p < 1
    order = scaled.sort(dim=-1, descending=True, stable=True).indices if ranked else None
    if order is not None:
        order = order[:, : how.top_k or None]
        scaled = scaled.gather(-1, order)
    probs = scaled.softmax(-1)
    if how.top_p < 1:  # a token stays while those before it hold less than the share
        probs = probs * ((probs.cumsum(-1) - probs) < how.top_p)
    place = _inverse(probs.cumsum(-1), draws)
    chosen: list[int] = (place if order is None else order.gather(-1, place)).squeeze(-1).tolist()
    return chosen


def _inverse(cumulated: torch.Tensor, draws: Sequence[torch.Generator]) -> torch.Tensor:
    """Return the first place (n, 1) whose cumulated mass exceeds a uniform share of the whole."""
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws])
    total = cumulated[:, -1:]
    # below the total whatever the rounding, so that a token without mass at the end is never taken
    wanted = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, wanted, right=True)
