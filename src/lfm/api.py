"""The Python side of every verb: build a one-step recipe in memory, check it, run it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from lfm.checkpoint import Checkpoint, open_checkpoint
from lfm.data import DataSpec
from lfm.errors import RequestError, did_you_mean
from lfm.method import Have, Method, cards, methods_of, verbs
from lfm.models.ledger import Budget
from lfm.models.ref import ModelRef
from lfm.recipe import patches as patching
from lfm.recipe._yaml import Located
from lfm.recipe.foreign import read_foreign
from lfm.recipe.schema import Recipe, Step, check_foreign, check_step, load_recipe, validate
from lfm.recipe.step import Settings

if TYPE_CHECKING:
    from lfm.evaluate.measure import Measured, Measurement
    from lfm.evaluate.spec import Evaluate
    from lfm.evaluate.transfer.rank import Ranked
    from lfm.models.handle import Model
    from lfm.recipe.catalogue import Catalogue
    from lfm.recipe.execute import StepRun

LOG = logging.getLogger("lfm")
ModelLike = str | Path | ModelRef | Mapping[str, Any]


def load(ref: ModelLike, *, device: str = "cpu", budget: Budget | None = None) -> Model:
    """Return a handle on a model: a folder, `org/name`, `base+adapter`, `http://host/v1#model`, or a mapping.

    A mapping is what a recipe would hold, such as `{"ref": "model", "access": "probs"}`. `budget` limits what an
    endpoint may be asked, and names the ledger that keeps its answers.
    """
    from lfm.models.open import open_model

    return open_model(ModelRef.model_validate(ref), device=device, budget=budget)


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
    report(found, runs, catalogue, evaluate(found, catalogue), catalogue.out)
    return runs


def one_step(
    verb: str,
    method: str,
    keys: Mapping[str, Any],
    *,
    out: str | Path | None,
    seed: int = 0,
    evaluate: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the recipe of a single step that writes `out` itself. Raises RequestError with every problem.

    `keys` are what a recipe would hold: the verb's inputs and the method's parameters. Where they were options of a
    command, `options` says what complaints call them.
    """
    problems: list[str] = []
    raw = {verb: method, **{key: value for key, value in keys.items() if value is not None}}
    located = Located(f"{verb} {method}" if options is None else "", raw, options=options or {})
    step = check_step(_step_name(out, raw), raw, located, (), problems)
    measures = validate_measures(evaluate, problems, options) if evaluate else None
    if step is None or problems:
        raise RequestError(*problems)
    place = None if out is None else Path(out)
    text = _text([step], place, seed, evaluate)
    return Recipe({step.name: step}, {}, place, seed, measures, text, single=True)


