"""Learning from texts that the teacher writes: it writes them, then the student learns what it says of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfm.checkpoint import OutputFolder
from lfm.data import Rows
from lfm.distill._contract import Desk, Inputs, Said, Start, Taught, Written
from lfm.distill._losses import cross_entropy
from lfm.distill._matching import TEACHER, TOLD, Pair
from lfm.distill._students import load_student
from lfm.distill._synthesis import Sealed
from lfm.distill._texts import TOGETHER, Sieve, Text, continued, statistics, token_that_begins, vocabulary_of
from lfm.distill._training import finish, train
from lfm.errors import RequestError
from lfm.method import Access, Data
from lfm.models._wording import TokenizerWording
from lfm.models.encode import IGNORE, Batch, Examples, Given, inputs_of, targets
from lfm.models.handle import Model
from lfm.models.local import forward
from lfm.models.open import open_in
from lfm.models.text import Completion, Sampling
from lfm.recipe.step import Context, StepResult
from lfm.train import Epochs

TEXTS = "synthesised.jsonl"
COUNT = 1024  # texts, where neither the method nor prompts say how many
TRIES = 4  # texts that are written for one that is kept, at most
OFFERED = 20  # likeliest tokens that the protocol of endpoints tells at most
LEVELS = {"text": Access.LABELS, "top_k": Access.PROBS, "logits": Access.LOGITS}


def learn_from_writing(method: Written, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Teach a student on texts of its teacher, into `folder`."""
    prompts = _prompts(method, inputs, context)
    if type(method).needs.data is Data.NONE:
        context = Sealed(context)
    teacher, answers = _opened(method, inputs, context)
    student = load_student(inputs, teacher, context)
    _check(teacher, student, answers)
    sieve = _write(method, answers, teacher, student, prompts, inputs.length, context.seed, folder.resume / "texts")
    _save(sieve, folder.partial / TEXTS)
    log = train(
        student.module,
        Epochs(Texts(sieve.kept, answers), method.batch_size, context.seed),
        _loss(method, answers, teacher, student),
        method,
        method.steps,
        context,
        folder.resume,
    )
    notes = [f"learned from {len(sieve.kept):,} texts that the teacher wrote, by its {answers.replace('_', ' ')}"]
    if type(method).needs.data is Data.NONE:
        notes.append("made without any data: from the teacher and random numbers alone")
    return finish(student, log, inputs, folder, notes, statistics(sieve))


def _prompts(method: Written, inputs: Inputs, context: Context) -> list[str]:
    """Return the prompts of the data: those of its rows, or the first words of plain texts."""
    if type(method).needs.data is Data.NONE or inputs.data is None:
        return []
    return prompts_of(context.rows(inputs.data), method.opening)


def prompts_of(rows: Rows, words: int) -> list[str]:
    """Return each row's prompt, or as many of the first words of its text; each once, in their order."""
    if "prompt" in rows.columns:
        return list(dict.fromkeys(str(prompt) for prompt in rows.columns["prompt"]))
    if "text" not in rows.columns:
        raise RequestError(f"{rows.origin}: prompts are read from a column `prompt` or `text`; name it with `columns`")
    found = (" ".join(str(text).split()[:words]) for text in rows.columns["text"])
    return list(dict.fromkeys(prompt for prompt in found if prompt))


def _opened(method: Written, inputs: Inputs, context: Context) -> tuple[Model, str]:
    """Return the teacher with the access that is used, and what of its answers that is."""
    ref = context.resolve(inputs.teacher)
    teacher = open_in(context, ref, access=min(ref.offers, Access.LOGITS) if ref.is_endpoint else None)
    if teacher.task != "causal-lm":
        raise RequestError(f"{teacher.label}: is made for {teacher.task}, and a teacher that writes is a causal-lm")
    best = "logits" if teacher.access >= Access.LOGITS else "top_k" if teacher.access >= Access.PROBS else "text"
    answers = best if method.answers == "best" else method.answers
    if teacher.access < LEVELS[answers]:
        raise RequestError(
            f"{teacher.label}: offers {teacher.access.name.lower()}, and answers: {answers} takes "
            f"{LEVELS[answers].name.lower()}; use answers: {best}"
        )
    if answers == "top_k" and ref.is_endpoint and (method.temperature != 1 or method.top_k > OFFERED):
        raise RequestError(
            f"{teacher.label}: an endpoint tells up to {OFFERED} likeliest tokens, at temperature 1; "
            f"got top_k: {method.top_k}, temperature: {method.temperature}"
        )
    return teacher.restrict(LEVELS[answers]), answers


