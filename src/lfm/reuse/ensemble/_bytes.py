"""Next bytes from models of tokens: the mass of all tokenisations that go on from a text, summed by a beam.

A model of tokens gives a text the sum of what it gives to every sequence of tokens that spells it. A hypothesis is a
sequence of whole tokens and a place in the tree of the vocabulary, inside the token that comes next; its weight is the
probability of its tokens. The mass of all tokens that lie behind each branch is what it says of the next byte. Where
a token ends, a hypothesis is split in two: one goes on inside longer tokens, one begins the next.

Vieira et al. 2024 (https://arxiv.org/abs/2412.03719), with the context of long prompts as in Hayase et al. 2025.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import Batch
from lfm.models.handle import Model, Tell
from lfm.models.text import Completion, Prompt, Sampling
from lfm.models.writing import ModuleStepper, Stepper, TextModel, write_with
from lfm.reuse.ensemble._stepping import Of, averaged
from lfm.reuse.ensemble._trie import Array, Node, Trie, token_bytes

END = 256  # behind the bytes: the text ends here
REOPENED = 2  # last tokens of a prompt that may also be cut otherwise


@dataclass(frozen=True)
class Speller:
    """A model of tokens, and what they are in bytes."""

    model: TextModel
    width: int = 8  # hypotheses kept
    floor: float = 1e-4  # and none of less than this share of the best

    @cached_property
    def tokens(self) -> list[bytes]:
        return token_bytes(self.model.tokenizer)

    @cached_property
    def trie(self) -> Trie:
        config: Any = self.model.module.config
        rows: int = config.vocab_size  # a tokenizer may know more tokens than the model
        return Trie([token if index < rows else b"" for index, token in enumerate(self.tokens)])

    @cached_property
    def first(self) -> list[int]:
        """The tokens that its tokenizer puts before every text."""
        ids: list[int] = self.model.tokenizer("", verbose=False)["input_ids"]
        return ids

    @cached_property
    def lead(self) -> list[int]:
        """The tokens before a text that has none yet: there must be one, for the next to have a probability."""
        marks = [getattr(self.model.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
        found = self.first or [mark for mark in marks if mark is not None][:1]
        if not found:
            raise RequestError("the tokenizer marks no beginning, so the first byte of a text has no probability")
        return list(found)

    @cached_property
    def before(self) -> bytes:
        """The space that some tokenizers put before every text."""
        ids = self.model.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        return b"".join(self.tokens[index] for index in ids).removesuffix(b"a")

    def split(self, text: bytes, reopened: int) -> tuple[list[int], bytes]:
        """Return the tokens before a text's last ones, and the bytes of those, which are to be read one by one."""
        ids = self.model.tokenizer(text.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
        whole = self.before + text
        while ids:  # as many of the first tokens as spell the text, less those that are to be opened
            kept = ids[: max(len(ids) - reopened, 0)]
            spelled = b"".join(self.tokens[index] for index in kept)
            if whole.startswith(spelled) and all(self.tokens[index] for index in kept):
                return [*self.first, *kept] if kept else self.lead, whole[len(spelled) :]
            ids = kept[:-1]
        return self.lead, whole


@dataclass(frozen=True)
class _Hypothesis:
    node: Node
    weight: float
    row: int  # of the contexts


class Beam:
    """The hypotheses of one member about one text."""

    def __init__(self, speller: Speller, text: bytes, reopened: int = REOPENED) -> None:
        self._speller = speller
        self._trie = speller.trie
        context, rest = speller.split(text, reopened)
        self._contexts = _contexts(speller.model)
        said = self._contexts.begin(context)
        self._sums, self._ends = self._cumulated(said)
        self._hypotheses = [_Hypothesis(self._trie.root, 1.0, 0)]
        for byte in rest:
            self.push(byte)

    @property
    def dead(self) -> bool:
        """Whether no hypothesis spells the text."""
        return not self._hypotheses

    def next(self) -> Array:
        """Return probabilities (257,) of the next byte, or the end; they sum to 1 unless the beam is dead."""
        mass = np.zeros(257)
        for hypothesis in self._hypotheses:
            edges = self._trie.edges(hypothesis.node)
            mass[:256] += hypothesis.weight * np.diff(self._sums[hypothesis.row][edges])
            if hypothesis.node.depth == 0:
                mass[END] += hypothesis.weight * self._ends[hypothesis.row]
        mass = np.maximum(mass, 0)
        total = mass.sum()
        return mass / total if total > 0 else mass

    def push(self, byte: int) -> None:
        """Go on by a byte."""
        found: list[tuple[float, _Hypothesis, int | None]] = []
        for old in self._hypotheses:
            node, sums = self._trie.child(old.node, byte), self._sums[old.row]
            if node.first == node.last:
                continue
            ended = int(self._trie.edges(node)[0])
            found.append((old.weight * (sums[node.last] - sums[ended]), _Hypothesis(node, old.weight, old.row), None))
            for place in range(node.first, ended):
                weight = float(old.weight * (sums[place + 1] - sums[place]))
                found.append((weight, _Hypothesis(self._trie.root, weight, old.row), int(self._trie.ids[place])))
        self._keep([one for one in sorted(found, key=lambda one: -one[0]) if one[0] > 0])

    def _keep(self, found: list[tuple[float, _Hypothesis, int | None]]) -> None:
        """Keep the heaviest, and ask the model about those that begin a token."""
        best = found[0][0] if found else 1.0
        kept = [one for one in found[: self._speller.width] if one[0] >= best * self._speller.floor]
        # One that begins a token is always kept: any byte can follow it, so that no text is impossible for the beam.
        if kept and all(token is None for *_, token in kept):
            kept += [one for one in found if one[2] is not None][:1]
        self._hypotheses = [_Hypothesis(one.node, one.weight / best, row) for row, (_, one, _) in enumerate(kept)]
        if not kept:
            return
        rows, tokens = [one.row for _, one, _ in kept], [token for _, _, token in kept]
        sums, ends = self._sums[rows], self._ends[rows]
        said = self._contexts.move(rows, tokens)
        fresh = [row for row, token in enumerate(tokens) if token is not None]
        if fresh:
            sums[fresh], ends[fresh] = self._cumulated(said)
        self._sums, self._ends = sums, ends

    def _cumulated(self, log_probs: torch.Tensor) -> tuple[Array, Array]:
        """Return the sums (n, tokens + 1) of probabilities in the trie's order, and those (n,) of the end.

        Tokens that stand for no text, but the end, are ruled out: the others share what they had.
        """
        probs = log_probs.double().cpu().numpy()
        probs = np.exp(probs - probs.max(-1, keepdims=True))
        ends = probs[:, sorted(self._speller.model.ends)].sum(-1)
        sums = np.zeros((len(probs), len(self._trie.ids) + 1))
        np.cumsum(probs[:, self._trie.ids], axis=-1, out=sums[:, 1:])
        total = sums[:, -1] + ends
        return sums / total[:, None], ends / total

    def copied(self) -> Beam:
        """Return a beam that goes its own way from here."""
        other = copy(self)
        other._contexts = self._contexts.copied()
        return other


class _Contexts:
    """The token sequences of a beam, read again from their first token whenever one is new."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._texts: list[list[int]] = []

    def begin(self, context: list[int]) -> torch.Tensor:
        self._texts = [context]
        _check_length(self._model, len(context))
        return ModuleStepper(self._model.module).start([context])

    def move(self, rows: list[int], tokens: list[int | None]) -> torch.Tensor:
        """Go on with these rows, those with a token by that token; returns log-probabilities of the latter."""
        self._texts = [
            self._texts[row] if token is None else [*self._texts[row], token]
            for row, token in zip(rows, tokens, strict=True)
        ]
        fresh = [text for text, token in zip(self._texts, tokens, strict=True) if token is not None]
        _check_length(self._model, max(map(len, self._texts)))
        said = [ModuleStepper(self._model.module).start([text]) for text in fresh]
        return torch.cat(said) if said else torch.empty(0)

    def copied(self) -> _Contexts:
        other = copy(self)
        other._texts = list(self._texts)
        return other


class _CachedContexts:
    """The token sequences of a beam in one cache: a row without a new token gets a place that nobody looks at."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._stepper = ModuleStepper(model.module)
        self._lengths: list[int] = []

    def begin(self, context: list[int]) -> torch.Tensor:
        self._lengths = [len(context)]
        _check_length(self._model, len(context))
        return self._stepper.start([context])

    def move(self, rows: list[int], tokens: list[int | None]) -> torch.Tensor:
        """Go on with these rows, those with a token by that token; returns log-probabilities of the latter."""
        self._lengths = [self._lengths[row] + (token is not None) for row, token in zip(rows, tokens, strict=True)]
        _check_length(self._model, max(self._lengths))
        self._stepper.select(torch.tensor(rows))
        real = torch.tensor([token is not None for token in tokens])
        if not real.any():
            return torch.empty(0)
        said = self._stepper.step_some(torch.tensor([token or 0 for token in tokens]), real.long())
        return said[real.to(said.device)]

    def copied(self) -> _CachedContexts:
        other = copy(self)
        other._stepper = self._stepper.copied()
        other._lengths = list(self._lengths)
        return other


def _contexts(model: TextModel) -> _Contexts | _CachedContexts:
    return _CachedContexts(model) if ModuleStepper(model.module).gaps else _Contexts(model)


def _check_length(model: TextModel, length: int) -> None:
    if model.context is not None and length > model.context:
        raise RequestError(f"the text is longer than the {model.context:,} tokens that a member takes")


# --- several members ------------------------------------------------------------------------------------------------


class Spelling:
    """One text, read by all members byte by byte."""

    def __init__(self, members: Sequence[Speller], weights: Sequence[float], of: Of, text: bytes) -> None:
        self._members = members
        self._weights = weights
        self._of = of
        self._text = text
        self._beams = [Beam(member, text) for member in members]

    def each(self) -> list[Array]:
        """Return each member's probabilities (257,); zeros from one that cannot spell the text."""
        return [beam.next() for beam in self._beams]

    def next(self) -> torch.Tensor:
        """Return log-probabilities (257,) of the next byte; a member that cannot spell the text abstains."""
        return self.joined(self.each())

    def joined(self, each: list[Array]) -> torch.Tensor:
        """Return the log-probabilities (257,) that come of those of each member."""
        heard = [(said, weight) for said, weight in zip(each, self._weights, strict=True) if said.any() and weight > 0]
        if not heard:
            raise RequestError("no member's vocabulary can spell this text")
        weights = torch.tensor([weight for _, weight in heard], dtype=torch.float64)
        return averaged([torch.from_numpy(said).log() for said, _ in heard], weights / weights.sum(), self._of)

    def push(self, byte: int) -> None:
        """Go on by a byte; a member that has lost the text reads it anew, as its tokenizer cuts it."""
        self._text += bytes([byte])
        for index, beam in enumerate(self._beams):
            beam.push(byte)
            if beam.dead and _whole(self._text):
                self._beams[index] = Beam(self._members[index], self._text, reopened=0)

    def copied(self) -> Spelling:
        other = copy(self)
        other._beams = [beam.copied() for beam in self._beams]
        return other


def _whole(text: bytes) -> bool:
    """Whether a text ends with a whole character."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class ByteStepper(Stepper):
    """Gives next bytes where others give next tokens: texts are written and sampled with it in the same way."""

    pads = True

    def __init__(self, members: Sequence[Speller], weights: Sequence[float], of: Of = "probabilities") -> None:
        self._members = members
        self._weights = weights
        self._of = of
        self._texts: list[Spelling] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self._texts = [Spelling(self._members, self._weights, self._of, bytes(prompt)) for prompt in prompts]
        return self._next()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        for text, byte in zip(self._texts, tokens.tolist(), strict=True):
            text.push(byte)
        return self._next()

    def select(self, rows: torch.Tensor) -> None:
        seen: set[int] = set()
        chosen = []
        for row in rows.tolist():
            chosen.append(self._texts[row].copied() if row in seen else self._texts[row])
            seen.add(row)
        self._texts = chosen

    def _next(self) -> torch.Tensor:
        return torch.stack([text.next() for text in self._texts]).float()


class ByteWording:
    """Texts as bytes of UTF-8, and a mark of the end."""

    ends = frozenset({END})
    context = None  # members say themselves where a text becomes too long

    def encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            raise RequestError("models that are joined byte by byte share no chat template; ask by text")
        return list(prompt.encode())

    def reader(self, prompt: Sequence[int]) -> ByteReader:
        return ByteReader()

    def text_of(self, token: int) -> str:
        return "" if token == END else bytes([token]).decode(errors="replace")


class ByteReader:
    """Gives a character with the last of its bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteBackend:
    """Writes byte by byte in the name of several models of tokens; its tokens are bytes."""

    offers = Access.PROBS

    def __init__(self, members: Sequence[Speller], weights: Sequence[float], of: Of) -> None:
        self.members = members
        self.weights = weights
        self.of = of

    def logits(self, batch: Batch) -> torch.Tensor:
        raise RequestError("models joined byte by byte have no vocabulary of tokens; they write, and give texts bits")

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch)

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        return write_with(ByteStepper(self.members, self.weights, self.of), ByteWording(), prompts, how, tell)

    def bits(self, text: str) -> Bits:
        """Return how many bits a text takes by each member and by all."""
        return bits(self.members, self.weights, text, self.of)


