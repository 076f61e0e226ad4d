"""What a model says where it was edited, where it was asked in other words, and where nothing should have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lfm.data.requests import Request
from lfm.edit._locate import asked, labels_of, padded, tokens_of
from lfm.models.encode import IGNORE
from lfm.models.handle import Model
from lfm.models.local import forward
from lfm.models.samples import sampled_tokens

TOGETHER = 64
DRIFT_TEXTS, DRIFT_LENGTH = 16, 32  # texts of its own on which a model is compared with itself


@dataclass(frozen=True)
class Told:
    """What a model thinks of a target behind a prompt."""

    logprob: float  # of all its tokens together
    exact: bool  # whether each token is the most probable one, those before it given


@dataclass(frozen=True)
class Said:
    """What a model says of one request."""

    target: Told
    old: Told | None
    paraphrases: tuple[tuple[Told, Told | None], ...]  # of target and old
    neighbours: tuple[tuple[int, Told | None, Told], ...]  # next token; of the right answer, and of the target
    answer: str
    same_subject: tuple[bool, ...] = ()  # which of the neighbours are about the subject of the edit itself


def listen(model: Model, requests: Sequence[Request], *, answers: int = 8) -> list[Said]:
    """Return what a model says of requests; `answers` is how many tokens it is let go on for."""
    asks: list[tuple[Request, str]] = []
    for request in requests:
        for prompt in (request.prompt, *request.paraphrases):
            plain = Request(prompt, "", where=request.where)
            asks += [(plain, request.target), *([(plain, request.old)] if request.old else [])]
        for near in request.neighbours:
            plain = Request(near.prompt, "", where=request.where)
            asks += [(plain, request.target), *([(plain, near.answer)] if near.answer else [])]
    told = iter(_told(model, asks))
    nexts = iter(_next_tokens(model, [near.prompt for request in requests for near in request.neighbours]))
    texts = model.complete([request.prompt for request in requests], answers) if answers else [""] * len(requests)
    found = []
    for request, answer in zip(requests, texts, strict=True):
        pairs = [(next(told), next(told) if request.old else None) for _ in (0, *request.paraphrases)]
        neighbours = []
        for near in request.neighbours:
            target = next(told)
            neighbours.append((next(nexts), next(told) if near.answer else None, target))
        same = tuple(request.subject is not None and request.subject in near.prompt for near in request.neighbours)
        found.append(Said(*pairs[0], tuple(pairs[1:]), tuple(neighbours), answer, same))
    return found


def _told(model: Model, asks: Sequence[tuple[Request, str]]) -> list[Told]:
    device = next(model.module.parameters()).device
    texts = [asked(model, request, target=target) for request, target in asks]
    found: list[Told] = []
    with torch.no_grad():
        for start in range(0, len(texts), TOGETHER):
            part = texts[start : start + TOGETHER]
            logits = forward(model.module, padded([text.ids for text in part], device))
            labels = labels_of(part, logits.shape[1], device)
            for row, kept in enumerate(labels != IGNORE):
                said = logits[row, kept].float().log_softmax(-1)
                wanted = labels[row, kept]
                logprob = float(said.gather(-1, wanted[:, None]).sum())
                found.append(Told(logprob, bool((said.argmax(-1) == wanted).all())))
    return found


def _next_tokens(model: Model, prompts: Sequence[str]) -> list[int]:
    device = next(model.module.parameters()).device
    texts = [tokens_of(model, prompt)[0] for prompt in prompts]
    found: list[int] = []
    with torch.no_grad():
        for start in range(0, len(texts), TOGETHER):
            part = texts[start : start + TOGETHER]
            logits = forward(model.module, padded(part, device))
            found += [int(logits[row, len(text) - 1].argmax()) for row, text in enumerate(part)]
    return found


def metrics(before: Sequence[Said], after: Sequence[Said]) -> dict[str, float]:
    """Return shares over all edits, those that nothing is known of left out.

    `efficacy` and `paraphrase`: the target is what the model says, token by token. `efficacy_more_likely` and
    `paraphrase_more_likely` (ES and PS of CounterFact): the target is more likely than the old answer.
    `neighbours_kept`: the next token is what it was before, where others are asked for; `same_subject_kept`: where
    other things are asked of an edit's own subject; `neighbourhood_more_likely` (NS): the right answer is more likely
    than the target.
    """
    shares = {
        "efficacy": (said.target.exact for said in after),
        "efficacy_before": (said.target.exact for said in before),
        "efficacy_more_likely": (_more(said.target, said.old) for said in after),
        "paraphrase": (new.exact for said in after for new, _ in said.paraphrases),
        "paraphrase_more_likely": (_more(new, old) for said in after for new, old in said.paraphrases),
        "neighbours_kept": _kept(before, after, same=False),
        "same_subject_kept": _kept(before, after, same=True),
        "neighbourhood_more_likely": (_more(right, new) for said in after for _, right, new in said.neighbours),
    }
    return {name: share for name, values in shares.items() if (share := _mean(values)) is not None}


def _kept(before: Sequence[Said], after: Sequence[Said], *, same: bool) -> Iterator[bool]:
    """Yield whether neighbours, of the subject itself or of others, get the next token that they got before."""
    for one, other in zip(before, after, strict=True):
        for was, now, own in zip(one.neighbours, other.neighbours, other.same_subject, strict=True):
            if own is same:
                yield was[0] == now[0]


def _more(one: Told | None, other: Told | None) -> bool | None:
    return None if one is None or other is None else one.logprob > other.logprob


def _mean(values: Iterable[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def records(requests: Sequence[Request], before: Sequence[Said], after: Sequence[Said]) -> list[dict[str, Any]]:
    """Return, for each edit, the raw answers beside what they are counted as."""
    return [
        {
            "id": request.id,
            "prompt": request.prompt,
            "target": request.target,
            "before": was.answer,
            "after": now.answer,
            "logprob_before": round(was.target.logprob, 4),
            "logprob_after": round(now.target.logprob, 4),
            "efficacy": now.target.exact,
            "paraphrases": [new.exact for new, _ in now.paraphrases],
            "neighbours_kept": list(_kept([was], [now], same=False)),
            "same_subject_kept": list(_kept([was], [now], same=True)),
        }
        for request, was, now in zip(requests, before, after, strict=True)
    ]


class Drift:
    """How far a model moves from what it was: the mean KL(before | after) of a token of texts that it made up."""

    def __init__(self, model: Model, seed: int) -> None:
        made = sampled_tokens(model, DRIFT_TEXTS, DRIFT_LENGTH, seed=seed + 2)
        self._texts = [text.tolist() for text in made if len(text) > 1]
        self._before = self._said(model)

    def now(self, model: Model) -> float | None:
        """Return how far it has moved; None if it makes up no texts."""
        if not self._texts:
            return None
        after = self._said(model)
        return float((self._before.exp() * (self._before - after)).sum(-1).mean())

    def _said(self, model: Model) -> torch.Tensor:
        """Return log-probabilities (tokens, vocabulary), behind all tokens of all texts."""
        if not self._texts:
            return torch.zeros(0, 0)
        batch = padded(self._texts, next(model.module.parameters()).device)
        with torch.no_grad():
            logits = forward(model.module, batch)[batch["attention_mask"].bool()]
        return logits.float().log_softmax(-1).cpu()