def _check(teacher: Model, student: Model, answers: str) -> None:
    """Raise RequestError where the student cannot learn from these answers."""
    if student.task != "causal-lm" or student.encoder.tokenizer is None:
        raise RequestError(f"{student.label}: a student of texts is a causal-lm with a tokenizer; name one")
    theirs = teacher.encoder.tokenizer
    if answers == "text" or theirs is None or theirs.get_vocab() == student.encoder.tokenizer.get_vocab():
        return
    raise RequestError(
        f"teacher and student have different tokenizers, so that answers: {answers} mean nothing to the student; "
        "use answers: text, or a student with the teacher's tokenizer"
    )


# --- writing --------------------------------------------------------------------------------------------------------


def _write(
    method: Written,
    answers: str,
    teacher: Model,
    student: Model,
    prompts: Sequence[str],
    length: int,
    seed: int,
    folder: Path,
) -> Sieve:
    """Return texts, as many as are wanted or can be had; what is written already is read from `folder`."""
    tokenizer = student.encoder.tokenizer
    room = min([length, *[model.encoder.context for model in (teacher, student) if model.encoder.context]])
    writer: _TokenWriter | _TextWriter
    if answers != "text" and teacher.encoder.tokenizer is not None:
        writer = _TokenWriter(method, teacher, tokenizer, room, seed)
    else:
        writer = _TextWriter(method, teacher, tokenizer, room, seed, answers == "top_k")
    desk = Desk(prompts, vocabulary_of(teacher, tokenizer, torch.Generator().manual_seed(seed)))
    wanted = method.count or len(prompts) or COUNT
    sieve = Sieve(method.min_tokens, method.max_repetition)
    for first in range(0, wanted * TRIES, TOGETHER):
        numbers = range(first, min(first + TOGETHER, wanted * TRIES))
        for text in _kept(folder / f"{first:08d}.json", lambda of=numbers: writer.write(of, desk)):  # type: ignore[misc]
            if len(sieve.kept) < wanted:
                sieve.take(text)
        if len(sieve.kept) >= wanted:
            break
    if not sieve.kept:
        reasons = ", ".join(f"{count:,} {why}" for why, count in sieve.dropped.items())
        raise RequestError(f"{teacher.label}: none of its texts can be used ({reasons}); see min_tokens, length, top_p")
    return sieve


