"""Planning and running recipes: every problem first, then step by step; what is done already is not done again."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm import __version__
from lfm.checkpoint import OutputFolder, check_free, open_checkpoint, remember_output
from lfm.data import DataSpec
from lfm.errors import AccessError, RequestError
from lfm.evaluate.harness import require
from lfm.method import Access
from lfm.models.ref import ModelRef
from lfm.recipe.catalogue import Catalogue
from lfm.recipe.lineage import LINEAGE, ancestors, environment, model_card, parent, read_lineage
from lfm.recipe.schema import Recipe, Step, dump, in_order
from lfm.recipe.step import Settings, StepPlan


@dataclass
class RunPlan:
    """What running a recipe will do; `problems` holds everything that speaks against it."""

    catalogue: Catalogue
    steps: list[tuple[Step, StepPlan | None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    made = RunPlan(catalogue)
    if not recipe.steps and not (recipe.models and recipe.evaluate):
        made.problems.append("nothing to do: give the recipe steps, or models and what to evaluate")
    for step in in_order(recipe.steps):
        prefix = "" if recipe.single else f"step {step.name}: "
        try:
            _check_access(step, catalogue)
            step_plan = step.card.verb.engine().plan(step.method, step.inputs, catalogue)
        except RequestError as error:
            made.problems += [f"{prefix}{problem}" for problem in error.problems]
            made.steps.append((step, None))
            continue
        catalogue.made_by(step, step_plan.output)
        made.problems += [f"{prefix}{problem}" for problem in (*step.card.needs.absent_packages(), *step_plan.problems)]
        made.steps.append((step, step_plan))
    made.problems += data_problems(recipe, catalogue)
    if recipe.evaluate is not None:
        made.problems += [line for line in endpoint_problems(recipe, catalogue) if line not in made.problems]
    return made


def _check_access(step: Step, catalogue: Catalogue) -> None:
    """Refuse models that offer less than the method asks for. Raises AccessError."""
    needed = step.card.needs.access
    problems = []
    for _, ref in step.roles():
        offers = _offers(ref, catalogue)
        if offers < needed:
            problems.append(
                f"{ref.label}: offers {offers.name.lower()}, and {step.card.verb.name} {step.card.name} "
                f"needs {needed.name.lower()}"
            )
    if problems:
        raise AccessError(*problems)


def _offers(ref: ModelRef, catalogue: Catalogue) -> Access:
    """Return what a model offers; what its reference allows where it cannot be looked at, which is told elsewhere."""
    try:
        return min(catalogue.outline(ref).access, catalogue.resolve(ref).offers)
    except RequestError:
        return catalogue.resolve(ref).offers


def endpoint_problems(recipe: Recipe, catalogue: Catalogue) -> list[str]:
    """Return what keeps endpoints that are to be measured from being asked, as far as that is known here."""
    problems: list[str] = []
    for ref in recipe.models.values():
        try:
            if ref.is_endpoint:
                catalogue.outline(ref)
        except RequestError as error:
            problems += error.problems
    return problems


def data_problems(recipe: Recipe, catalogue: Catalogue) -> list[str]:
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


def evaluation_key(recipe: Recipe) -> str:
    """Return what the requests of an evaluation are counted under: the same models and data, the same key."""
    models = {name: ref.model_dump(mode="json", exclude_defaults=True) for name, ref in recipe.models.items()}
    told = None if recipe.evaluate is None else recipe.evaluate.model_dump(mode="json")
    steps = [step.as_dict() for step in recipe.steps.values()]
    return f"evaluate {hashlib.sha256(dump([models, steps, told, recipe.seed]).encode()).hexdigest()}"


def _evaluation_data(recipe: Recipe) -> Iterator[tuple[str, DataSpec]]:
    if recipe.evaluate is not None:
        for measure in ("accuracy", "perplexity", "drift"):
            for name, spec in getattr(recipe.evaluate, measure).items():
                yield f"{measure} {name}", spec


def prepare(recipe: Recipe, settings: Settings, out: Path | None = None, *, overwrite: bool = False) -> RunPlan:
    """Plan every step and look at the place it goes to; reads no weights and writes nothing."""
    made = plan(recipe, settings, out)
    if made.catalogue.out is None:
        made.problems.append(f"where to? {'' if recipe.single else 'give the recipe an `out`, or '}pass -o FOLDER")
        return made
    inputs = list(_input_paths(recipe, made.catalogue))
    for step, _ in made.steps:
        target = made.catalogue.target(step)
        ours = _has_lineage(target)
        made.problems += _overlaps(target, inputs) or check_free(target, overwrite=overwrite or ours)
        if ours:
            otherwise = "replaced" if overwrite else "refused without --overwrite"
            made.notes.append(f"{target} exists: skipped if it is what would be made again, {otherwise} if not")
    return made


def _overlaps(target: Path, inputs: Iterable[Path]) -> list[str]:
    """Return a line if writing to `target` would change an input."""
    try:
        place = target.resolve()
    except (OSError, ValueError, RuntimeError):  # no name for a folder, as `check_free` says
        return []
    for path in inputs:
        if path == place or place in path.parents:
            return [f"{target}: is (or holds) an input of this run, {path}; choose another out"]
        if path in place.parents:
            return [f"{target}: lies in an input of this run, {path}, and inputs are never changed; choose another out"]
    return []


def _input_paths(recipe: Recipe, catalogue: Catalogue) -> Iterator[Path]:
    """Yield the files and folders that a run reads and does not make."""
    refs = [*recipe.models.values(), *(ref for step in recipe.steps.values() for ref in step.models())]
    found = [catalogue.resolve(ref) for ref in refs if ref.ref not in recipe.steps]
    texts = [part for ref in found if ref.ref for part in (ref.ref, *ref.ref.split("+"))]
    texts += [spec.path for _, spec in _evaluation_data(recipe)]
    texts += [value.path for step in recipe.steps.values() for _, value in step.inputs if isinstance(value, DataSpec)]
    for text in dict.fromkeys(texts):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # what is no path is no file either
            if Path(text).expanduser().exists():
                yield Path(text).expanduser().resolve()


def execute(
    recipe: Recipe, settings: Settings, out: Path | None = None, *, overwrite: bool = False
) -> tuple[list[StepRun], Catalogue]:
    """Run a recipe's steps. Raises RequestError with every problem before any weight is loaded."""
    made = prepare(recipe, settings, out, overwrite=overwrite)
    if made.problems:
        raise RequestError(*made.problems)
    catalogue = made.catalogue
    finished, stale = _look_back(made)
    if stale and not overwrite:
        raise RequestError(
            *(f"{path}: {why}; pass --overwrite to replace it, or choose another out" for path, why in stale.items())
        )
    runs = []
    for step, _ in made.steps:
        if step.name in finished:
            runs.append(StepRun(step, catalogue.target(step), finished[step.name], skipped=True))
        else:
            runs.append(_run_step(step, recipe, catalogue, overwrite))
    return runs, catalogue


