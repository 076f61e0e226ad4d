"""Texts that models write to be learned from: how they are sampled, which are kept, what they are like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lfm.models._sampling import choose
from lfm.models.handle import Model
from lfm.models.text import Sampling
from lfm.models.writing import Stepper

TOGETHER = 64  # texts that are written in one batch
GRAM = 4  # tokens of the stretches whose repetition is looked at


@dataclass(frozen=True)
class Text:
    """A text as its reader's token ids. The first `given` of them were not sampled: a prompt, or what begins texts.

    `top` tells, for each token behind those, the likeliest ones: ids (n, k) and log-probabilities (n, k).
    """

    ids: tuple[int, ...]
    given: int
    prompted: bool
    text: str
    log_prob: float | None = None  # mean over what was sampled, as the writer sees it
    top: tuple[torch.Tensor, torch.Tensor] | None = None


def token_that_begins(tokenizer: Any) -> int | None:
    """Return what texts begin with, or what stands between them; None where there is neither."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return getattr(tokenizer, "eos_token_id", None) if begin is None else begin


def continued(
    stepper: Stepper,
    starts: Sequence[Sequence[int]],
    room: int | Sequence[int],
    how: Sampling,
    draws: Sequence[torch.Generator],
    ends: frozenset[int],
    greedy: Sequence[int] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Return the tokens that follow each start, and their log-probabilities; `greedy` counts those not sampled.

    A text ends with a token of `ends`, or where it fills its `room`, its start included. All that is random comes from
    the text's own generator, so it does not depend on which texts are written together.
    """
    rooms = [room] * len(starts) if isinstance(room, int) else room
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in starts]
    order = sorted(range(len(starts)), key=lambda place: len(starts[place]))
    alike = [list(group) for _, group in groupby(order, key=lambda place: 0 if stepper.pads else len(starts[place]))]
    for group in alike:
        for first in range(0, len(group), TOGETHER):
            rows = [row for row in group[first : first + TOGETHER] if len(starts[row]) < rooms[row]]
            if rows:
                _continue(stepper, rows, starts, rooms, how, draws, ends, greedy, found)
    return found


def _continue(
    stepper: Stepper,
    running: list[int],
    starts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    how: Sampling,
    draws: Sequence[torch.Generator],
    ends: frozenset[int],
    greedy: Sequence[int] | None,
    found: Sequence[tuple[list[int], list[float]]],
) -> None:
    log_probs = stepper.start([starts[row] for row in running])
    while True:
        tokens = choose(log_probs, how, [draws[row] for row in running])
        if greedy is not None:
            best = log_probs.argmax(-1).tolist()
            tokens = [
                best[place] if len(found[row][0]) < greedy[row] else tokens[place] for place, row in enumerate(running)
            ]
        values = log_probs.gather(-1, torch.tensor(tokens, device=log_probs.device)[:, None])[:, 0].tolist()
        for row, token, value in zip(running, tokens, values, strict=True):
            found[row][0].append(token)
            found[row][1].append(value)
        left = [
            place
            for place, row in enumerate(running)
            if tokens[place] not in ends and len(starts[row]) + len(found[row][0]) < rooms[row]
        ]
        if not left:
            return
        if len(left) < len(running):
            stepper.select(torch.tensor(left))
            running = [running[place] for place in left]
        log_probs = stepper.step(torch.tensor([tokens[place] for place in left]))


def vocabulary_of(model: Model, tokenizer: Any, generator: torch.Generator) -> list[int]:
    """Return the tokens that stand for text of their own, in random order: no special ones, no parts of characters."""
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    good = [i for i, text in enumerate(texts) if i not in special and text.strip() and "\ufffd" not in text]
    order = torch.randperm(len(good), generator=generator).tolist()
    return [good[place] for place in order]


# --- which are kept -------------------------------------------------------------------------------------------------


def repetition(ids: Sequence[int]) -> float:
    """Return the share of the stretches of 4 tokens that have stood in the text before."""
    grams = list(_grams(ids, GRAM))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(ids: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[place : place + size]) for place in range(len(ids) - size + 1))


@dataclass
class Sieve:
    """Keeps texts that are new, long enough, and do not go round in circles; counts what it drops."""

    min_tokens: int
    max_repetition: float
    kept: list[Text] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: set[tuple[int, ...]] = field(default_factory=set)

    def take(self, text: Text | None) -> None:
        """Keep a text or drop it; None is one that could not be read."""
        fault = self._fault(text)
        if text is None or fault:
            self.dropped[fault] += 1
        else:
            self._seen.add(text.ids)
            self.kept.append(text)

    def _fault(self, text: Text | None) -> str:
        if text is None:
            return "unreadable"
        if len(text.ids) < self.min_tokens or len(text.ids) <= max(text.given, 1):
            return "short"
        if text.ids in self._seen:
            return "duplicates"
        return "repetitive" if repetition(text.ids[text.given :]) > self.max_repetition else ""


def statistics(sieve: Sieve) -> dict[str, float]:
    """Return what the texts are like: how many, how varied, how likely to who wrote them."""
    texts = sieve.kept
    found = {
        "synthesised_texts": float(len(texts)),
        "synthesised_tokens": float(sum(len(text.ids) for text in texts)),
        **{f"synthesised_{why}": float(sieve.dropped[why]) for why in ("duplicates", "repetitive", "short")},
    }
    if sieve.dropped["unreadable"]:
        found["synthesised_unreadable"] = float(sieve.dropped["unreadable"])
    for size in (1, 2, 3):
        grams = [gram for text in texts for gram in _grams(text.ids, size)]
        found[f"synthesised_distinct_{size}"] = len(set(grams)) / max(len(grams), 1)
    told = [(text.log_prob, len(text.ids) - text.given) for text in texts if text.log_prob is not None]
    if told:
        found["synthesised_log_prob"] = sum(value * count for value, count in told) / sum(count for _, count in told)
    return found


class still:
    """Keeps a module in evaluation mode for as long as it writes; each of its parts goes back to what it was in."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._modes: Mapping[nn.Module, bool] = {part: part.training for part in self._module.modules()}
        self._module.eval()

    def __exit__(self, *_: object) -> None:
        for part, mode in self._modes.items():
            part.training = mode