def _kept(path: Path, make: Callable[[], list[Text | None]]) -> list[Text | None]:
    """Return what is in a file, or what `make` returns, which is then in it: whole or not at all."""
    if path.is_file():
        return [None if told is None else _text(told) for told in json.loads(path.read_text(encoding="utf-8"))]
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump([None if text is None else _told(text) for text in made], file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    return made


def _told(text: Text) -> dict[str, Any]:
    top = None if text.top is None else [part.tolist() for part in text.top]
    return {**{name: getattr(text, name) for name in ("given", "prompted", "text", "log_prob")}, "ids": text.ids} | {
        "top": top
    }


def _text(told: Mapping[str, Any]) -> Text:
    top = None if told["top"] is None else (torch.tensor(told["top"][0]), torch.tensor(told["top"][1]))
    return Text(tuple(told["ids"]), told["given"], told["prompted"], told["text"], told["log_prob"], top)


@dataclass(frozen=True)
class _TokenWriter:
    """Writes with a teacher whose next tokens can be asked for one by one, and that has the student's tokenizer."""

    method: Written
    teacher: Model
    tokenizer: Any
    room: int
    seed: int

    def write(self, numbers: Sequence[int], desk: Desk) -> list[Text | None]:
        starts = [self.method.start(number, desk) for number in numbers]
        begun = [self._ids(start, number) for start, number in zip(starts, numbers, strict=True)]
        how = Sampling(temperature=self.method.sampling_temperature, top_p=self.method.top_p)
        made = continued(
            self.teacher.stepper(),
            begun,
            self.room,
            how,
            [_generator(self.seed, number) for number in numbers],
            self.teacher.wording.ends,
            [start.greedy for start in starts],
        )
        return [self._text(*found) for found in zip(starts, begun, made, strict=True)]

    def _ids(self, start: Start, number: int) -> list[int]:
        if start.prompt:
            ids: list[int] = self.tokenizer(start.prompt, verbose=False)["input_ids"]
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        begin = token_that_begins(self.tokenizer)
        ids = [] if begin is None else [begin]
        if start.token is not None:
            return [*ids, start.token]
        if begin is not None:
            return ids
        return [int(torch.randint(len(self.tokenizer), (1,), generator=_generator(self.seed, number)))]

    def _text(self, start: Start, begun: Sequence[int], made: tuple[list[int], list[float]]) -> Text:
        ids, values = [*begun, *made[0]], made[1][start.greedy :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        mean = sum(values) / len(values) if values else None
        return Text(tuple(ids), min(len(begun) + start.greedy, len(ids)), bool(start.prompt), text, mean)


@dataclass(frozen=True)
class _TextWriter:
    """Writes with any teacher, by text alone; with `told`, it also tells the likeliest tokens at each place."""

    method: Written
    teacher: Model
    tokenizer: Any
    room: int
    seed: int
    told: bool

    @cached_property
    def _names(self) -> dict[str, int]:
        return _table(self.tokenizer)

    def write(self, numbers: Sequence[int], desk: Desk) -> list[Text | None]:
        starts = [self.method.start(number, desk) for number in numbers]
        begun = [self._begun(start) for start in starts]
        for greedy in sorted({start.greedy for start in starts} - {0}):
            places = [place for place, start in enumerate(starts) if start.greedy == greedy]
            found = self.teacher.write([begun[place] for place in places], Sampling(max_new_tokens=greedy))
            for place, made in zip(places, found, strict=True):
                begun[place] += made.text
        longest = max(len(ids) for ids in self.tokenizer(begun, verbose=False)["input_ids"])
        how = Sampling(
            max_new_tokens=max(self.room - longest, 1),
            temperature=self.method.sampling_temperature,
            top_p=self.method.top_p,
            seed=_seed(self.seed, numbers[0]) % 2**31,
            top_logprobs=self.method.top_k if self.told else None,
        )
        read = self._told if self.told else self._read
        return [read(*found) for found in zip(starts, begun, self.teacher.write(begun, how), strict=True)]

    def _begun(self, start: Start) -> str:
        if start.token is None:
            return start.prompt
        text: str = self.tokenizer.decode([start.token])
        return text.strip()

    def _read(self, start: Start, begun: str, made: Completion) -> Text | None:
        """Return the text as the student's tokenizer reads it; what was given are the tokens that begin in it."""
        whole = begun + made.text
        encoded = self.tokenizer(whole, verbose=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = _without_end(encoded["input_ids"], self.tokenizer)
        if self.tokenizer.is_fast:
            special = set(self.tokenizer.all_special_ids)
            places = encoded["offset_mapping"][: len(ids)]
            given = sum(i in special or at < len(begun) for i, (at, _) in zip(ids, places, strict=True))
        else:
            given = len(_without_end(self.tokenizer(begun, verbose=False)["input_ids"], self.tokenizer))
        return self._ended(ids, given, start, whole, made)

    def _told(self, start: Start, begun: str, made: Completion) -> Text | None:
        """Return the text by the tokens that the teacher names; None where one of them is not the student's."""
        table = self._names
        given = _without_end(self.tokenizer(begun, verbose=False)["input_ids"], self.tokenizer) or [
            begin for begin in [token_that_begins(self.tokenizer)] if begin is not None
        ]
        ids = [table.get(token.text) for token in made.tokens]
        if None in ids or not ids or not given:
            return None
        k = self.method.top_k
        rows = []
        for token in made.tokens:
            likely = sorted((-value, table[name]) for name, value in token.top.items() if name in table)
            rows.append([(index, -value) for value, index in likely[:k]])
        whole = [*given, *[index for index in ids if index is not None]]
        if made.finish == "stop" and self.tokenizer.eos_token_id is not None:
            whole.append(self.tokenizer.eos_token_id)
            rows.append([(self.tokenizer.eos_token_id, 0.0)])  # it ended here: more is not told of this place
        mean = sum(token.logprob for token in made.tokens) / len(made.tokens)
        return Text(tuple(whole), len(given), bool(start.prompt), begun + made.text, mean, _top(rows, k))

    def _ended(self, ids: list[int], given: int, start: Start, whole: str, made: Completion) -> Text:
        if made.finish == "stop" and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        return Text(tuple(ids[: self.room]), given, bool(start.prompt), whole)


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _top(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and log-probabilities (n, k); places that are not used are -inf."""
    filled = [[*row, *[(0, -torch.inf)] * (k - len(row))] for row in rows]
    ids = torch.tensor([[index for index, _ in row] for row in filled])
    return ids, torch.tensor([[value for _, value in row] for row in filled])


def _table(tokenizer: Any) -> dict[str, int]:
    """Return the token of each text that is one token's alone, leaving aside those that stand for single bytes."""
    wording = TokenizerWording(tokenizer, frozenset(), None)
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    by_text: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if index not in special and not (name.startswith("<0x") and name.endswith(">")):
            by_text.setdefault(wording.text_of(index), []).append(index)
    return {text: found[0] for text, found in by_text.items() if len(found) == 1}


def _seed(seed: int, number: int) -> int:
    return seed * 1_000_003 + number


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, number) % 2**63)


def _save(sieve: Sieve, path: Path) -> None:
    """Write the texts as data that other steps can read."""
    lines = ({"text": text.text, "tokens": len(text.ids), "log_prob": text.log_prob} for text in sieve.kept)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


# --- learning -------------------------------------------------------------------------------------------------------


class Texts(Examples):
    """Texts to learn from: of probabilities all places behind the first, of text alone what was sampled."""

    def __init__(self, texts: Sequence[Text], answers: str) -> None:
        self._tops = [text.top for text in texts]
        ids = [torch.tensor(text.ids) for text in texts]
        free = [text.given if text.prompted or text.top or answers == "text" else 0 for text in texts]
        labels = [
            torch.cat([torch.full((skipped,), IGNORE), whole[skipped:]])
            for whole, skipped in zip(ids, free, strict=True)
        ]
        self._given = Given(ids, labels)

    def __len__(self) -> int:
        return len(self._given)

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self._given.batch(indices)
        tops = [top for i in indices if (top := self._tops[i]) is not None]
        if not tops:
            return batch
        told = {name: torch.cat(parts) for name, parts in zip(TOLD, zip(*tops, strict=True), strict=True)}
        return {**batch, TEACHER: told}


def _loss(
    method: Written, answers: str, teacher: Model, student: Model
) -> Callable[[nn.Module, Batch], Mapping[str, torch.Tensor]]:
    pair = Pair(method, teacher, student)

    def loss(module: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        if answers == "text":
            return {"text": cross_entropy(*_predicted(module, batch))}
        taught = pair.taught(module, batch)
        if answers == "logits" or taught.teacher.ids is not None:
            return method.terms(taught)
        rows = (taught.teacher.logits / method.temperature).log_softmax(-1).topk(method.top_k, -1)
        return method.terms(Taught(Said(rows.values, ids=rows.indices), taught.student, taught.labels))

    return loss


def _predicted(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(module.parameters()).device
    own = {name: value.to(device) for name, value in inputs_of(batch).items()}
    return targets(forward(module, own).float(), batch["labels"].to(device), "causal-lm")