def _look_back(made: RunPlan) -> tuple[dict[str, dict[str, Any]], dict[Path, str]]:
    """Return the lineages of the steps that need not run, by name, and why other folders are not what they should be.

    A step need not run when its folder is intact and was made by the same step from the same inputs.
    """
    finished: dict[str, dict[str, Any]] = {}
    stale: dict[Path, str] = {}
    names = {step.name for step, _ in made.steps}
    for step, _ in made.steps:
        target = made.catalogue.target(step)
        anew = [ref.ref for ref in step.models() if ref.ref in names and ref.ref not in finished]
        if not _has_lineage(target):
            continue
        lineage = _whole_lineage(target)
        if anew:
            stale[target] = f"exists already, and {anew[0]!r}, which it was made from, is made anew"
        elif lineage is None or lineage["key"] != step_key(step, made.catalogue):
            stale[target] = "exists already, made with other parameters or inputs"
        elif _digest_of(target) != lineage["output"]["digest"]:
            stale[target] = "exists already, and was changed since it was made"
        else:
            finished[step.name] = lineage
    return finished, stale


def _has_lineage(target: Path) -> bool:
    try:
        return (target / LINEAGE).is_file()
    except OSError:  # a name too long, a folder closed to us
        return False


def _whole_lineage(target: Path) -> dict[str, Any] | None:
    """Return a folder's lineage, or None where it is not as we write it."""
    try:
        lineage = read_lineage(target)
    except RequestError:
        return None
    known = {"key", "verb", "method", "output", "notes", "seconds"}
    return lineage if lineage is not None and known <= set(lineage) and "digest" in lineage["output"] else None


