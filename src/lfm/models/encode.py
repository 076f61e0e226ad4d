"""From rows to tensors: token windows, prompts with answers, labelled texts, images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lfm.data import Rows
from lfm.errors import RequestError
from lfm.models.ref import ImageSpec, Task

Batch = dict[str, Any]  # tensors; raw texts or images for an endpoint, one batch for each member of an ensemble
IGNORE = -100  # a label that takes no part in the loss; torch's and transformers' convention


class Examples(ABC):
    """Encoded rows that can be put into batches in any order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """Return a batch with `labels`; in it all examples are padded to the longest."""

    @property
    def characters(self) -> int | None:
        """Characters of text that the labels stand for, where that is one number."""
        return None


class Tokens(Examples):
    """Examples made of token ids."""

    _ids: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, self._ids))


@dataclass(frozen=True)
class Encoder:
    """Turns rows into a model's tensors: its tokenizer or its image format, and its classes."""

    task: Task
    tokenizer: Any = None
    image: ImageSpec | None = None
    classes: Mapping[str, int] | None = None  # label as text -> class index
    context: int | None = None  # tokens that the model takes at most, where it says so
    pad: int = 0  # id behind shorter texts

    def encode(self, rows: Rows, length: int, *, packed: bool = False, labelled: bool = True) -> Examples:
        """Return the rows as examples for this model, texts cut to `length` tokens (`packed`: see Windows).

        Without `labelled` a classifier's rows need no labels, and all are given the first class. Raises RequestError
        for rows that do not fit the model's task.
        """
        if self.task == "image-classification":
            return Images(rows, self._spec(), self.labels(rows, labelled))
        examples = self._tokens(rows, length, packed, labelled)
        if self.context is not None and examples.longest > self.context:
            raise RequestError(
                f"{rows.origin}: has texts of {examples.longest} tokens, and the model takes {self.context}; "
                f"set `length` to {self.context} or less"
            )
        return examples

    def _tokens(self, rows: Rows, length: int, packed: bool, labelled: bool) -> Tokens:
        if self.tokenizer is None:
            raise RequestError(
                f"{rows.origin}: text needs a tokenizer, and the model has none; name one (`tokenizer:`)"
            )
        if self.task == "text-classification":
            return Texts(rows, self.tokenizer, length, self.labels(rows, labelled), self.pad)
        if rows.kind == "instruction":
            return Answers(rows, self.tokenizer, length)
        if "text" in rows.columns:
            return Windows(rows, self.tokenizer, length, packed)
        raise _does_not_fit(rows, self.task)

    def _spec(self) -> ImageSpec:
        if self.image is None:
            raise RequestError("an image model needs to know its input: give the model `image: {size: ..., mean: ...}`")
        return self.image

    def labels(self, rows: Rows, labelled: bool) -> torch.Tensor:
        """Return the class of each row (n,), or zeros without `labelled`."""
        needed = {"image" if self.task == "image-classification" else "text"} | ({"label"} if labelled else set())
        if not needed <= rows.columns.keys():
            raise _does_not_fit(rows, self.task)
        if not labelled:
            return torch.zeros(len(rows), dtype=torch.long)
        names = [_plain(label) for label in rows.columns["label"]]
        known = self.classes or {}
        unknown = sorted({name for name in names if name not in known})
        if unknown:
            raise RequestError(
                f"{rows.origin}: the model has no class called {', '.join(unknown[:5])}; it has {_some(known)}. "
                "Tune it with --new-head to give it these classes"
            )
        return torch.tensor([known[name] for name in names])


def _plain(label: Any) -> str:
    return str(label.item() if isinstance(label, np.generic) else label)


def _some(names: Mapping[str, int]) -> str:
    return ", ".join(list(names)[:10]) + (f" ... ({len(names)})" if len(names) > 10 else "") if names else "none"


def _does_not_fit(rows: Rows, task: Task) -> RequestError:
    wanted = {
        "image-classification": "image and label",
        "text-classification": "text and label",
        "causal-lm": "text, or prompt and completion",
        "masked-lm": "text",
    }[task]
    return RequestError(
        f"{rows.origin}: {task} takes the columns {wanted}; these rows have {', '.join(rows.columns)}. "
        "Name them with `columns: {ours: theirs}`"
    )


def class_names(rows: Rows) -> dict[str, int]:
    """Return a class index for every label of these rows, in the order of the labels."""
    return {_plain(label): index for index, label in enumerate(rows.classes)}


class Windows(Tokens):
    """Text cut into windows of `length` tokens that overlap by one: every token but the first is predicted once.

    Rows that neighbour in one file are joined as they were there. Other rows are documents of their own: `packed` puts
    them one behind the other, for training; otherwise no window holds parts of two, for measuring.
    """

    def __init__(self, rows: Rows, tokenizer: Any, length: int, packed: bool) -> None:
        texts = [str(text) for text in rows.columns["text"]]
        documents = [rows.joined.join(texts)] if rows.joined is not None else texts
        encoded = tokenizer(documents, verbose=False)["input_ids"]
        streams = [torch.tensor(ids, dtype=torch.long) for ids in encoded]
        if packed:
            streams = [torch.cat([_delimited(stream, tokenizer) for stream in streams])]
        step = length - 1
        self._ids = [stream[start : start + length] for stream in streams for start in range(0, len(stream) - 1, step)]
        if not self._ids:
            raise RequestError(f"{rows.origin}: no text of two tokens or more, which a prediction takes")
        self._characters = sum(map(len, documents))

    @property
    def characters(self) -> int:
        return self._characters

    def batch(self, indices: Sequence[int]) -> Batch:
        windows = [self._ids[i] for i in indices]
        return _padded(windows, windows)


