"""Writing text token by token with a model in memory: key-value cache, sampling, stop texts, log-probabilities.

What gives the log-probabilities of the next token is a `Stepper`: a module with its cache, or several of them averaged.
What turns prompts into tokens and tokens into text is a `Wording`. Everything else is the same for all of them.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from lfm.errors import LfmError, RequestError, plural
from lfm.models._pretrained import context_of
from lfm.models._sampling import choose, generators
from lfm.models._surroundings import quiet_transformers
from lfm.models._wording import Tellable, TokenizerWording, Wording
from lfm.models.handle import Tell
from lfm.models.text import Completion, Prompt, Sampling, Token

TOGETHER = 32  # prompts that are continued in one batch


class Stepper(ABC):
    """Gives the log-probabilities of the next token of several texts, which grow by one token at a time."""

    @property
    @abstractmethod
    def pads(self) -> bool:
        """Whether texts of several lengths may start together."""

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Begin with these texts; returns log-probabilities (n, vocabulary), float32."""

    @abstractmethod
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add a token (n,) to each text; returns log-probabilities (n, vocabulary), float32."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Go on with these texts (m,): fewer, in another order, or one several times."""


@dataclass(frozen=True)
class TextModel:
    """A causal language model with its tokenizer."""

    module: nn.Module
    tokenizer: Any

    @property
    def wording(self) -> TokenizerWording:
        """How it reads and writes."""
        return TokenizerWording(self.tokenizer, self.ends, self.context)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: the model's own where it has a say, else the tokenizer's."""
        found = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        if found is None:
            found = getattr(self.tokenizer, "eos_token_id", None)
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    @property
    def context(self) -> int | None:
        """Tokens that it takes at most, where it says so."""
        config = getattr(self.module, "config", None)
        return context_of(self.module, config) if config is not None else None


def write(model: TextModel, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
    """Return what the model writes after each prompt.

    Without a temperature this is what `generate` of transformers writes. With one, each prompt draws from a generator
    of its own (see `generators`). Raises RequestError, with all of them, for prompts that cannot be gone on from.
    """
    model.module.eval()
    return write_with(ModuleStepper(model.module), model.wording, prompts, how, tell)


def write_with(
    stepper: Stepper, wording: Wording, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None
) -> list[Completion]:
    """Return what is written after each prompt by what `stepper` says of the next token."""
    encoded = _encoded(wording, prompts, how)
    draws = generators(how.seed, [tuple(ids) for ids in encoded])
    answers = [
        _Answer(i, ids, draw, how, wording, tell) for i, (ids, draw) in enumerate(zip(encoded, draws, strict=True))
    ]
    with quiet_transformers():
        for batch in _batches(answers, stepper.pads):
            _write_batch(stepper, batch, how)
    return [answer.completion() for answer in answers]


def _encoded(wording: Wording, prompts: Sequence[Prompt], how: Sampling) -> list[list[int]]:
    """Return every prompt's tokens, or raise with all that is wrong with any of them."""
    encoded, problems = [], []
    for index, prompt in enumerate(prompts):
        place = f"prompt {index + 1}: " if len(prompts) > 1 else ""
        try:
            ids = wording.encode(prompt)
        except RequestError as error:
            problems += [f"{place}{problem}" for problem in error.problems]
            continue
        encoded.append(ids)
        if wording.context is not None and len(ids) + how.max_new_tokens > wording.context:
            problems.append(
                f"{place}{plural(len(ids), 'token')} and up to {how.max_new_tokens:,} new ones are more than the "
                f"{wording.context:,} that the model takes; {_remedy(wording.context - len(ids))}"
            )
    if problems:
        raise RequestError(*problems)
    return encoded


def _remedy(left: int) -> str:
    return f"set max_new_tokens to {left:,} or less" if left > 0 else "shorten the prompt"


def _batches(answers: Sequence[_Answer], pads: bool) -> Iterator[list[_Answer]]:
    """Yield batches of prompts of about one length; of exactly one where there can be no padding."""
    ordered = sorted(answers, key=lambda answer: len(answer.prompt))
    alike = [list(group) for _, group in groupby(ordered, key=lambda answer: 0 if pads else len(answer.prompt))]
    for group in alike:
        yield from (group[first : first + TOGETHER] for first in range(0, len(group), TOGETHER))


def _write_batch(stepper: Stepper, running: list[_Answer], how: Sampling) -> None:
    log_probs = stepper.start([answer.prompt for answer in running])
    while True:
        if torch.isnan(log_probs).any():
            raise LfmError("the model's logits hold NaN: no next token can be told")
        tokens = choose(log_probs, how, [answer.draw for answer in running])
        for answer, token, row in zip(running, tokens, log_probs, strict=True):
            answer.take(token, row)
        left = [row for row, answer in enumerate(running) if answer.finish is None]
        if not left:
            return
        if len(left) < len(running):
            stepper.select(torch.tensor(left))
            running = [running[row] for row in left]
        log_probs = stepper.step(torch.tensor([tokens[row] for row in left]))


