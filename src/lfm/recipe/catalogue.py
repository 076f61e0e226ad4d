"""The models and data of one recipe, by name: those that exist, and those that its steps will make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm.checkpoint import Checkpoint, NoWeights, open_checkpoint
from lfm.data import DataSpec, Rows, read
from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.ref import ModelRef
from lfm.recipe.schema import Recipe, Step, dump
from lfm.recipe.step import Outline, Settings


class Catalogue:
    """Answers what engines ask (see `lfm.recipe.step.Context`)."""

    def __init__(self, recipe: Recipe, settings: Settings, out: Path | None) -> None:
        self.seed = recipe.seed
        self.settings = settings
        self._recipe = recipe
        self.run = ""  # what requests to endpoints are counted under
        self.out = None if out is None else _expanded(out)
        self._planned: dict[str, Outline] = {}
        self._rows: dict[str, Rows] = {}
        self._checkpoints: dict[str, Checkpoint] = {}

    def target(self, step: Step) -> Path:
        """Return the folder that a step writes."""
        out = self.out or Path("out")  # a recipe can be planned without one
        return out if self._recipe.single else out / step.name

    def made_by(self, step: Step, outline: Outline) -> None:
        """Note what a step makes, so that later steps can be planned."""
        self._planned[step.name] = outline

    def resolve(self, ref: ModelRef) -> ModelRef:
        """Return where a model really is."""
        if ref.ref in self._planned:
            # The output is a checkpoint of its own; of the model it was made like, only what no file says is kept.
            like = self._planned[ref.ref].ref
            place = str(self.target(self._recipe.steps[ref.ref]))
            own = {"access": ref.access, "defence": ref.defence}
            return like.model_copy(update={"ref": place, "config": None, "tokenizer": None, **own})
        found = self._recipe.models.get(ref.ref, ref) if ref.ref else ref
        return found if found is ref or (ref.access is None and ref.defence is None) else _narrowed(found, ref)

    def outline(self, ref: ModelRef) -> Outline:
        """Return what a model looks like, whether it exists already or will be made by a step."""
        if ref.ref in self._planned:
            planned = self._planned[ref.ref]
            return Outline(ref, planned.specs, planned.config, planned.vocabulary, planned.access)
        if ref.ref in self._recipe.steps:
            raise RequestError(f"{ref.ref!r} cannot be made (see above), so this cannot be planned")
        found = self.resolve(ref)
        if found.ref is None:
            from lfm.models.local import outline_new

            return outline_new(found)
        if found.is_endpoint:
            from lfm.models.endpoint import check_endpoint

            check_endpoint(found, self.settings.max_cost)
            return Outline(found, {}, access=found.offers)
        checkpoint = self._checkpoint(found)
        named = found if found.module or found.image or found.task else ref
        made_of_others = isinstance(checkpoint.weights, NoWeights)
        access = Access.PROBS if made_of_others else Access.WEIGHTS
        return Outline(named, checkpoint.specs, checkpoint.config, checkpoint.vocabulary, min(access, found.offers))

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
        if found.access is not None and found.offers < Access.WEIGHTS:
            raise AccessError(f"{ref.label}: its `access` is {found.access}, and this needs its weights")
        return self._checkpoint(found)

    def behind(self, ref: ModelRef) -> Checkpoint | None:
        """Return the checkpoint of a model whatever its access, to say what it is; None where there is none."""
        found = self.resolve(ref)
        return None if found.ref is None or found.is_endpoint else self._checkpoint(found)

    def _checkpoint(self, found: ModelRef) -> Checkpoint:
        """Open what a resolved reference names."""
        place = str(found.ref)
        if place not in self._checkpoints:
            self._checkpoints[place] = open_checkpoint(place, allow_pickle=self.settings.allow_pickle)
        return self._checkpoints[place]

    def rows(self, spec: DataSpec) -> Rows:
        """Read data, once."""
        key = dump(spec.model_dump(mode="json"))
        if key not in self._rows:
            self._rows[key] = read(spec)
        return self._rows[key]

    def digest(self, ref: ModelRef) -> str:
        """Return the digest of a model's weights; for a new one, that of what it is made from.

        That of an endpoint tells which one it is, and not what is behind it, which nobody can see.
        """
        found = self.resolve(ref)
        if found.is_endpoint:
            return hashlib.sha256(dump(_asked_for(found)).encode()).hexdigest()
        if found.ref is not None:
            return self._checkpoint(found).digest
        return hashlib.sha256(dump([found.model_dump(mode="json"), self.seed]).encode()).hexdigest()

    def identity(self, ref: ModelRef) -> dict[str, Any]:
        """Return everything about a model that can decide what is made of it, but not where it lies."""
        found = self.resolve(ref)
        if found.is_endpoint:
            return {**_asked_for(found), "digest": self.digest(ref)}
        about = found.model_dump(mode="json", exclude={"ref"}, exclude_defaults=True)
        for named in (str(found.module).rpartition(":")[0], found.config):
            if isinstance(named, str) and Path(named).is_file():
                about[f"content of {named}"] = hashlib.sha256(Path(named).read_bytes()).hexdigest()
        if found.ref is not None:
            checkpoint = self._checkpoint(found)
            about["config"] = checkpoint.config
            for file in checkpoint.side_files:
                about[f"file {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return {**about, "digest": self.digest(ref)}

    def names(self) -> Mapping[str, ModelRef]:
        """Return every model that can be measured, by the name that tables give it."""
        if not self._recipe.single:
            return {name: ModelRef(ref=name) for name in (*self._recipe.models, *self._recipe.steps)}
        [step] = self._recipe.steps.values()
        roles = sorted(step.roles(), key=lambda role: role[0] != "base")
        return {self.name_of(ref): ref for _, ref in roles} | {step.name: ModelRef(ref=step.name)}

    def name_of(self, ref: ModelRef) -> str:
        """Return a model's name for tables: that of the recipe, or a short one of its own."""
        if ref.ref in self._recipe.steps or ref.ref in self._recipe.models:
            return str(ref.ref)
        refs = [ref for step in self._recipe.steps.values() for ref in step.models()]
        return next((name for name, known in short_names(refs).items() if known == ref), ref.label)


