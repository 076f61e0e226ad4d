"""A Llama of 260,032 parameters, trained on TinyStories, tuned on Shakespeare, WikiText-2 and instructions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from _family import QUIET, Family, Part
from _scores import Sample

import lfm
from lfm.data import DataSpec, Rows, read
from lfm.models.encode import IGNORE, Batch, Examples
from lfm.models.handle import Model
from lfm.tune.weights.full import Full

TRAINING = {
    "Shakespeare": "tiny-shakespeare.txt",
    "WikiText": "wikitext-2-valid.txt",
    "instructions": "instructions-1100.json",
}
HELD_OUT = 0.2  # not trained on; half of it is tested on
LENGTH = 256
BATCH = 32


@dataclass(frozen=True)
class Language(Family):
    steps: int = 150
    batch_size: int = 8
    validation: int = 25  # windows of 256 tokens, or instructions with their answers
    test: int = 80

    name = "language"
    title = "Llama of 260,032 parameters"
    metric = "perplexity"
    tasks = tuple(TRAINING)
    others = ("TinyStories",)
    variants = ("as merged",)

    @property
    def base(self) -> Path:
        return self.assets / "checkpoints" / "stories260k"

    def source(self, task: str) -> Path:
        return self.work / task

    def make(self, task: str) -> None:
        method = Full(steps=self.steps, learning_rate=1e-3, batch_size=self.batch_size)
        data = {"path": self.path(TRAINING[task]), "part": "train", "held_out": HELD_OUT}
        lfm.tune(method, self.base, data, length=LENGTH, out=self.source(task), settings=QUIET)

    def note(self, variant: str) -> str:
        return (
            f"Perplexity per token, lower is better, on {self.test} windows of {LENGTH} tokens of each test text (for "
            f"instructions: that many answers; settings chosen on {self.validation} others of each); the mean is "
            "geometric. TinyStories is what the base was trained on, and is not part of the mean."
        )

    def _rows(self, task: str, part: Part) -> Rows:
        if task == "TinyStories":
            return read(self.path("tinystories-600.json"))
        if task == "WikiText" and part == "test":
            return read(self.path("wikitext-2-test.txt"))
        held_out = read(DataSpec(path=self.path(TRAINING[task]), part="held_out", held_out=HELD_OUT))
        return held_out.part("held_out" if part == "test" else "train", HELD_OUT / 2)

    @cache  # noqa: B019  one object lives as long as its process
    def _batches(self, task: str, part: Part) -> list[Batch]:
        """Return windows spread evenly over a text, those of like length together."""
        examples = self._model().encoder.encode(self._rows(task, part), LENGTH)
        chosen = np.linspace(0, len(examples) - 1, min(len(examples), getattr(self, part))).astype(int).tolist()
        chosen.sort(key=lambda index: len(examples.batch([index])["labels"][0]))
        return [examples.batch(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)]

    @cache  # noqa: B019
    def _model(self) -> Model:
        return lfm.load(self.base)

    def _with(self, weights: Path) -> Model:
        """Return the model with other weights."""
        checkpoint = lfm.open_checkpoint(weights)
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs}
        model = self._model()
        found = model.module.load_state_dict(tensors, strict=False)
        assert not found.unexpected_keys
        assert set(found.missing_keys) <= {"lm_head.weight"}, found.missing_keys  # which is the embedding
        return model

    def measure(self, weights: Path, task: str, part: Part, variant: str) -> Sample:
        model = self._with(weights)
        return _sample((model.log_probs(batch), batch["labels"]) for batch in self._batches(task, part))

    def ensemble(self, task: str, part: Part) -> Sample:
        batches = self._batches(task, part)
        found = [[self._with(weights).log_probs(batch) for batch in batches] for weights in self.sources]
        means = [torch.stack(log_probs).logsumexp(0) - math.log(len(found)) for log_probs in zip(*found, strict=True)]
        return _sample((mean, batch["labels"]) for mean, batch in zip(means, batches, strict=True))

    def guesses(self, task: str) -> dict[str, Sample]:
        size = self._model().module.config.vocab_size
        rows = {
            "chance (any token)": torch.full((size,), 1 / size).log(),
            "frequency of tokens": self._frequencies(task, size),
        }
        labels = [batch["labels"] for batch in self._batches(task, "test")]
        return {
            name: _sample((log_probs.expand(*some.shape, -1), some) for some in labels)
            for name, log_probs in rows.items()
        }

    def _frequencies(self, task: str, size: int) -> torch.Tensor:
        """Return the log frequencies of tokens in a task's training text (of all stories, which no task has)."""
        if task == "TinyStories":
            rows = self._rows(task, "test")
        else:
            rows = read(DataSpec(path=self.path(TRAINING[task]), part="train", held_out=HELD_OUT))
        examples: Examples = self._model().encoder.encode(rows, LENGTH)
        labels = examples.batch(range(len(examples)))["labels"][:, 1:]
        counts = torch.bincount(labels[labels != IGNORE], minlength=size) + 1
        return (counts / counts.sum()).log()


def _sample(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Sample:
    """Return nats and tokens of each window."""
    nats, tokens = [], []
    for log_probs, labels in batches:
        picked = -log_probs[:, :-1].gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
        predicted = labels[:, 1:] != IGNORE
        nats.append(picked.masked_fill(~predicted, 0).double().sum(-1).numpy())
        tokens.append(predicted.double().sum(-1).numpy())
    return Sample(np.concatenate(nats), np.concatenate(tokens))