class _Answer:
    """One answer as it grows."""

    def __init__(
        self, index: int, prompt: list[int], draw: torch.Generator, how: Sampling, wording: Wording, tell: Tell | None
    ) -> None:
        self.prompt = prompt
        self.draw = draw
        self.finish: Literal["stop", "length"] | None = None
        self._how = how
        self._wording = wording
        self._reader = wording.reader(prompt)
        self._out = Tellable(how.stop, (lambda piece: tell(index, piece)) if tell else _nobody)
        self._count = 0
        self._tokens: list[tuple[int, Token]] = []  # with the place in the text where each begins

    def take(self, token: int, log_probs: torch.Tensor) -> None:
        """Go on by one token, of log-probabilities (vocabulary,) before it was chosen."""
        self._count += 1
        if token in self._wording.ends:
            self._end("stop")
            return
        if self._how.top_logprobs is not None:
            self._tokens.append((self._out.length, self._told(token, log_probs, self._how.top_logprobs)))
        if self._out.push(self._reader.push(token)):
            self.finish = "stop"
        elif self._count == self._how.max_new_tokens:
            self._end("length")

    def _end(self, why: Literal["stop", "length"]) -> None:
        stopped = self._out.push(self._reader.flush())
        self._out.finish()
        self.finish = "stop" if stopped else why

    def _told(self, token: int, log_probs: torch.Tensor, count: int) -> Token:
        top: dict[str, float] = {}
        best = log_probs.topk(min(count, len(log_probs)))
        for value, other in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value > float("-inf"):
                top.setdefault(self._wording.text_of(other), value)  # halves of characters may look the same
        return Token(self._wording.text_of(token), float(log_probs[token]), top)

    def completion(self) -> Completion:
        """Return the finished answer; of its tokens those that begin before a stop text did."""
        text = self._out.text
        tokens = tuple(token for place, token in self._tokens if place < len(text))
        return Completion(text, self.finish or "length", tokens, len(self.prompt), self._count)


def _nobody(_: str) -> None:
    """Nobody listens."""


# --- modules --------------------------------------------------------------------------------------------------------

CACHES = ("past_key_values", "cache_params", "state")  # names that models give to what they keep between tokens


class ModuleStepper(Stepper):
    """A module of transformers, with the cache that it keeps; one that keeps none reads the whole text every time."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Callable[..., Any] = module
        self._device = next(module.parameters()).device
        self._takes = frozenset(inspect.signature(module.forward).parameters)
        self._pads = {"attention_mask", "position_ids"} <= self._takes and not _recurrent(module)
        self._cache: tuple[str, Any] | None = None

    @property
    def pads(self) -> bool:
        return self._pads

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, prompts))
        if not self._pads and min(map(len, prompts)) < longest:
            raise ValueError("texts of several lengths, and the model cannot be told what is padding")
        left = [[0] * (longest - len(ids)) for ids in prompts]
        self._ids = torch.tensor([[*pad, *ids] for pad, ids in zip(left, prompts, strict=True)]).to(self._device)
        self._mask = torch.tensor([[*pad, *[1] * len(ids)] for pad, ids in zip(left, prompts, strict=True)])
        self._mask = self._mask.to(self._device)
        self._cache = None
        return self._next(self._ids)

    @property
    def gaps(self) -> bool:
        """Whether texts may stand still while others grow: not where places in the cache count as distances."""
        config = getattr(self._module, "config", None)
        full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        return self._pads and full and getattr(config, "sliding_window", None) is None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.step_some(tokens, torch.ones_like(tokens))

    def step_some(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Do as `step` for rows where `real` (n,) is 1; what comes out for the others, which stand still, is void."""
        fresh = tokens.to(self._device)[:, None]
        self._ids = torch.cat([self._ids, fresh], 1)
        self._mask = torch.cat([self._mask, real.to(self._mask)[:, None]], 1)
        return self._next(fresh if self._cache is not None else self._ids)

    def select(self, rows: torch.Tensor) -> None:
        rows = rows.to(self._device)
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        if self._cache is not None and hasattr(self._cache[1], "reorder_cache"):
            self._cache[1].reorder_cache(rows)
        else:
            self._cache = None  # the whole text is read with the next token

    def copied(self) -> ModuleStepper:
        """Return a stepper that goes its own way from here."""
        other = copy(self)
        other._cache = deepcopy(self._cache)
        return other

    @torch.inference_mode()
    def _next(self, fresh: torch.Tensor) -> torch.Tensor:
        """Read the tokens (n, fresh) that are not in the cache yet."""
        inputs: dict[str, Any] = {"input_ids": fresh}
        if self._pads:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            inputs |= {"attention_mask": self._mask, "position_ids": positions[:, -fresh.shape[1] :]}
        if "use_cache" in self._takes:
            inputs["use_cache"] = True
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        if self._cache is not None:
            inputs[self._cache[0]] = self._cache[1]
        made = self._module(**inputs)
        self._cache = self._kept(made)
        logits: torch.Tensor = made.logits[:, -1]
        return logits.float().log_softmax(-1)

    def _kept(self, made: Any) -> tuple[str, Any] | None:
        """Return the cache that came out, under its name; RWKV's plain lists are right for one text only (5.23)."""
        found = ((name, getattr(made, name, None)) for name in CACHES if name in self._takes)
        kept = next(((name, cache) for name, cache in found if cache is not None), None)
        return kept if kept is None or len(self._ids) == 1 or hasattr(kept[1], "reorder_cache") else None


def _recurrent(module: nn.Module) -> bool:
    """Whether a model keeps a state that padding would go into."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return getattr(module, "_is_stateful", False) or any("attention" not in kind or "linear" in kind for kind in kinds)
