"""The Python side of every verb: build a one-step recipe in memory, check it, run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lfm.errors import RequestError
from lfm.models.ref import ModelRef
from lfm.recipe._yaml import Located
from lfm.recipe.schema import Recipe, check_step, dump, load_recipe, validate
from lfm.recipe.step import Settings

if TYPE_CHECKING:
    from lfm.evaluate.measure import Measured
    from lfm.models.handle import Model
    from lfm.recipe.catalogue import Catalogue
    from lfm.recipe.execute import StepRun


def load(ref: str | Path | ModelRef | Mapping[str, Any], *, device: str = "cpu") -> Model:
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


def advise(have: Any) -> dict[str, list[str]]:
    """Return, for each method (`"merge ties"`), what it needs beyond `have` (a `Have`); empty means it can run."""
    from lfm.method import cards

    return {f"{verb} {name}": card.needs.missing(have) for (verb, name), card in cards().items()}
