"""Joining whole answers: ranked in pairs, fused from the best, or asked of a larger model where a small is unsure.

All of it works on handles, so members may be models in memory, endpoints and ensembles, mixed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch

from lfm.data import Rows
from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.encode import IGNORE
from lfm.models.handle import Model, Tell
from lfm.models.text import Completion, Message, Prompt, Sampling

Array = np.ndarray[Any, np.dtype[Any]]
JUDGE = (
    "Which answer to the request is better?\n\nRequest:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
    "Say A or B.\nBetter answer:"
)
FUSE = "Request:\n{prompt}\n\n{answers}\n\nWrite the best answer to the request, using the answers above.\nBest answer:"


def shown(prompt: Prompt) -> str:
    """Return a prompt as text to be shown inside another prompt."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def asked_like(prompt: Prompt, text: str) -> Prompt:
    """Return `text` as a conversation where `prompt` is one, so that a chat model is asked as it was trained."""
    return text if isinstance(prompt, str) else [Message(role="user", content=text)]


# --- ranking --------------------------------------------------------------------------------------------------------


class Ranker(ABC):
    """Says which of two answers is better."""

    @abstractmethod
    def prefer(self, prompt: Prompt, answers: Sequence[str]) -> Array:
        """Return a matrix (answers, answers): the probability that the row's answer is better than the column's.

        Opposite entries sum to 1; an answer beside itself has 0.5.
        """


class Judge(Ranker):
    """A model asked which of two is better, in both orders, since many prefer the first.

    Where it offers probabilities, those of A and B are compared; else it has said A, B or neither (a draw).
    """

    def __init__(self, model: Model, template: str = JUDGE) -> None:
        self._model = model
        self._template = template
        offered = model.access >= Access.PROBS
        self._how = Sampling(max_new_tokens=1, top_logprobs=20) if offered else Sampling(max_new_tokens=4)

    def prefer(self, prompt: Prompt, answers: Sequence[str]) -> Array:
        pairs = [pair for i, j in combinations(range(len(answers)), 2) for pair in ((i, j), (j, i))]
        said = self._model.write([self._question(prompt, answers[i], answers[j]) for i, j in pairs], self._how)
        first = dict(zip(pairs, map(_prefers_first, said), strict=True))
        found = np.full((len(answers), len(answers)), 0.5)
        for i, j in pairs:
            found[i, j] = (first[i, j] + 1 - first[j, i]) / 2
        return found

    def _question(self, prompt: Prompt, first: str, second: str) -> Prompt:
        parts = {"prompt": shown(prompt), "first": first, "second": second}
        return asked_like(prompt, _filled(self._template, parts))


def _filled(template: str, parts: dict[str, str]) -> str:
    """Put texts into a template; braces within them are left as they are."""
    return template.format(**parts)


def _prefers_first(said: Completion) -> float:
    """Return the probability that A is meant."""
    if said.tokens:
        mass = {"A": 0.0, "B": 0.0}
        for text, logprob in said.tokens[0].top.items():
            if text.strip().upper() in mass:
                mass[text.strip().upper()] += math.exp(logprob)
        total = sum(mass.values())
        return mass["A"] / total if total > 0 else 0.5
    word = said.text.strip().strip("*\"'`.(").upper()[:2]
    return {"A": 1.0, "B": 0.0}.get(word.rstrip(".,:;)*\"'`\n "), 0.5)


class Likelihood(Ranker):
    """The answer that a model in memory finds more probable, by the mean log-probability of its tokens.

    The probability of preference is sigmoid(sharpness * difference).
    """

    def __init__(self, model: Model, sharpness: float = 1.0) -> None:
        if model.access < Access.PROBS or model.encoder.tokenizer is None:
            raise AccessError(f"{model.label}: likelihoods of answers take a model in memory that gives probabilities")
        self._model = model
        self._sharpness = sharpness

    def prefer(self, prompt: Prompt, answers: Sequence[str]) -> Array:
        scores = np.array([self._score(shown(prompt), answer) for answer in answers])
        difference = np.clip(self._sharpness * (scores[:, None] - scores[None, :]), -500, 500)
        preferred: Array = 1 / (1 + np.exp(-difference))
        return preferred

    def _score(self, prompt: str, answer: str) -> float:
        rows = Rows({"prompt": [prompt], "completion": [answer]}, origin="the candidate answers")
        encoder = self._model.encoder
        batch = encoder.encode(rows, encoder.context or 1 << 20).batch([0])
        labels = batch["labels"][:, 1:]
        log_probs = self._model.log_probs(batch)[:, :-1].cpu()
        each = log_probs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return float(each[labels != IGNORE].mean())


def chosen(members: Sequence[Model], number: int, name: str) -> Model:
    """Return the member of a number counted from 1, or refuse it."""
    if number > len(members):
        raise RequestError(f"{name}: {number} is no member, there are {len(members)}")
    return members[number - 1]


def ranker_of(kind: Literal["judge", "likelihood"], model: Model) -> Ranker:
    """Return a ranker of this kind by this model."""
    return Judge(model) if kind == "judge" else Likelihood(model)


