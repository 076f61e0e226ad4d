"""What a teacher says of fixed data, kept on disk: computed once, read by every student, without the teacher.

Of each token that is predicted, the k likeliest ones are kept: ids in the narrowest integer that holds the vocabulary,
log-probabilities in float16. What all others have together follows from these. A folder is named after everything that
it depends on: the teacher's weights, the data, how it is cut, k and the temperature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import numpy as np
import torch

from lfm.checkpoint import cache_folder
from lfm.data import Rows
from lfm.distill._contract import Inputs, Kept
from lfm.distill._matching import TOLD
from lfm.errors import RequestError
from lfm.method import Access
from lfm.models._pretrained import _tokenizer as read_tokenizer
from lfm.models._pretrained import config_of, task_of
from lfm.models.encode import IGNORE, Batch, Encoder, Examples
from lfm.models.handle import Model, Tell
from lfm.models.open import open_in
from lfm.models.ref import ImageSpec, Task
from lfm.models.text import Completion, Prompt, Sampling
from lfm.progress import Progress
from lfm.recipe.step import Context

LOG = logging.getLogger("lfm")
LAYOUT = 1  # of the files
TOGETHER = 16  # examples that the teacher sees at a time
ABOUT, IDS, VALUES, OFFSETS = "about.json", "ids.bin", "log_probs.bin", "offsets.bin"


def remembered(kept: Kept, inputs: Inputs, context: Context) -> Model:
    """Return a stand-in for the teacher that answers from the disk; the teacher is loaded where answers are missing."""
    ref = context.resolve(inputs.teacher)
    if ref.is_endpoint or ref.module or ref.ref is None:
        raise RequestError(f"{ref.label}: cache_teacher keeps what a language model in a folder says; leave it out")
    checkpoint = context.open(inputs.teacher)
    config = config_of(ref, checkpoint)
    if task_of(ref.task, config, ref) != "causal-lm":
        raise RequestError(f"{ref.label}: cache_teacher keeps answers of language models (causal-lm); leave it out")
    tokenizer = read_tokenizer(ref, checkpoint.folder, "causal-lm")
    read = Encoder(
        *("causal-lm", tokenizer, None, None, getattr(config, "max_position_embeddings", None)),
        getattr(config, "pad_token_id", None) or 0,
    )
    encoder = _Encoder("causal-lm", read, kept, inputs, context, checkpoint.digest, int(config.vocab_size))
    return Model(_Nothing(ref.label), Access.LABELS, "causal-lm", cast(Encoder, encoder), ref.label)


@dataclass(frozen=True)
class _Nothing:
    """What is behind the stand-in: nobody."""

    label: str
    offers: Access = Access.LABELS

    def logits(self, batch: Batch) -> torch.Tensor:
        raise AssertionError("a teacher that is not there is asked")

    def labels(self, batch: Batch) -> torch.Tensor:
        raise AssertionError("a teacher that is not there is asked")

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        raise AssertionError("a teacher that is not there is asked")


@dataclass(frozen=True)
class _Encoder:
    """Reads as the teacher does, and hands out what it said in place of what it reads."""

    task: Task
    read: Encoder
    kept: Kept
    inputs: Inputs
    context_of_step: Context
    teacher: str  # digest
    vocabulary: int
    image: ImageSpec | None = None
    classes: Mapping[str, int] | None = None

    @property
    def tokenizer(self) -> Any:
        return self.read.tokenizer

    @property
    def context(self) -> int | None:
        return self.read.context

    @property
    def pad(self) -> int:
        return self.read.pad

    def encode(self, rows: Rows, length: int, *, packed: bool = False, labelled: bool = True) -> Examples:
        """Return what the teacher said of the rows, from the disk; what is not there, or damaged, is computed."""
        examples = self.read.encode(rows, length, packed=packed)
        names = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        key = {
            "layout": LAYOUT,
            "teacher": self.teacher,
            "data": rows.digest,
            "length": length,
            "packed": packed,
            "tokenizer": hashlib.sha256(names).hexdigest(),
            "k": min(self.kept.k, self.vocabulary),
            "temperature": self.kept.temperature,
            "vocabulary": self.vocabulary,
        }
        folder = cache_folder() / "teachers" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        found = Answers.read(folder, key)
        if found is None:
            teacher = open_in(
                self.context_of_step, self.context_of_step.resolve(self.inputs.teacher), access=Access.PROBS
            )
            write_answers(teacher, examples, key, folder, self.context_of_step.settings.quiet)
            found = Answers.read(folder, key)
        if found is None:
            raise RequestError(f"{folder}: what the teacher said cannot be read back; is the disk full?")
        return found


def bytes_per_token(kept: Kept, vocabulary: int) -> int:
    """Return what is kept of a token, in bytes."""
    return min(kept.k, vocabulary) * (narrowest(vocabulary).itemsize + 2)


def narrowest(vocabulary: int) -> np.dtype[Any]:
    """Return the narrowest type of integers that holds every id."""
    return next(np.dtype(kind) for kind in ("<u1", "<u2", "<u4") if vocabulary <= 2 ** (8 * np.dtype(kind).itemsize))


class Answers(Examples):
    """What a teacher said of examples, mapped from files."""

    def __init__(self, folder: Path, k: int, vocabulary: int) -> None:
        def mapped(name: str, kind: np.dtype[Any], shape: tuple[int, ...]) -> Any:
            return np.memmap(folder / name, kind, mode="r").reshape(shape)

        self._offsets = mapped(OFFSETS, np.dtype("<i8"), (-1,))
        self._ids = mapped(IDS, narrowest(vocabulary), (-1, k))
        self._values = mapped(VALUES, np.dtype("<f2"), (-1, k))

    @classmethod
    def read(cls, folder: Path, key: Mapping[str, Any]) -> Answers | None:
        """Return what is in a folder; None where there is nothing, or something damaged."""
        if not folder.is_dir():
            return None
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            whole = about["key"] == dict(key) and about["sha256"] == _digests(folder)
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            LOG.warning("note: %s: what was kept of a teacher's answers is damaged, and is computed again", folder)
            return None
        return cls(folder, key["k"], key["vocabulary"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def batch(self, indices: Sequence[int]) -> Batch:
        places = [slice(int(self._offsets[i]), int(self._offsets[i + 1])) for i in indices]
        ids = np.concatenate([self._ids[place] for place in places]).astype(np.int64)
        values = np.concatenate([self._values[place] for place in places]).astype(np.float32)
        return dict(zip(TOLD, (torch.from_numpy(ids), torch.from_numpy(values)), strict=True))


def write_answers(teacher: Model, examples: Examples, key: Mapping[str, Any], folder: Path, quiet: bool) -> None:
    """Ask the teacher about all examples, batch by batch, into `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f"{folder.name}.", suffix=".draft", dir=folder.parent))
    try:
        offsets = [0]
        with (
            (draft / IDS).open("wb") as ids,
            (draft / VALUES).open("wb") as values,
            Progress("teacher", len(examples), quiet) as progress,
        ):
            for first in range(0, len(examples), TOGETHER):
                batch = examples.batch(range(first, min(first + TOGETHER, len(examples))))
                kept = batch["labels"][:, 1:] != IGNORE
                said = teacher.log_probs(batch)[:, :-1].cpu()[kept]
                top = (said / key["temperature"]).log_softmax(-1).topk(key["k"], -1)
                ids.write(top.indices.numpy().astype(narrowest(key["vocabulary"])).tobytes())
                values.write(top.values.numpy().astype("<f2").tobytes())
                offsets += [offsets[-1] + count for count in kept.sum(1).cumsum(0).tolist()]
                progress.advance(len(kept))
        np.array(offsets, dtype="<i8").tofile(draft / OFFSETS)
        about = {"key": dict(key), "sha256": _digests(draft)}
        (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for path in draft.iterdir():
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)  # damaged, or another process was as fast with the same
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name in (IDS, VALUES, OFFSETS):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
