"""Models whose tokenizers differ, as if they did not: their embeddings and output layers in the order of the output's.

The rows of such tables are read by the text of their tokens (`vocabulary` says which, `tables` reads them), so that
everything after it sees tensors of equal shapes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from lfm.checkpoint import Checkpoint, OutputFolder, Spec
from lfm.errors import RequestError
from lfm.models.ref import ModelRef
from lfm.recipe.step import Outline
from lfm.reuse.merge._contract import Inputs
from lfm.reuse.merge._layout import Target
from lfm.reuse.merge._machine.kernels import widened
from lfm.reuse.merge._tokens.chat_template import chat_template_files
from lfm.reuse.merge._tokens.files import Files
from lfm.reuse.merge._tokens.policy import Tokenizer
from lfm.reuse.merge._tokens.tables import Tables, aligned, mean_rows, vocabulary_tables
from lfm.reuse.merge._tokens.vocabulary import Alignment, Member, align

Values = np.ndarray[Any, Any]


@dataclass
class Tokens:
    """The tables of tokens of every model, and how their rows are brought into one order."""

    alignment: Alignment = field(default_factory=Alignment)
    tables: Mapping[ModelRef, Tables] = field(default_factory=dict)  # in the order of the alignment's models
    files: Files = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._means: dict[tuple[str, str], list[Values]] = {}
        self._lock = threading.Lock()

    def outline(self, outline: Outline) -> Outline:
        """Return an outline with the tables of tokens in the shape that they will have."""
        if self.alignment.trivial or outline.ref not in self.tables:
            return outline
        names = self.tables[outline.ref].names
        specs = {name: self._spec(spec) if name in names else spec for name, spec in outline.specs.items()}
        return replace(outline, specs=specs)

    def _spec(self, spec: Spec) -> Spec:
        axis = 1 if len(spec.shape) == 2 and spec.shape[0] == 1 else 0
        shape = tuple(self.alignment.size if place == axis else extent for place, extent in enumerate(spec.shape))
        return replace(spec, shape=shape)

    def moves(self, target: Target) -> bool:
        """Whether the rows of a tensor are brought into another order."""
        origins = [origin for origin in target.inputs if origin.model in self.tables]
        return not self.alignment.trivial and any(origin.name in self.tables[origin.model].names for origin in origins)

    def read(
        self, target: Target, checkpoints: Mapping[ModelRef, Checkpoint], start: int, count: int, wide: bool
    ) -> list[Values]:
        """Return elements of a table in each of the target's inputs, as numbers, in the output's order."""
        names = dict.fromkeys(self.tables, target.name) | {origin.model: origin.name for origin in target.inputs}
        dtype = np.float64 if wide else np.float32
        reads = [_reader(checkpoints[ref], names[ref], dtype) for ref in self.tables]
        width = target.spec.size // self.alignment.size
        means = self._mean_rows(target, reads, width, dtype) if self.alignment.means.any() else []
        found = aligned(reads, self.alignment, width, start, start + count, means=means, dtype=dtype)
        by_model = dict(zip(self.tables, found, strict=True))
        return [by_model[origin.model] for origin in target.inputs]

    def _mean_rows(self, target: Target, reads: Sequence[Any], width: int, dtype: Any) -> list[Values]:
        with self._lock:  # it reads a whole table: once is enough
            key = (target.name, np.dtype(dtype).name)
            if key not in self._means:
                self._means[key] = mean_rows(reads, self.alignment, width, dtype)
            return self._means[key]

    def write(self, folder: OutputFolder, side_files: Mapping[str, Any]) -> None:
        """Write tokenizer and other side files of the output."""
        wanted = {**side_files, **self.files}
        folder.copy({name: path for name, path in wanted.items() if path is not None and not isinstance(path, bytes)})
        for name, content in wanted.items():
            if isinstance(content, bytes):
                folder.write_text(name, content.decode("utf-8"))


def _reader(checkpoint: Checkpoint, name: str, dtype: Any) -> Callable[[int, int], Values]:
    stored = checkpoint.specs[name].dtype

    def read(start: int, stop: int) -> Values:
        return widened(checkpoint.weights.read_raw(name, start, stop), stored).astype(dtype, copy=False)

    return read


def read_tokens(inputs: Inputs, checkpoints: Mapping[ModelRef, Checkpoint]) -> Tokens:
    """Return how the tokens of these models go together; the first gives config and tokenizer.

    Reads tokenizers and headers. Raises RequestError with all that is wrong.
    """
    policy = tokenizer_policy(inputs)
    refs = [ref for ref in checkpoints if ref in (inputs.base, *inputs.models)]
    tables = {ref: vocabulary_tables(_shapes(checkpoints[ref]), checkpoints[ref].config) for ref in refs}
    members = [Member(ref.label, checkpoints[ref].folder, tables[ref], checkpoints[ref].config) for ref in refs]
    if not any(table.rows for table in tables.values()):
        _refuse_strange_tokens(refs, checkpoints)
    alignment = align(members, policy, base=inputs.base is not None)
    notes = [*alignment.notes]
    files = dict(alignment.files)
    if inputs.chat_template is not None:
        more, remarks = chat_template_files(inputs.chat_template, members, alignment)
        files |= more
        notes += remarks
    return Tokens(alignment, tables, files, tuple(notes))


def _refuse_strange_tokens(refs: Sequence[ModelRef], checkpoints: Mapping[ModelRef, Checkpoint]) -> None:
    first = checkpoints[refs[0]].vocabulary
    problems = [
        f"{ref.label}: its tokenizer differs from that of {refs[0].label}, and no tensor of theirs is known to have a "
        "row for each token, so that they could be matched; if no tensor has, take the tokenizer files out of a copy"
        for ref in refs[1:]
        if first and checkpoints[ref].vocabulary and checkpoints[ref].vocabulary != first
    ]
    if problems:
        raise RequestError(*problems)


def tokenizer_policy(inputs: Inputs) -> Tokenizer:
    """Return what a step says of the tokenizer, or raise RequestError with what is wrong with it."""
    try:
        return Tokenizer.model_validate(inputs.tokenizer)
    except ValidationError as error:
        lines = [
            ".".join(["tokenizer", *map(str, item["loc"])]) + ": " + str(item["msg"]).removeprefix("Value error, ")
            for item in error.errors(include_url=False)
        ]
        raise RequestError(*dict.fromkeys(lines)) from None


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in checkpoint.specs.items()}