class Given(Tokens):
    """Texts that are token ids already; every token but the first is predicted, or what `labels` say."""

    def __init__(self, texts: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None) -> None:
        self._ids = list(texts)
        self._labels = self._ids if labels is None else list(labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        return _padded([self._ids[i] for i in indices], [self._labels[i] for i in indices])


def _delimited(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Mark the end of a document, unless the tokenizer marks its beginning already."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    marked = len(ids) and (int(ids[0]) == begin or int(ids[-1]) == end)
    return ids if marked or end is None else torch.cat([ids, torch.tensor([end])])


class Answers(Tokens):
    """Prompts with completions; the loss is on the completion, and on the end-of-text token behind it, alone."""

    def __init__(self, rows: Rows, tokenizer: Any, length: int) -> None:
        prompts = tokenizer([str(text) for text in rows.columns["prompt"]], verbose=False)["input_ids"]
        completions = [str(text) for text in rows.columns["completion"]]
        answers = tokenizer(completions, add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._ids, self._labels = [], []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # Room for the answer comes first: of a prompt that is too long the end is kept, one token at least.
            prompt, answer = _ended(prompt, tokenizer.eos_token_id), (answer + end)[: length - 1]
            prompt = prompt[max(0, len(prompt) + len(answer) - length) :]
            if not prompt or not answer:
                raise RequestError(f"{rows.where(row)}: has no {'completion' if prompt else 'prompt'} to learn from")
            self._ids.append(torch.tensor(prompt + answer))
            self._labels.append(torch.tensor([IGNORE] * len(prompt) + answer))

    def batch(self, indices: Sequence[int]) -> Batch:
        return _padded([self._ids[i] for i in indices], [self._labels[i] for i in indices])


def _ended(prompt: list[int], end: int | None) -> list[int]:
    """Take off the end-of-text token that some tokenizers put behind every text: the answer is still to come."""
    return prompt[:-1] if len(prompt) > 1 and prompt[-1] == end else prompt


class Texts(Tokens):
    """Labelled texts, cut to `length` tokens."""

    def __init__(self, rows: Rows, tokenizer: Any, length: int, labels: torch.Tensor, pad: int) -> None:
        texts = [str(text) for text in rows.columns["text"]]
        encoded = tokenizer(texts, truncation=True, max_length=length, verbose=False)["input_ids"]
        # A text without a token is one padding token: a model must be given something to look at.
        self._ids = [torch.tensor(ids or [pad], dtype=torch.long) for ids in encoded]
        self._classes = labels
        self._pad = pad

    def batch(self, indices: Sequence[int]) -> Batch:
        ids = [self._ids[i] for i in indices]
        return {**_padded(ids, ids, self._pad), "labels": self._classes[list(indices)]}


class Images(Examples):
    """Labelled images, resized and normalised when they are put into a batch."""

    def __init__(self, rows: Rows, spec: ImageSpec, labels: torch.Tensor) -> None:
        self._images = rows.columns["image"]
        self._spec = spec
        self._classes = labels

    def __len__(self) -> int:
        return len(self._classes)

    def batch(self, indices: Sequence[int]) -> Batch:
        if isinstance(self._images, np.ndarray):
            pixels = self._resized(self._images[list(indices)])
        else:
            pixels = torch.cat([self._resized(np.array(self._images[i])[None]) for i in indices])
        return {"pixel_values": (pixels - self._mean) / self._std, "labels": self._classes[list(indices)]}

    def _resized(self, images: np.ndarray) -> torch.Tensor:
        """Return (n, channels, size, size) in [0, 1] from uint8 (n, height, width[, 3])."""
        pixels = torch.from_numpy(images).float().div_(255)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        size, channels = self._spec.size, self._spec.channels
        if pixels.shape[1] != channels:
            pixels = pixels.mean(1, keepdim=True) if channels == 1 else pixels.expand(-1, channels, -1, -1)
        if pixels.shape[2:] != (size, size):
            pixels = torch.nn.functional.interpolate(
                pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
        return pixels

    @cached_property
    def _mean(self) -> torch.Tensor:
        return torch.tensor(self._spec.mean).view(-1, 1, 1)

    @cached_property
    def _std(self) -> torch.Tensor:
        return torch.tensor(self._spec.std).view(-1, 1, 1)


def _padded(ids: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], pad: int = 0) -> Batch:
    """Pad on the right, where nothing is attended to or predicted.

    The id matters to classifiers alone: those that look at the last token find it as the last that is not `pad`.
    """
    fill = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(item) for item in ids])
    padded = fill(list(ids), batch_first=True, padding_value=pad)
    return {
        "input_ids": padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        "labels": fill(list(labels), batch_first=True, padding_value=IGNORE),
    }


def inputs_of(batch: Batch) -> Batch:
    """Return a batch without what the model should not see."""
    return {name: value for name, value in batch.items() if name != "labels"}


def targets(logits: torch.Tensor, labels: torch.Tensor, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, classes) logits and (n,) labels that belong together; for text, tokens that have a successor."""
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.flatten(0, -2), labels.flatten()