def short_names(refs: Iterable[ModelRef]) -> dict[str, ModelRef]:
    """Return models by short names, the last part of a path; by the whole path where that is that of another, too."""
    refs = list(refs)
    refs = [ref for index, ref in enumerate(refs) if ref not in refs[:index]]
    short = [_short_name(ref) for ref in refs]
    found: dict[str, ModelRef] = {}
    for name, ref in zip(short, refs, strict=True):
        free = name if short.count(name) == 1 else ref.label
        found[free if free not in found else f"{free} ({len(found) + 1})"] = ref
    return found


def _short_name(ref: ModelRef) -> str:
    if ref.is_endpoint:
        return ref.label.partition("#")[2]
    return Path(ref.label).name or ref.label if ref.ref else ref.label


def _narrowed(found: ModelRef, ref: ModelRef) -> ModelRef:
    """Return a model of the recipe with the access that a step leaves itself, which cannot be more than it has."""
    changes: dict[str, Any] = {} if ref.defence is None else {"defence": ref.defence}
    if ref.access is not None:
        least = min(found.offers if found.access is not None else ref.offers, ref.offers)
        changes["access"] = least.name.lower()
    return found.model_copy(update=changes)


def _asked_for(endpoint: ModelRef) -> dict[str, Any]:
    """Return everything about an endpoint that can decide what it answers; its key and its prices do not."""
    about = endpoint.model_dump(mode="json", exclude={"endpoint"}, exclude_defaults=True)
    api = endpoint.endpoint.api if endpoint.endpoint is not None else "auto"
    return {**about, "api": api}


def _expanded(folder: Path) -> Path:
    try:
        return folder.expanduser()
    except RuntimeError:  # a user without a home
        return folder
