"""Planning and running recipes: every problem first, then step by step; what is done already is not done again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm import __version__
from lfm.checkpoint import OutputFolder, check_free, open_checkpoint, remember_output
from lfm.data import DataSpec
from lfm.errors import RequestError
from lfm.evaluate.harness import require
from lfm.recipe.catalogue import Catalogue
from lfm.recipe.lineage import environment, model_card, parent, read_lineage
from lfm.recipe.schema import Recipe, Step, dump, in_order
from lfm.recipe.step import Settings, StepPlan


@dataclass
class RunPlan:
    """What running a recipe will do; `problems` holds everything that speaks against it."""

    steps: list[tuple[Step, StepPlan | None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    catalogue: Catalogue | None = None


@dataclass
class StepRun:
    """What became of one step."""

    step: Step
    folder: Path
    lineage: dict[str, Any]
    skipped: bool


def plan(recipe: Recipe, settings: Settings, out: Path | None = None) -> RunPlan:
    """Plan every step from headers alone; reads no weights and writes nothing."""
    catalogue = Catalogue(recipe, settings, out or recipe.out)
    made = RunPlan(catalogue=catalogue)
    for step in in_order(recipe.steps):
        prefix = "" if recipe.single else f"step {step.name}: "
        try:
            step_plan = step.card.verb.engine().plan(step.method, step.inputs, catalogue)
        except RequestError as error:
            made.problems += [f"{prefix}{problem}" for problem in error.problems]
            made.steps.append((step, None))
            continue
        catalogue.made_by(step, step_plan.output)
        made.problems += [f"{prefix}{problem}" for problem in step_plan.problems]
        made.steps.append((step, step_plan))
    made.problems += _data_problems(recipe, catalogue)
    return made


def _data_problems(recipe: Recipe, catalogue: Catalogue) -> list[str]:
    """Read the data of the evaluation too: a typo in it should not wait until the end."""
    problems = []
    for label, spec in _evaluation_data(recipe):
        try:
            catalogue.rows(spec)
        except RequestError as error:
            problems += [f"evaluate {label}: {problem}" for problem in error.problems]
    if recipe.evaluate is not None and recipe.evaluate.harness is not None:
        try:
            require()
        except RequestError as error:
            problems += [f"evaluate harness: {problem}" for problem in error.problems]
    return problems


def _evaluation_data(recipe: Recipe) -> Iterator[tuple[str, DataSpec]]:
    if recipe.evaluate is not None:
        for measure in ("accuracy", "perplexity", "drift"):
            for name, spec in getattr(recipe.evaluate, measure).items():
                yield f"{measure} {name}", spec


def execute(
    recipe: Recipe, settings: Settings, out: Path | None = None, *, overwrite: bool = False
) -> tuple[list[StepRun], Catalogue]:
    """Run a recipe's steps. Raises RequestError with every problem before any weight is loaded."""
    made = plan(recipe, settings, out)
    catalogue = made.catalogue
    if catalogue is None:
        raise AssertionError("a plan has a catalogue")
    if made.problems:
        raise RequestError(*made.problems)
    finished = _finished(made, catalogue)
    todo = [step for step, _ in made.steps if step.name not in finished]
    problems = [problem for step in todo for problem in _taken(catalogue.target(step), recipe, overwrite)]
    if problems:
        raise RequestError(*problems)
    runs = []
    for step, _ in made.steps:
        if step.name in finished:
            runs.append(StepRun(step, catalogue.target(step), finished[step.name], skipped=True))
        else:
            runs.append(_run_step(step, recipe, catalogue, overwrite))
    return runs, catalogue


def _taken(target: Path, recipe: Recipe, overwrite: bool) -> list[str]:
    problems = check_free(target, overwrite=overwrite)
    if problems and read_lineage(target) is not None and not overwrite and not recipe.single:
        return [
            f"{target}: was made with other parameters or inputs; pass --overwrite to replace it, or choose another out"
        ]
    inputs = [Path(ref.ref).resolve() for step in recipe.steps.values() for ref in step.models() if ref.ref]
    if any(path == target.resolve() or target.resolve() in path.parents for path in inputs):
        problems.append(f"{target}: is (or holds) an input of this run")
    return problems


def _finished(made: RunPlan, catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """Return the lineages of the steps that need not run: made by the same step from the same inputs, and intact."""
    finished: dict[str, dict[str, Any]] = {}
    names = {step.name for step, _ in made.steps}
    for step, _ in made.steps:
        if any(ref.ref in names and ref.ref not in finished for ref in step.models()):
            continue
        target = catalogue.target(step)
        lineage = read_lineage(target) if target.is_dir() else None
        same = lineage is not None and lineage.get("key") == step_key(step, catalogue)
        if lineage is not None and same and open_checkpoint(target).digest == lineage["output"]["digest"]:
            finished[step.name] = lineage
    return finished


def step_key(step: Step, catalogue: Catalogue) -> str:
    """Return a digest of everything that decides what a step makes: method, parameters, inputs' contents, seed."""
    inputs = step.inputs.model_dump(mode="json")
    for role, value in step.inputs:
        if isinstance(value, DataSpec):
            inputs[role] = catalogue.rows(value).digest
    content = {
        "verb": step.card.verb.name,
        "method": step.card.name,
        "parameters": step.card.parameters(**step.parameters).model_dump(mode="json"),
        "inputs": {role: value for role, value in inputs.items() if role not in dict(step.roles())},
        "models": [(role, catalogue.digest(ref)) for role, ref in step.roles()],
        "seed": catalogue.seed,
    }
    return hashlib.sha256(dump(content).encode()).hexdigest()


def _run_step(step: Step, recipe: Recipe, catalogue: Catalogue, overwrite: bool) -> StepRun:
    target = catalogue.target(step)
    key = step_key(step, catalogue)
    with OutputFolder(target, key=key, overwrite=overwrite) as folder:
        started = time.perf_counter()
        result = step.card.verb.engine().run(step.method, step.inputs, catalogue, folder)
        existing = [(role, ref) for role, ref in step.roles() if catalogue.resolve(ref).ref is not None]
        parents = [
            parent(role, ref.label, catalogue.open(ref) if (role, ref) in existing else None, catalogue.digest(ref))
            for role, ref in step.roles()
        ]
        lineage = {
            "lfm": __version__,
            "key": key,
            "verb": step.card.verb.name,
            "method": step.card.name,
            "paper": step.card.paper,
            "parameters": step.card.parameters(**step.parameters).model_dump(mode="json"),
            "seed": recipe.seed,
            "parents": parents,
            "output": {"digest": result.digest},
            "metrics": dict(result.metrics),
            "notes": list(result.notes),
            "seconds": round(time.perf_counter() - started, 3),
            "environment": environment(),
        }
        folder.write_json("lineage.json", lineage)
        card = model_card(target.name, step.card, lineage, [catalogue.open(ref) for _, ref in existing], step.as_dict())
        folder.write_text("README.md", card)
        folder.commit()
    remember_output(target, result.digests)
    return StepRun(step, target, lineage, skipped=False)