def from_config(
    path: str | Path,
    *,
    out: str | Path | None = None,
    verb: str = "merge",
    seed: int = 0,
    evaluate: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the recipe that means what a configuration of another program says: for `merge`, one of mergekit.

    Raises RequestError with everything in it that is wrong or cannot be done. One step writes `out` itself; several
    write folders in it, the result into `out/merged`. What differs from the other program is in the steps' `notes`.
    """
    problems: list[str] = []
    steps = check_foreign(read_foreign(verbs()[verb], path, "merged"), problems)
    measures = validate_measures(evaluate, problems, options) if evaluate else None
    if problems:
        raise RequestError(*problems)
    place = None if out is None else Path(out)
    single = len(steps) == 1
    if single:
        steps = [replace(steps[0], name=_step_name(out or steps[0].name, steps[0].as_dict()))]
    text = _text(steps, place, seed, evaluate)
    return Recipe({step.name: step for step in steps}, {}, place, seed, measures, text, single=single)


def _step_name(out: str | Path | None, raw: Mapping[str, Any]) -> str:
    """Return the name of what comes out: the last part of its path; more of it where an input is called the same."""
    path = Path("out" if out is None else out)
    texts = [item for value in raw.values() for item in (value if isinstance(value, list) else [value])]
    taken = {name for text in texts if isinstance(text, str) for name in (text, Path(text).name)}
    return next(name for name in (path.name or "out", str(path), f"{path} (new)") if name not in taken)


def _text(steps: Sequence[Step], out: Path | None, seed: int, evaluate: Mapping[str, Any] | None) -> str:
    """Return the recipe that does the same as these steps, of which a single one writes `out` itself."""
    content: dict[str, Any] = {"lfm": 1, "seed": seed, "steps": {step.name: step.as_dict() for step in steps}}
    content |= {"evaluate": dict(evaluate)} if evaluate else {}
    content |= {"out": str(out.parent if len(steps) == 1 else out)} if out is not None else {}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def validate_measures(
    measures: Mapping[str, Any], problems: list[str], options: Mapping[str, str] | None = None
) -> Any:
    """Return the `evaluate` section, or None with the reasons added to `problems`."""
    from lfm.evaluate.spec import Evaluate

    flags = {} if options is None else {name: f"--{name}" for name in measures}
    return validate(Evaluate, dict(measures), Located("" if flags else "evaluate", None, options=flags), (), problems)


def measure_models(
    models: Sequence[Any],
    measures: Mapping[str, Any],
    settings: Settings,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
) -> tuple[Recipe, Catalogue, Measured]:
    """Measure models side by side; `measures` is what a recipe holds under `evaluate`."""
    from lfm.evaluate.measure import measure
    from lfm.recipe.catalogue import Catalogue, short_names
    from lfm.recipe.execute import data_problems, evaluation_key

    problems: list[str] = []
    spec = validate_measures(measures, problems, options)
    located = Located("", None, options={"models": "MODELS"} if options is not None else {})
    refs = validate(_Models, {"models": list(models)}, located, (), problems)
    if problems:
        raise RequestError(*problems)
    named = short_names(refs.models)
    problems += [f"{name!r} is none of the models{did_you_mean(name, named)}" for name in _asked(spec, named)]
    spec = spec.model_copy(update={"baseline": next(_called(spec.baseline, named), None)})
    recipe = Recipe({}, named, None, seed, spec)
    catalogue = Catalogue(recipe, settings, None)
    catalogue.run = evaluation_key(recipe)
    problems += data_problems(recipe, catalogue)
    try:
        catalogue.outlines(refs.models)
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(*problems)
    return recipe, catalogue, measure(named, spec, catalogue)


def _asked(spec: Evaluate, named: Mapping[str, ModelRef]) -> list[str]:
    """Return the names in `spec` that are none of the models'."""
    asked = [*(spec.compare or ()), *([spec.baseline] if spec.baseline else ())]
    return [name for name in asked if not any(_called(name, named))]


def _called(name: str | None, named: Mapping[str, ModelRef]) -> Iterator[str]:
    """Yield the models that have this name or reference, by name."""
    return (known for known, ref in named.items() if name in (known, ref.label))


class _Models(BaseModel):
    models: list[ModelRef]


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


def ensemble(
    method: str | Method,
    models: Sequence[ModelLike],
    *,
    out: str | Path,
    base: ModelLike | None = None,
    weights: Sequence[float] | None = None,
    data: str | Path | DataSpec | Mapping[str, Any] | None = None,
    calibrate: str = "no",
    length: int = 256,
    copy_members: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> Model:
    """Join models by what they answer, into the new folder `out`, and return a handle on it; `method` as for `merge`.

    `data` are labelled examples that no member was trained on, for methods that learn how to join and for `calibrate`,
    or what members are trained on by methods that make them; `base` is what the models were tuned from, for methods
    that ask for it.
    """
    keys = {
        "models": [_plain(model) for model in models],
        "base": _plain(base),
        "weights": list(weights) if weights is not None else None,
        "data": _plain(data),
        "calibrate": calibrate,
        "length": length,
        "copy_members": copy_members,
    }
    _one(method, "ensemble", keys, out, seed, overwrite, settings)
    return load(out)


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


def distill(
    method: str | Method,
    teacher: ModelLike,
    student: ModelLike | Mapping[str, Any],
    *,
    out: str | Path,
    data: str | Path | DataSpec | Mapping[str, Any] | None = None,
    validation: str | Path | DataSpec | Mapping[str, Any] | None = None,
    length: int = 256,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> Checkpoint:
    """Teach a student what a teacher knows, into the new folder `out`, and return it; `method` as for `merge`.

    The student is a model, a new one (`{"config": ...}`, `{"module": ...}`), or is made from the teacher
    (`{"layers": 4}`). Methods without data make their own inputs.
    """
    keys = {
        "teacher": _plain(teacher),
        "student": _plain(student),
        "data": _plain(data),
        "validation": _plain(validation),
        "length": length,
        "dtype": dtype,
    }
    return _one(method, "distill", keys, out, seed, overwrite, settings)


def edit(
    method: str | Method,
    model: ModelLike,
    requests: str | Path | DataSpec | Mapping[str, Any],
    *,
    out: str | Path,
    text: str | Path | DataSpec | Mapping[str, Any] | None = None,
    statistics: str = "text",
    tokens: int = 20_000,
    guard: str | Mapping[str, Any] | None = None,
    base: ModelLike | None = None,
    batch: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    settings: Settings | None = None,
) -> Checkpoint:
    """Change what a model says, into the new folder `out`, and return it; `method` as for `merge` (`"memit"`).

    The folder holds what was changed as patches too, which `apply` puts on other copies of the model and `revert`
    takes off.
    """
    keys = {
        "model": _plain(model),
        "requests": _plain(requests),
        "text": _plain(text),
        "statistics": statistics,
        "tokens": tokens,
        "guard": guard,
        "base": _plain(base),
        "batch": batch,
    }
    return _one(method, "edit", keys, out, seed, overwrite, settings)


def apply(
    model: str | Path,
    patches: Sequence[str | Path],
    *,
    out: str | Path,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Put patches on a model, into the new folder `out`, and return it; an edited folder stands for all its patches.

    `base` is what the patches of an edited model lie on, if it is no longer where it was. Raises RequestError for
    patches of another base.
    """
    places = [Path(patch) for patch in patches]
    return patching.apply(str(model), places, Path(out), base=None if base is None else str(base), overwrite=overwrite)


def revert(
    model: str | Path, ids: Sequence[str], *, out: str | Path, base: str | Path | None = None, overwrite: bool = False
) -> Checkpoint:
    """Take patches off an edited model, into the new folder `out`, and return it: in any order, to the last bit."""
    return patching.revert(str(model), ids, Path(out), base=None if base is None else str(base), overwrite=overwrite)


def evaluate(
    models: Sequence[ModelLike], measures: Mapping[str, Any], *, seed: int = 0, settings: Settings | None = None
) -> list[Measurement]:
    """Measure models side by side; `measures` is what a recipe holds under `evaluate`.

    For example `evaluate(["A", "B"], {"perplexity": "text.txt"})`. Each measurement holds an estimate with its interval
    for every model.
    """
    _, _, measured = measure_models([_plain(model) for model in models], measures, settings or Settings(), seed)
    for note in measured.notes:
        LOG.warning("note: %s", note)
    return measured.measurements


def rank(
    models: Sequence[ModelLike],
    data: str | Path | DataSpec | Mapping[str, Any],
    *,
    scores: Sequence[str] | None = None,
    length: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    settings: Settings | None = None,
) -> list[Ranked]:
    """Rank models for a task by a small labelled sample of it, the best first; nothing is trained.

    `scores` are names of `lfm.evaluate.transfer.SCORES`, all of them if left out; the first decides. The models may
    have any classes, and those of them that offer too little for a score say so in `missing`. Raises RequestError for
    models that are not there and for samples that no model could be ranked by.
    """
    from lfm.evaluate.transfer import SCORES
    from lfm.evaluate.transfer.rank import rank_models
    from lfm.models.open import Alone
    from lfm.recipe.catalogue import Catalogue, short_names

    asked = list(SCORES if scores is None else dict.fromkeys(scores))
    known = ", ".join(SCORES)
    problems = [
        f"no score {name!r}{did_you_mean(name, SCORES)}; there are {known}" for name in asked if name not in SCORES
    ]
    problems += [] if asked and models else ["name at least one model and one score"]
    problems += (
        [] if min(length, batch_size) >= 1 else [f"length and batch_size: give 1 or more, got {length}, {batch_size}"]
    )
    given = {"models": [_plain(model) for model in models], "data": _plain(data)}
    request = validate(_Ranking, given, Located("", None), (), problems)
    if problems:
        raise RequestError(*problems)
    named = short_names(request.models)
    catalogue = Catalogue(Recipe({}, named, None, seed, None), settings or Settings(), None)
    sizes = _sizes(named, request.data, catalogue)
    around = Alone(seed, catalogue.settings)
    return rank_models(named, sizes, catalogue.rows(request.data), asked, around, length, batch_size)


def _sizes(models: Mapping[str, ModelRef], data: DataSpec, catalogue: Catalogue) -> dict[str, tuple[int, int]]:
    """Return parameters and bytes of models that have headers. Raises RequestError with all that cannot be ranked."""
    from lfm.evaluate.transfer.rank import check_sample
    from lfm.models.open import made_of_others

    problems: list[str] = []
    sizes = {}
    for name, ref in models.items():
        if ref.is_endpoint or made_of_others(ref) is not None:
            continue
        try:
            outline = catalogue.outline(ref)
            sizes[name] = sum(spec.size for spec in outline.specs.values() if spec.floating), outline.nbytes
        except RequestError as error:
            problems += error.problems
    try:
        check_sample(catalogue.rows(data))
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(*problems)
    return sizes


class _Ranking(BaseModel):
    models: list[ModelRef]
    data: DataSpec


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
    known = {card.module: name for name, card in methods_of(verb).items()}
    name = method if isinstance(method, str) else known.get(type(method).__module__, type(method).__name__)
    parameters = {} if isinstance(method, str) else method.model_dump(exclude_unset=True)
    recipe = one_step(verb, name, {**keys, **parameters}, out=out, seed=seed)
    run(recipe, overwrite=overwrite, settings=settings)
    return open_checkpoint(out)


def _plain(value: Any) -> Any:
    """Return what a recipe would hold: text for paths, mappings for specs."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return str(value) if isinstance(value, Path) else value