def speller(model: Model, width: int, floor: float) -> Speller:
    """Return a language model as one of bytes; raises for one that is not in memory, or that reads no text."""
    module = model.module
    if model.task != "causal-lm" or model.encoder.tokenizer is None:
        raise RequestError(f"{model.label}: does not write text")
    return Speller(TextModel(module.eval(), model.encoder.tokenizer), width, floor)


@dataclass(frozen=True)
class Bits:
    """Bits that a text takes: by each member alone, and by all of them together."""

    members: tuple[float, ...]
    together: float
    characters: int

    @property
    def per_character(self) -> tuple[tuple[float, ...], float]:
        """Bits per character of each member, and together."""
        return tuple(bits / self.characters for bits in self.members), self.together / self.characters


def bits(members: Sequence[Speller], weights: Sequence[float], text: str, of: Of = "probabilities") -> Bits:
    """Return how many bits a text takes from its first byte to its last; infinity where a member cannot spell it."""
    spelling = Spelling(members, weights, of, b"")
    alone, together = np.zeros(len(members)), 0.0
    for byte in text.encode():
        each = spelling.each()
        with np.errstate(divide="ignore"):
            alone -= np.log2([said[byte] for said in each])
        together -= float(spelling.joined(each)[byte]) / np.log(2)
        spelling.push(byte)
    return Bits(tuple(float(one) for one in alone), together, len(text))
