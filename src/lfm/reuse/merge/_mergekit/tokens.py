"""What a configuration of mergekit says of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm.errors import did_you_mean
from lfm.reuse.merge._mergekit.document import Document, Models
from lfm.reuse.merge._mergekit.settings import Place, Reading
from lfm.reuse.merge._tokens.policy import SOURCES

ROW_KEYS = ("kind", "model", "token", "token_id")


def tokenizer_of(document: Document, models: Models, read: Reading, known: Sequence[str]) -> Any:
    """Return the `tokenizer` of a step, or None where nothing is said of it; `known` are the step's models."""
    given = document.tokenizer
    place: Place = ("tokenizer_source",) if given is None else ("tokenizer", "source")
    source = document.tokenizer_source if given is None else given.source
    if source is None and given is None:
        return None
    read.origins["tokenizer"] = place[:1]
    if source is None:
        read.problem(place, "is `union`, `base` or one of the models")
        return None
    found = _source(source, models, read, known, place, document.base_model is not None)
    if given is None or (not given.tokens and given.pad_to_multiple_of is None):
        return found["source"] if list(found) == ["source"] else found if found["model"] in SOURCES else found["model"]
    rules = {text: rule.model_dump(exclude_defaults=True) for text, rule in (given.tokens or {}).items()}
    for text, rule in rules.items():
        if "source" in rule:
            rule["source"] = _row(rule["source"], models, read, known, ("tokenizer", "tokens", text, "source"))
    if rules:
        read.note(("tokenizer", "tokens"), "a token that no model has gets the mean of all rows; in mergekit, zeros")
    padded = {} if given.pad_to_multiple_of is None else {"pad_to_multiple_of": given.pad_to_multiple_of}
    return {**found, **({"tokens": rules} if rules else {}), **padded}


def _source(
    source: Any, models: Models, read: Reading, known: Sequence[str], place: Place, has_base: bool
) -> dict[str, str]:
    if source == "union":
        read.note(place, "new tokens are numbered in the order of the models; in mergekit the order is up to chance")
        return {"source": "union"}
    if source == "base":
        if not has_base:
            read.note(place, "there is no base_model, so these are the tokens of the first model; mergekit takes any")
        return {"source": "base"}
    return {"model": _one_of(models.label(source, place), read, known, place)}


def _one_of(model: str, read: Reading, known: Sequence[str], place: Place) -> str:
    if model not in known:
        read.problem(place, f"{model!r} is none of the models that are merged{did_you_mean(model, known)}")
    return model


def _row(source: Any, models: Models, read: Reading, known: Sequence[str], place: Place) -> Any:
    """Return where a token's row comes from: a model, or a mapping with a `kind`."""
    if not isinstance(source, Mapping) or "kind" not in source:
        return _one_of(models.label(source, place), read, known, place)
    kinds = ("zero", "model_token")
    if source["kind"] not in kinds:
        hint = did_you_mean(str(source["kind"]), kinds)
        read.problem((*place, "kind"), f"is zero or model_token, got {source['kind']!r}{hint}")
    row = {}
    for key, value in source.items():
        if key not in ROW_KEYS:
            read.problem((*place, key), f"unknown key{did_you_mean(key, ROW_KEYS)}")
        row[key] = value
        if key == "model":
            row[key] = _one_of(models.label(value, (*place, key)), read, known, (*place, key))
    return row
