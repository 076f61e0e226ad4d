"""Reads configurations of mergekit 0.1.5, and of mergekit-multi, as steps of a recipe.

What this file holds is their shape: keys, models, documents. What they mean is in `steps`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lfm.errors import RequestError, did_you_mean
from lfm.recipe._yaml import Located, read_documents
from lfm.recipe.foreign import ForeignStep
from lfm.recipe.schema import validate
from lfm.reuse.merge._mergekit.methods import METHODS

Place = tuple[str | int, ...]
UNKNOWN = "?"  # stands for a model that is not named rightly
GROUPS = ("models", "slices", "modules")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Part):
    """A model that is merged."""

    model: Any = Field(description="The model")
    parameters: dict[str, Any] | None = None


class SliceEntry(Entry):
    """Some layers of a model that are merged."""

    layer_range: tuple[int, int] = Field(description="First layer, and the one after the last")


class SliceDefinition(_Part):
    """Layers of the output."""

    sources: list[SliceEntry] = Field(description="Which layers of which models", min_length=1)
    base_model: Any = None
    residual_weight: Any = None
    parameters: dict[str, Any] | None = None


class ModuleDefinition(_Part):
    """A part of a model that has several, such as its vision tower."""

    models: list[Entry] | None = None
    slices: list[SliceDefinition] | None = None
    parameters: dict[str, Any] | None = None


class TokenDefinition(_Part):
    """Where the row of a token comes from."""

    source: Any = None
    force: bool = False


class TokenizerDefinition(_Part):
    """Which tokens the output has."""

    source: Any = "union"
    tokens: dict[str, TokenDefinition] | None = None
    pad_to_multiple_of: int | None = Field(None, ge=1)


class Document(_Part):
    """One merge."""

    merge_method: str = Field(description="The method")
    name: str | None = None
    models: list[Entry] | None = None
    slices: list[SliceDefinition] | None = None
    modules: dict[str, ModuleDefinition] | None = None
    base_model: Any = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: TokenizerDefinition | None = None
    chat_template: str | None = None


def read(path: Path, name: str) -> list[ForeignStep]:
    """Return the steps that mean what a configuration says, the result last, called `name`.

    Raises RequestError with everything that is wrong in it or cannot be done, each with its line.
    """
    from lfm.reuse.merge._mergekit.steps import translate

    documents = read_documents(path)
    if not documents:
        raise RequestError(f"{path}: holds nothing")
    problems: list[str] = []
    called = dict(enumerate(_names(documents, name, problems)))
    names = {str(_name(documents[index])): step for index, step in called.items() if _name(documents[index])}
    last = next(index for index, step in called.items() if step == name)
    steps: list[ForeignStep] = []
    for index in [*(index for index in called if index != last), last]:
        document = _checked(documents[index], problems)
        if document is not None:
            models = Models(documents[index], problems, names if len(documents) > 1 else {})
            steps += translate(document, documents[index], models, called[index], problems)
    if problems:
        raise RequestError(*dict.fromkeys(problems))
    return steps


def _name(document: Located) -> Any:
    return document.value.get("name") if isinstance(document.value, dict) else None


def _names(documents: list[Located], name: str, problems: list[str]) -> Iterator[str]:
    """Yield the name of the step that each document becomes; the one without a name, or the last, is the result."""
    given = [_name(document) for document in documents]
    nameless = [index for index, one in enumerate(given) if one is None]
    last = nameless[0] if nameless else len(given) - 1
    for index in nameless[1:]:
        problems.append(f"{documents[index].where(())}: a second document without `name`; only one can be the result")
    for index, (document, one) in enumerate(zip(documents, given, strict=True)):
        where = document.where(("name",))
        if len(documents) > 1 and one is not None and not _is_folder(one):
            problems.append(f"{where}: {one!r} cannot name a folder")
        elif one is not None and (one in given[:index] or (one == name and index != last)):
            problems.append(f"{where}: {one!r} is the name of another result")
        yield name if index == last else f"{name} {index}" if one is None else str(one)


def _is_folder(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and Path(name).name == name and name[0] != "." and name.isprintable()


def _checked(located: Located, problems: list[str]) -> Document | None:
    """Return a document whose shape is right, unknown keys aside; both are told."""
    value = located.value
    if not isinstance(value, dict):
        problems.append(f"{located.where(())}: a configuration is a mapping with the key merge_method; this is not one")
        return None
    if "merge_method" not in value and "steps" in value:
        problems.append(f"{located.where(())}: this is a recipe, and no configuration of mergekit; run it: `lfm run`")
        return None
    told: list[str] = []
    document: Document | None = validate(Document, value, located, (), told)
    problems += told
    if document is None:
        document = _without_unknown_keys(value)
    if document is None:
        return None
    before = len(problems)
    problems += _combination_problems(document, located)
    return document if len(problems) == before else None


def _without_unknown_keys(value: dict[str, Any]) -> Document | None:
    """Return a document without the keys that are unknown, if they are all that is wrong."""
    value = copy.deepcopy(value)
    try:
        return Document.model_validate(value)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] != "extra_forbidden":
                return None
            part: Any = value
            for key in item["loc"][:-1]:
                part = part[key]
            del part[item["loc"][-1]]
    return Document.model_validate(value)


def _combination_problems(document: Document, located: Located) -> Iterator[str]:
    if document.merge_method not in METHODS:
        hint = did_you_mean(document.merge_method, METHODS)
        yield f"{located.where(('merge_method',))}: {document.merge_method!r} is no method of mergekit{hint}"
    given = [key for key in GROUPS if getattr(document, key)]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        yield f"{located.where(given[-1:])}: give one of models, slices and modules; got {told}"
    if document.tokenizer_source is not None and document.tokenizer is not None:
        yield f"{located.where(('tokenizer',))}: give `tokenizer` or `tokenizer_source`, not both"
    for name, module in (document.modules or {}).items():
        if bool(module.models) == bool(module.slices):
            yield f"{located.where(('modules', name))}: give one of models and slices"


@dataclass
class Models:
    """Reads how mergekit names models: `path[@revision][+adapter[@revision]]`, or mappings that say the same."""

    located: Located
    problems: list[str]
    results: Mapping[str, str]  # names of the results of other documents, and of the steps that make them

    def label(self, value: Any, place: Place) -> str:
        """Return a model as a recipe names it."""
        before = len(self.problems)
        if isinstance(value, dict):
            value = self._from_mapping(value, place)
        if len(self.problems) > before:
            return UNKNOWN
        if not isinstance(value, str) or not value.strip("@+ "):
            self.problems.append(f"{self.located.where(place)}: names a model: a folder or a hub name; got {value!r}")
            return UNKNOWN
        plain = value.split("+")[0].split("@")[0]
        if plain in self.results and plain != value:
            told = f"{plain!r} is the result of another document, and takes neither an adapter nor a revision here"
            self.problems.append(f"{self.located.where(place)}: {told}")
        return self.results.get(value, value)

    def _from_mapping(self, value: dict[str, Any], place: Place) -> Any:
        for key in value:
            if key == "override_architecture" and value[key] is not None:
                told = (
                    "models are matched by the names of their tensors here, whatever their architecture; leave it out"
                )
                self.problems.append(f"{self.located.where((*place, key))}: {told}")
            elif key not in ("model", "lora", "override_architecture"):
                hint = did_you_mean(key, ("model", "lora"))
                self.problems.append(f"{self.located.where((*place, key))}: unknown key of a model{hint}")
        parts = [self._path(value.get("model"), (*place, "model"))]
        parts += [self._path(value["lora"], (*place, "lora"))] if value.get("lora") is not None else []
        return "+".join(parts)

    def _path(self, value: Any, place: Place) -> str:
        """Return `path[@revision]`, of text or of a mapping."""
        if isinstance(value, dict):
            for key in value:
                if key not in ("path", "revision"):
                    hint = did_you_mean(key, ("path", "revision"))
                    self.problems.append(f"{self.located.where((*place, key))}: unknown key of a model{hint}")
            parts = [value.get("path"), *([value["revision"]] if value.get("revision") is not None else [])]
            value = "@".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(value, str) or not value:
            self.problems.append(f"{self.located.where(place)}: names a model: a folder or a hub name; got {value!r}")
            return UNKNOWN
        return value
