"""The Python side of every verb: build a one-step recipe in memory, check it, run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from lfm.checkpoint import Checkpoint, open_checkpoint
from lfm.data import DataSpec
from lfm.errors import RequestError
from lfm.method import Have, Method, cards
from lfm.models.ref import ModelRef
from lfm.recipe._yaml import Located
from lfm.recipe.schema import Recipe, check_step, dump, load_recipe, validate
from lfm.recipe.step import Settings

if TYPE_CHECKING:
    from lfm.evaluate.measure import Measured, Measurement
    from lfm.models.handle import Model
    from lfm.recipe.catalogue import Catalogue
    from lfm.recipe.execute import StepRun

ModelLike = str | Path | ModelRef | Mapping[str, Any]


def load(ref: ModelLike, *, device: str = "cpu") -> Model:
    """Return a handle on a model: a folder, `org/name`, `base+adapter`, or a mapping as a recipe would hold it."""
    from lfm.models.local import load_model

    return load_model(ModelRef.model_validate(ref), device=device)


def run(
    recipe: str | Path | Recipe,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> list[StepRun]:
    """Run a recipe (a file, or one in memory): steps, evaluation, report. Returns what became of each step.

    Raises RequestError with every problem before any weight is loaded.
    """
    from lfm.recipe.execute import execute
    from lfm.recipe.summary import evaluate, report

    found = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    runs, catalogue = execute(found, settings or Settings(), None if out is None else Path(out), overwrite=overwrite)
    report(found, runs, catalogue, evaluate(found, catalogue), runs[0].folder if found.single else catalogue.out)
    return runs


def one_step(
    verb: str,
    method: str,
    keys: Mapping[str, Any],
    *,
    out: str | Path,
    seed: int = 0,
    evaluate: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of a single step that writes `out` itself. Raises RequestError with every problem.

    `keys` are what a recipe would hold: the verb's inputs and the method's parameters.
    """
    problems: list[str] = []
    raw = {verb: method, **{key: value for key, value in keys.items() if value is not None}}
    name = Path(out).name or "out"
    located = Located(f"{verb} {method}", raw)
    step = check_step(name, raw, located, (), problems)
    measures = validate_measures(evaluate, problems) if evaluate else None
    if step is None or problems:
        raise RequestError(*problems)
    text = f"lfm: 1\nseed: {seed}\nsteps:\n  {name}: {dump(step.as_dict())}\n"
    text += f"evaluate: {dump(dict(evaluate))}\n" if evaluate else ""
    return Recipe({name: step}, {}, Path(out), seed, measures, text, single=True)


def validate_measures(measures: Mapping[str, Any], problems: list[str]) -> Any:
    """Return the `evaluate` section, or None with the reasons added to `problems`."""
    from lfm.evaluate.spec import Evaluate

    return validate(Evaluate, dict(measures), Located("evaluate", None), (), problems)


def measure_models(
    models: Sequence[Any], measures: Mapping[str, Any], settings: Settings, seed: int = 0
) -> tuple[Recipe, Catalogue, Measured]:
    """Measure models side by side; `measures` is what a recipe holds under `evaluate`."""
    from lfm.evaluate.measure import measure
    from lfm.recipe.catalogue import Catalogue, short_name

    problems: list[str] = []
    spec = validate_measures(measures, problems)
    try:
        refs = [ModelRef.model_validate(model) for model in models]
    except ValidationError as error:
        problems += [str(item["msg"]) for item in error.errors()]
    if problems:
        raise RequestError(*problems)
    named = {short_name(ref): ref for ref in refs}
    if len(named) < len(refs):  # folders of one name in different places
        named = {ref.label: ref for ref in refs}
    recipe = Recipe({}, named, None, seed, spec)
    catalogue = Catalogue(recipe, settings, None)
    catalogue.outlines(refs)
    return recipe, catalogue, measure(named, spec, catalogue)


def merge(
    method: str | Method,
    models: Sequence[ModelLike],
    *,
    out: str | Path,
    base: ModelLike | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> Checkpoint:
    """Merge models into the new folder `out` and return it.

    `method` is a name with its defaults (`"ties"`), or an object with parameters (`Ties(density=0.3)`). Raises
    RequestError with everything that is wrong before any weight is read.
    """
    keys = {
        "models": [_plain(model) for model in models],
        "base": _plain(base),
        "weights": list(weights) if weights is not None else None,
        "dtype": dtype,
    }
    return _one(method, "merge", keys, out, seed, overwrite, settings)


def tune(
    method: str | Method,
    model: ModelLike,
    data: str | Path | DataSpec | Mapping[str, Any],
    *,
    out: str | Path,
    validation: str | Path | DataSpec | Mapping[str, Any] | None = None,
    task: str | None = None,
    new_head: bool = False,
    length: int = 256,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> Checkpoint:
    """Tune a model on data into the new folder `out` and return it; `method` as for `merge` (`Full(epochs=2)`)."""
    keys = {
        "model": _plain(model),
        "data": _plain(data),
        "validation": _plain(validation),
        "task": task,
        "new_head": new_head,
        "length": length,
        "dtype": dtype,
    }
    return _one(method, "tune", keys, out, seed, overwrite, settings)


def evaluate(
    models: Sequence[ModelLike], measures: Mapping[str, Any], *, seed: int = 0, settings: Settings | None = None
) -> list[Measurement]:
    """Measure models side by side; `measures` is what a recipe holds under `evaluate`.

    For example `evaluate(["A", "B"], {"perplexity": "text.txt"})`. Each measurement holds an estimate with its interval
    for every model.
    """
    _, _, measured = measure_models([_plain(model) for model in models], measures, settings or Settings(), seed)
    return measured.measurements


def advise(have: Have) -> dict[str, list[str]]:
    """Return, for each method (`"merge ties"`), what it needs beyond what you have; an empty list means it can run."""
    return {f"{verb} {name}": card.needs.missing(have) for (verb, name), card in cards().items()}


def _one(
    method: str | Method,
    verb: str,
    keys: Mapping[str, Any],
    out: str | Path,
    seed: int,
    overwrite: bool,
    settings: Settings | None,
) -> Checkpoint:
    name = method if isinstance(method, str) else type(method).__module__.rpartition(".")[2]
    parameters = {} if isinstance(method, str) else method.model_dump(exclude_unset=True)
    recipe = one_step(verb, name, {**keys, **parameters}, out=out, seed=seed)
    run(recipe, overwrite=overwrite, settings=settings)
    return open_checkpoint(out)


def _plain(value: Any) -> Any:
    """Return what a recipe would hold: text for paths, mappings for specs."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return str(value) if isinstance(value, Path) else value
