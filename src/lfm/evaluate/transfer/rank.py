"""Ranking models for a task by a small labelled sample: the scores that each model's access allows, and its cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm.data import Rows
from lfm.errors import RequestError, plural
from lfm.evaluate.transfer import NEEDED, SCORES, Kind
from lfm.method import Access
from lfm.models.encode import Encoder, Examples
from lfm.models.handle import Model
from lfm.models.open import Around, open_in
from lfm.models.ref import ModelRef
from lfm.progress import Progress


@dataclass(frozen=True)
class Ranked:
    """A model among others: its place, scores, cost, and why some of them are missing."""

    model: str
    place: int | None  # by the first score that was asked for; None without it
    scores: Mapping[str, float]
    missing: Mapping[str, str]  # score -> why it could not be computed
    access: str
    parameters: int | None  # None where nobody tells
    bytes: int | None
    seconds: float | None  # for one example, in batches

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return dict(vars(self))


@dataclass
class Seen:
    """What a model made of the sample, and why something is not there."""

    values: dict[Kind, NDArray[Any]]
    missing: dict[Kind, str]
    seconds: float | None = None  # for one example


def check_sample(rows: Rows) -> NDArray[np.int64]:
    """Return the class of each row as a number. Raises RequestError for a sample that cannot tell models apart."""
    classes = rows.classes
    if len(classes) < 2:
        raise RequestError(
            f"{rows.origin}: has one class, {classes[0]!r}; ranking takes two or more "
            "(of a file that is sorted by class, `limit` keeps the first)"
        )
    if len(rows) < 2 * len(classes):
        raise RequestError(
            f"{rows.origin}: has {plural(len(rows), 'row')} of {len(classes)} classes; give two or more of each"
        )
    places = {name: place for place, name in enumerate(classes)}
    labels = rows.columns["label"]
    return np.array([places[label] for label in (labels.tolist() if isinstance(labels, np.ndarray) else labels)])


def rank_models(
    models: Mapping[str, ModelRef],
    sizes: Mapping[str, tuple[int, int]],
    rows: Rows,
    scores: Sequence[str],
    around: Around,
    length: int,
    batch_size: int,
) -> list[Ranked]:
    """Return the models, the best first, ranked by the first of `scores`; those without it follow by the next.

    `sizes` are parameters and bytes, where they are known. Models are loaded one at a time, and used at the level of
    LOGITS or what less they offer.
    """
    labels = check_sample(rows)
    kinds = {SCORES[score].of for score in scores}
    found = []
    with Progress("rank", len(models), around.settings.quiet) as progress:
        for name, ref in models.items():
            access = ref.offers
            try:
                model = open_in(around, ref)
                access = model.access
                seen = look(model.restrict(Access.LOGITS), rows, kinds, length, batch_size)
            except RequestError as error:  # a model of images and a sample of texts: no candidate, but others may be
                seen = Seen({}, dict.fromkeys(kinds, "; ".join(error.problems)))
            found.append(_ranked(name, access, sizes.get(name), seen, labels, scores))
            progress.advance(1, name)
    found.sort(key=lambda one: [-one.scores.get(score, -np.inf) for score in scores])
    return [replace(one, place=place if scores[0] in one.scores else None) for place, one in enumerate(found, 1)]


def _ranked(
    name: str,
    access: Access,
    size: tuple[int, int] | None,
    seen: Seen,
    labels: NDArray[np.int64],
    scores: Sequence[str],
) -> Ranked:
    computed, missing = {}, {}
    for score in scores:
        kind = SCORES[score].of
        if kind in seen.values:
            computed[score] = SCORES[score].compute(seen.values[kind], labels)
        else:
            missing[score] = seen.missing[kind]
    parameters, nbytes = size or (None, None)
    return Ranked(name, None, computed, missing, access.name.lower(), parameters, nbytes, seen.seconds)


def look(model: Model, rows: Rows, kinds: set[Kind], length: int, batch_size: int) -> Seen:
    """Return what the model makes of the rows: features (n, width), probabilities (n, classes), answers (n,)."""
    seen = Seen({}, {kind: reason for kind in kinds if (reason := _refusal(model, kind))})
    # The most probable class is the answer: a model that gives probabilities is run once for both.
    source: dict[Kind, Kind] = {kind: kind for kind in kinds}
    if "answers" in kinds and model.access >= Access.PROBS:
        source["answers"] = "probs"
    examples = _encoded(model, rows, length)
    made: dict[Kind, NDArray[Any]] = {}
    for kind in sorted(kinds - seen.missing.keys()):
        try:
            if source[kind] not in made:
                made[source[kind]] = _asked(model, source[kind], examples, batch_size, seen)
        except RequestError as error:
            seen.missing[kind] = "; ".join(error.problems)
            continue
        found = made[source[kind]]
        seen.values[kind] = found.argmax(-1) if source[kind] != kind else found
    return seen


def _refusal(model: Model, kind: Kind) -> str:
    """Return why a model cannot be asked for something, or an empty string."""
    needed = NEEDED[kind]
    if model.access < needed:
        return f"takes {needed.name.lower()}, the model offers {model.access.name.lower()}"
    if kind != "features" and not model.task.endswith("classification"):
        return f"takes classes, and a {model.task} model has none"
    return ""


def _asked(model: Model, kind: Kind, examples: Examples, batch_size: int, seen: Seen) -> NDArray[Any]:
    ask = {"features": model.features, "probs": model.probs, "answers": model.labels}[kind]
    parts, times = [], []
    for start in range(0, len(examples), batch_size):
        batch = examples.batch(range(start, min(start + batch_size, len(examples))))
        began = time.perf_counter()
        parts.append(ask(batch).cpu().numpy())
        times.append((time.perf_counter() - began) / len(parts[-1]))
    whole = np.concatenate(parts)
    if not np.isfinite(whole).all():
        raise RequestError("what it gives is not finite (NaN or Inf); its weights are broken")
    seen.seconds = float(np.median(times))  # the first batch may be slower than the others
    return whole


def _encoded(model: Model, rows: Rows, length: int) -> Examples:
    """Return the rows for the model, one example each; their labels are not its classes."""
    encoder = model.encoder
    if not model.task.endswith("classification"):
        if not isinstance(encoder, Encoder) or "text" not in rows.columns:
            raise RequestError(f"{rows.origin}: {model.task} models are ranked on texts with labels")
        encoder = replace(encoder, task="text-classification")
        length = min(length, encoder.context or length)
    return encoder.encode(rows, length, labelled=False)


__all__ = ["Ranked", "Seen", "check_sample", "look", "rank_models"]