def ranked(ranker: Ranker, prompt: Prompt, answers: Sequence[str]) -> list[int]:
    """Return the answers' places from best to worst, by the mean of their preferences over all others."""
    if len(answers) == 1:
        return [0]
    wins = ranker.prefer(prompt, answers).sum(-1)
    return sorted(range(len(answers)), key=lambda index: (-wins[index], index))


# --- backends -------------------------------------------------------------------------------------------------------


class _Writes:
    """A backend of text alone."""

    offers = Access.LABELS

    def logits(self, batch: object) -> Any:
        raise AssertionError("only text is offered")

    def labels(self, batch: object) -> Any:
        raise AssertionError("only text is offered")


@dataclass(frozen=True)
class Candidates:
    """What members write for a prompt: `number` answers from each, drawn with `temperature` where more than one."""

    members: Sequence[Model]
    number: int = 1
    temperature: float = 0.8

    def write(self, prompts: Sequence[Prompt], how: Sampling) -> list[list[Completion]]:
        """Return every prompt's candidates, those of the first member first; the same text is kept once."""
        warm = {"temperature": self.temperature} if self.number > 1 and how.temperature == 0 else {}
        plain = how.model_copy(update={"top_logprobs": None} | warm)
        repeated = [prompt for prompt in prompts for _ in range(self.number)]
        found: list[dict[str, Completion]] = [{} for _ in prompts]
        for member in self.members:
            for place, made in enumerate(member.write(repeated, plain)):
                found[place // self.number].setdefault(made.text, made)
        return [list(unique.values()) for unique in found]


class BestOfBackend(_Writes):
    """Writes the candidate that wins most comparisons (Jiang et al. 2023, PairRanker)."""

    def __init__(self, candidates: Candidates, ranker: Ranker) -> None:
        self._candidates = candidates
        self._ranker = ranker

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        found = []
        for prompt, made in zip(prompts, self._candidates.write(prompts, how), strict=True):
            found.append(made[ranked(self._ranker, prompt, [one.text for one in made])[0]])
        return _told(found, tell)


class FuseBackend(_Writes):
    """Shows the best candidates to a model, which writes the answer (Jiang et al. 2023, GenFuser)."""

    def __init__(
        self, candidates: Candidates, ranker: Ranker | None, fuser: Model, keep: int = 3, template: str = FUSE
    ) -> None:
        self._candidates = candidates
        self._ranker = ranker
        self._fuser = fuser
        self._keep = keep
        self._template = template

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        made = self._candidates.write(prompts, how)
        questions = [self._question(prompt, answers) for prompt, answers in zip(prompts, made, strict=True)]
        return self._fuser.write(questions, how, tell)

    def _question(self, prompt: Prompt, made: Sequence[Completion]) -> Prompt:
        texts = [one.text for one in made]
        order = ranked(self._ranker, prompt, texts) if self._ranker else range(len(texts))
        best = [texts[index] for index in order][: self._keep]
        answers = "\n\n".join(f"Answer {number}:\n{text}" for number, text in enumerate(best, 1))
        return asked_like(prompt, _filled(self._template, {"prompt": shown(prompt), "answers": answers}))


class CascadeBackend(_Writes):
    """Asks the first model, and the next only where the mean probability of a token is below its threshold.

    Thresholds, one for each model but the last, are of the geometric mean of the probabilities of an answer's tokens,
    from 0 (never ask further) to 1. Every model but the last must offer PROBS.
    """

    def __init__(self, models: Sequence[Model], thresholds: Sequence[float]) -> None:
        assert len(thresholds) == len(models) - 1
        self._models = models
        self._thresholds = [*thresholds, 0.0]

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        found: dict[int, Completion] = {}
        left = list(range(len(prompts)))
        for place, (model, threshold) in enumerate(zip(self._models, self._thresholds, strict=True), 1):
            if not left:
                break
            measured = how.model_copy(update={"top_logprobs": how.top_logprobs or 0})
            asked = how if place == len(self._models) else measured
            made = model.write([prompts[index] for index in left], asked)
            found |= dict(zip(left, made, strict=True))
            left = [index for index in left if confidence(found[index]) < threshold]
        return _told([found[index] for index in range(len(prompts))], tell)


def confidence(made: Completion) -> float:
    """Return the geometric mean of the probabilities of an answer's tokens; 0 where it has none."""
    if not made.tokens:
        return 0.0
    return math.exp(sum(token.logprob for token in made.tokens) / len(made.tokens))


def confidences(models: Sequence[Model], prompts: Sequence[Prompt], tokens: int) -> torch.Tensor:
    """Return how sure each model is of the answer that it would give to each prompt: (models, prompts), float64."""
    how = Sampling(max_new_tokens=tokens, top_logprobs=0)
    answers = [model.write(prompts, how) for model in models]
    return torch.tensor([[confidence(made) for made in row] for row in answers], dtype=torch.float64)


def _told(found: list[Completion], tell: Tell | None) -> list[Completion]:
    """Tell each answer in one piece: which one it is was not known before it was whole."""
    for index, made in enumerate(found):
        if tell is not None and made.text:
            tell(index, made.text)
    return found