def _digest_of(target: Path) -> str | None:
    try:
        return open_checkpoint(target).digest
    except RequestError:
        return None


def step_key(step: Step, catalogue: Catalogue) -> str:
    """Return a digest of everything that decides what a step makes: method, parameters, inputs' contents, seed."""
    content = {
        "verb": step.card.verb.name,
        "method": step.card.name,
        "parameters": step.card.parameters(**step.parameters).model_dump(mode="json"),
        "inputs": {
            role: catalogue.rows(value).digest if isinstance(value, DataSpec) else told
            for role, value, told in _plain_inputs(step)
        },
        "models": [(role, catalogue.identity(ref)) for role, ref in step.roles()],
        "seed": catalogue.seed,
    }
    return hashlib.sha256(dump(content).encode()).hexdigest()


def _plain_inputs(step: Step) -> Iterator[tuple[str, Any, Any]]:
    """Yield (input, its value, the value as JSON has it) of a step, models apart."""
    models = dict(step.roles())
    told = step.inputs.model_dump(mode="json")
    for role, value in step.inputs:
        if role not in models:
            yield role, value, told[role]


def _told_inputs(step: Step, catalogue: Catalogue) -> dict[str, Any]:
    """Return what a step took besides models: data by content, too."""
    found: dict[str, Any] = {}
    for role, value, told in _plain_inputs(step):
        if isinstance(value, DataSpec):
            rows = catalogue.rows(value)
            told = {**value.model_dump(mode="json", exclude_defaults=True), "rows": len(rows), "digest": rows.digest}
        found[role] = told
    return found


def _run_step(step: Step, recipe: Recipe, catalogue: Catalogue, overwrite: bool) -> StepRun:
    target = catalogue.target(step)
    engine = step.card.verb.engine()
    streams = getattr(engine, "STREAMS", False)
    key = step_key(step, catalogue) if not streams else dump(step.as_dict())
    with OutputFolder(target, key=key, overwrite=overwrite) as folder:
        started = time.perf_counter()
        catalogue.run = key
        result = engine.run(step.method, step.inputs, catalogue, folder)
        key = step_key(step, catalogue) if streams else key
        parents = [parent(role, ref.label, catalogue.behind(ref), catalogue.digest(ref)) for role, ref in step.roles()]
        existing = [found for ref in step.models() if (found := catalogue.behind(ref)) is not None]
        lineage = {
            "lfm": __version__,
            "key": key,
            "verb": step.card.verb.name,
            "method": step.card.name,
            "paper": step.card.paper,
            "parameters": step.card.parameters(**step.parameters).model_dump(mode="json"),
            "inputs": _told_inputs(step, catalogue),
            "seed": recipe.seed,
            "parents": parents,
            "ancestors": ancestors(existing),
            "output": {"digest": result.digest},
            "change": dict(result.change),
            "metrics": dict(result.metrics),
            "notes": [*step.notes, *result.notes],
            "seconds": round(time.perf_counter() - started, 3),
            "environment": environment(),
        }
        folder.write_json(LINEAGE, lineage)
        card = model_card(target.name, step.card, lineage, existing, step.as_dict())
        folder.write_text("README.md", card)
        folder.commit()
    if result.digests:
        remember_output(target, result.digests)
    return StepRun(step, target, lineage, skipped=False)
