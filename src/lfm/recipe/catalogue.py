"""The models and data of one recipe, by name: those that exist, and those that its steps will make."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from lfm.checkpoint import Checkpoint, open_checkpoint
from lfm.data import DataSpec, Rows, read
from lfm.errors import RequestError
from lfm.models.ref import ModelRef
from lfm.recipe.schema import Recipe, Step, dump
from lfm.recipe.step import Outline, Settings


class Catalogue:
    """Answers what engines ask (see `lfm.recipe.step.Context`)."""

    def __init__(self, recipe: Recipe, settings: Settings, out: Path | None) -> None:
        self.seed = recipe.seed
        self.settings = settings
        self._recipe = recipe
        self._out = out
        self._planned: dict[str, Outline] = {}
        self._rows: dict[str, Rows] = {}
        self._checkpoints: dict[str, Checkpoint] = {}

    @property
    def out(self) -> Path:
        """The folder of the run."""
        if self._out is None:
            raise RequestError("where to? give the recipe an `out`, or pass -o FOLDER")
        return self._out

    def target(self, step: Step) -> Path:
        """Return the folder that a step writes."""
        return self.out if self._recipe.single else self.out / step.name

    def made_by(self, step: Step, outline: Outline) -> None:
        """Note what a step makes, so that later steps can be planned."""
        self._planned[step.name] = outline

    def resolve(self, ref: ModelRef) -> ModelRef:
        """Return where a model really is."""
        if ref.ref in self._planned:
            # The output is a checkpoint of its own; of the model it was made like, only what no file says is kept.
            like = self._planned[ref.ref].ref
            kept = like.model_copy(update={"ref": str(self.target(self._recipe.steps[ref.ref])), "config": None})
            return kept.model_copy(update={"tokenizer": None})
        return self._recipe.models.get(ref.ref, ref) if ref.ref else ref

    def outline(self, ref: ModelRef) -> Outline:
        """Return what a model looks like, whether it exists already or will be made by a step."""
        if ref.ref in self._planned:
            planned = self._planned[ref.ref]
            return Outline(ref, planned.specs, planned.config, planned.vocabulary)
        if ref.ref in self._recipe.steps:
            raise RequestError(f"{ref.ref!r} cannot be made (see above), so this cannot be planned")
        found = self.resolve(ref)
        if found.ref is None:
            from lfm.models.local import outline_new

            return outline_new(found)
        checkpoint = self.open(ref)
        named = found if found.module or found.image or found.task else ref
        return Outline(named, checkpoint.specs, checkpoint.config, checkpoint.vocabulary)

    def outlines(self, refs: Sequence[ModelRef]) -> list[Outline]:
        """Return the outlines of several models, or raise RequestError with what is wrong with any of them."""
        found: list[Outline] = []
        problems: list[str] = []
        for ref in refs:
            try:
                found.append(self.outline(ref))
            except RequestError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise RequestError(*problems)
        return found

    def open(self, ref: ModelRef) -> Checkpoint:
        """Open a model's weights."""
        found = self.resolve(ref)
        if found.ref is None:
            raise RequestError(f"{ref.label}: a new model has no weights yet; train it first")
        if found.ref not in self._checkpoints:
            self._checkpoints[found.ref] = open_checkpoint(found.ref, allow_pickle=self.settings.allow_pickle)
        return self._checkpoints[found.ref]

    def rows(self, spec: DataSpec) -> Rows:
        """Read data, once."""
        key = dump(spec.model_dump(mode="json"))
        if key not in self._rows:
            self._rows[key] = read(spec)
        return self._rows[key]

    def digest(self, ref: ModelRef) -> str:
        """Return the digest of a model's weights; for a new one, that of what it is made from."""
        found = self.resolve(ref)
        if found.ref is not None:
            return self.open(ref).digest
        return hashlib.sha256(dump([found.model_dump(mode="json"), self.seed]).encode()).hexdigest()

    def names(self) -> Mapping[str, ModelRef]:
        """Return every model that can be measured, by the name that tables give it."""
        if not self._recipe.single:
            return {name: ModelRef(ref=name) for name in (*self._recipe.models, *self._recipe.steps)}
        refs = [
            ref for step in self._recipe.steps.values() for _, ref in sorted(step.roles(), key=lambda r: r[0] != "base")
        ]
        return {short_name(ref): ref for ref in refs} | {name: ModelRef(ref=name) for name in self._recipe.steps}


def short_name(ref: ModelRef) -> str:
    """Return a model's name for a table: a path's last part."""
    return Path(ref.label).name if ref.ref else ref.label
