"""Joins models into one handle, learns how from held-out examples, and writes down what it is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_state
from safetensors.torch import save as save_state

from lfm.checkpoint import STATE, OutputFolder, manifest_digest, open_checkpoint
from lfm.errors import AccessError, RequestError, plural
from lfm.method import Access, Method, methods_of, number_of_models
from lfm.models.handle import Backend, Model
from lfm.models.open import Around, made_of_others, open_in
from lfm.models.ref import ModelRef
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.reuse.ensemble._contract import (
    Ensemble,
    Inputs,
    JointEnsemble,
    State,
    TextEnsemble,
    TrainedEnsemble,
    TunedEnsemble,
)
from lfm.reuse.ensemble._joined import Joined
from lfm.reuse.ensemble._learning import Learned, from_data, from_own_text, from_prompts, prompts_of
from lfm.reuse.ensemble._members import MEMBERS
from lfm.reuse.ensemble._trained import request_problems, several_in_one, size_of, train
from lfm.reuse.ensemble.average import Average

FORMAT = 1
CURVE = "curve.json"
NOTHING_WRITTEN = (
    "`calibrate` takes labelled `data` that no member was trained on: classifiers, unlike language models, write "
    "nothing that they could be calibrated by"
)
Joining = Ensemble | TextEnsemble | TunedEnsemble | TrainedEnsemble


# --- planning -------------------------------------------------------------------------------------------------------


def plan(method: Joining, inputs: Inputs, context: Context) -> StepPlan:
    """Return what an ensemble is made of, and everything that speaks against it."""
    problems = _request_problems(method, inputs)
    rows = None
    if inputs.data is not None:
        try:
            rows = context.rows(inputs.data)
            if isinstance(method, TextEnsemble) and method.measures:
                prompts_of(rows)
        except RequestError as error:
            problems += [f"data: {problem}" for problem in error.problems]
    if isinstance(method, TrainedEnsemble):
        problems += request_problems(method, inputs, rows)
    try:
        outlines = context.outlines(_all_models(inputs))
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    if not inputs.models:
        raise RequestError(*problems)
    if isinstance(method, (Ensemble, TextEnsemble)):
        last = outlines[-len(inputs.models) :]
        offered = [_offered(ref, outline, context) for ref, outline in zip(inputs.models, last, strict=True)]
        problems += [*method.problems(offered), *_own_text_problems(method, inputs, outlines[0])]
    if inputs.copy_members and not isinstance(method, TrainedEnsemble):
        problems += _copy_problems([context.resolve(ref) for ref in _all_models(inputs)])
    nbytes = sum(outline.nbytes for outline in outlines)
    output = Outline(context.resolve(inputs.models[0]), {}, outlines[0].config, access=Access.PROBS)
    if isinstance(method, TrainedEnsemble):
        return StepPlan(output, nbytes, *size_of(method, outlines[0]), problems=tuple(problems))
    writes = nbytes if inputs.copy_members else 0
    return StepPlan(output, nbytes, writes, 2 * nbytes, problems=tuple(problems))


def _all_models(inputs: Inputs) -> list[ModelRef]:
    """Return the base, where there is one, and the members: the order that a manifest keeps."""
    return [*filter(None, [inputs.base]), *inputs.models]


def _copy_problems(refs: Sequence[ModelRef]) -> Iterator[str]:
    """Yield what keeps a folder from holding all that its members need."""
    for ref in refs:
        folder = made_of_others(ref)
        if ref.is_endpoint:
            yield f"{ref.label}: an endpoint cannot be copied; leave out copy_members"
        elif ref.ref and "+" in ref.ref and not Path(ref.ref).expanduser().exists():
            yield f"{ref.label}: cannot be copied in two parts; merge the adapter in first (lfm merge passthrough)"
        elif ref.module is not None and ".py:" in ref.module:
            yield f"{ref.label}: its code, {ref.module}, is not copied; put it into a package"
        elif folder is not None and not (folder / MEMBERS).is_dir():
            yield f"{ref.label}: its own members lie elsewhere; make it with copy_members, too"


def _request_problems(method: Joining, inputs: Inputs) -> list[str]:
    name, (low, high), got = type(method).__name__, method.needs.sources, len(inputs.models)
    problems = []
    if got < low or (high is not None and got > high):
        problems.append(f"{name} takes {number_of_models(low, high)}, got {got}")
    weights = inputs.weights
    if weights is not None and not method.weighted:
        problems.append(f"{name} takes no weights")
    elif weights is not None and len(weights) != got:
        problems.append(f"{plural(got, 'model')} and {plural(len(weights), 'weight')}: give one weight for each model")
    elif weights is not None and not (min(weights) >= 0 and sum(weights) > 0):
        problems.append(f"weights must be 0 or more, and one of them above 0, got {weights}")
    if inputs.base is None and method.needs.base:
        problems.append(f"{name} needs a base (--base), the model that the members were tuned from")
    if inputs.base is not None and not method.needs.base:
        problems.append(f"{name} does not use a base")
    if isinstance(method, TunedEnsemble) and (inputs.data is not None or inputs.calibrate != "no"):
        return [*problems, f"{name} learns nothing here, and takes neither `data` nor `calibrate`"]
    if isinstance(method, (Ensemble, TextEnsemble)):
        problems += _learning_problems(method, inputs)
    return problems


def _offered(ref: ModelRef, outline: Outline, context: Context) -> tuple[str, Access]:
    """Return a member's name with what it offers."""
    return ref.label, min(outline.access, context.resolve(ref).offers)


def _learning_problems(method: Ensemble | TextEnsemble, inputs: Inputs) -> Iterator[str]:
    """Yield what keeps a method from learning as asked."""
    name = type(method).__name__
    if isinstance(method, TextEnsemble):
        if inputs.calibrate != "no":
            yield f"{name} joins texts, which have no temperature; leave out `calibrate`"
        if inputs.data is not None and not method.measures:
            yield f"{name} learns nothing from examples; leave out `data`"
    elif inputs.data is not None:
        return
    elif method.learns:
        yield f"{name} learns from examples here; give `data` that no member was trained on"
    elif inputs.calibrate == "members":
        yield "`calibrate: members` takes `data`: by its own text alone, every model has a temperature of 1"
    elif inputs.calibrate == "ensemble" and not method.writes:
        yield NOTHING_WRITTEN


def _own_text_problems(method: Ensemble | TextEnsemble, inputs: Inputs, first: Outline) -> Iterator[str]:
    """Refuse to calibrate classifiers by text of their own, as far as reference and config of the first tell."""
    names = (first.config or {}).get("architectures") or ()
    classifies = first.ref.image is not None or any(str(name).endswith("Classification") for name in names)
    writes = isinstance(method, Ensemble) and method.writes
    if inputs.calibrate == "ensemble" and inputs.data is None and writes and classifies:
        yield NOTHING_WRITTEN


# --- making one -----------------------------------------------------------------------------------------------------


def run(method: Joining, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Write an ensemble into `folder`."""
    if isinstance(method, TrainedEnsemble):
        made = train(method, inputs, context, folder)
        equal = [1.0] * len(made.members)
        return StepResult(_written(method, equal, made.members, made.state, folder), metrics=made.metrics)
    refs = [context.resolve(ref) for ref in _all_models(inputs)]
    members = [_opened(method, ref, context) for ref in refs]
    even = 1 / len(inputs.models) if isinstance(method, TunedEnsemble) else 1.0  # these are not made to sum to 1
    weights = tuple(inputs.weights or [even] * len(inputs.models))
    state: State = {}
    backend = _joined(method, members, weights, state)
    learned = Learned()
    if isinstance(backend, Joined) and inputs.data is not None:
        examples = backend.encoder.encode(context.rows(inputs.data), inputs.length)
        learned = from_data(backend, examples, inputs.calibrate)
    elif isinstance(backend, Joined) and inputs.calibrate != "no":
        learned = from_own_text(backend, inputs.length, context.seed)
    elif isinstance(method, TextEnsemble) and inputs.data is not None:
        learned = from_prompts(method, members, context.rows(inputs.data))
    metrics = dict(learned.metrics)
    if learned.curve is not None:
        folder.write_json(CURVE, learned.curve.as_dict(_names(inputs.models)))
        metrics.update(learned.curve.metrics(_names(inputs.models)))
    entries = [_entry(ref, index, inputs, folder) for index, ref in enumerate(refs)]
    return StepResult(_written(method, weights, entries, state, folder), metrics=metrics)


def _names(refs: Sequence[ModelRef]) -> list[str]:
    """Return a name for each member; one that is there before gets its place behind it."""
    labels = [ref.label for ref in refs]
    return [f"{label} ({i + 1})" if label in labels[:i] else label for i, label in enumerate(labels)]


def _written(
    method: Joining, weights: Sequence[float], members: list[dict[str, Any]], state: State, folder: OutputFolder
) -> str:
    """Write what an ensemble is made of; returns its digest."""
    manifest: dict[str, Any] = {
        "lfm": FORMAT,
        "verb": "ensemble",
        "method": _name_of(method),
        "parameters": method.model_dump(mode="json"),
        "weights": list(weights),
        "members": members,
    }
    raw = save_state({name: value.contiguous() for name, value in state.items()}) if state else b""
    if raw:
        (folder.partial / STATE).write_bytes(raw)
    folder.write_json("lfm.json", manifest)
    return manifest_digest(manifest, raw)


def _opened(method: Method, ref: ModelRef, around: Around) -> Model:
    """Open a member as far as it is used: what the method needs, more for what is written token by token."""
    needed = method.needs.access
    if made_of_others(ref) is None:
        return open_in(around, ref, access=max(needed, min(ref.offers, Access.PROBS)))
    model = open_in(around, ref)  # of what it is made says how much it offers
    if model.access < needed:
        raise AccessError(
            f"{ref.label}: offers {model.access.name.lower()}, and {_name_of(method)} needs {needed.name.lower()}"
        )
    return model.restrict(max(needed, Access.PROBS))


def _name_of(method: Method) -> str:
    return next(name for name, card in methods_of("ensemble").items() if card.module == type(method).__module__)


def _entry(ref: ModelRef, index: int, inputs: Inputs, folder: OutputFolder) -> dict[str, Any]:
    """Return what the manifest says of a member: where it is, as seen from the folder, and what it has to be."""
    told = ref.model_dump(mode="json", exclude_defaults=True)
    if ref.is_endpoint:
        return told
    checkpoint = open_checkpoint(str(ref.ref))
    place = checkpoint.folder
    if inputs.copy_members:
        inside = Path(MEMBERS) / f"{index}-{place.name}"
        one = Path(str(ref.ref)).expanduser()
        wanted = [one] if one.is_file() else [file for file in place.rglob("*") if file.is_file()]
        folder.copy({str(inside / file.relative_to(place)): file for file in wanted})
        told["ref"] = str(inside / one.name if one.is_file() else inside)
    elif "+" not in str(ref.ref) and Path(str(ref.ref)).expanduser().exists():
        here, there = folder.out.absolute(), Path(str(ref.ref)).expanduser().absolute()
        beside = there.is_relative_to(here.parent)
        told["ref"] = os.path.relpath(there, here) if beside else str(there)
    return {**told, "digest": checkpoint.digest}


# --- using one ------------------------------------------------------------------------------------------------------


def load(manifest: Mapping[str, Any], folder: Path, around: Around) -> Model:
    """Return a handle on an ensemble that `run` wrote. Raises RequestError where a member is not what it was."""
    if manifest.get("lfm") != FORMAT or manifest.get("method") not in methods_of("ensemble"):
        raise RequestError(f"{folder / 'lfm.json'}: written by another version of lfm ({manifest.get('method')!r})")
    method = methods_of("ensemble")[manifest["method"]].load()(**manifest["parameters"])
    problems: list[str] = []
    members = [model for entry in manifest["members"] if (model := _member(entry, method, folder, around, problems))]
    if problems:
        raise RequestError(*problems)
    path = folder / STATE
    state: State = load_state(path.read_bytes()) if path.is_file() else {}
    weights = tuple(manifest["weights"])
    if not isinstance(method, Joining):
        raise AssertionError(f"{type(method).__name__} is no ensemble")
    backend = _joined(method, members, weights, state)
    encoder = backend.encoder if isinstance(backend, Joined) else members[0].encoder
    return Model(backend, min(backend.offers, Access.PROBS), members[0].task, encoder, str(folder))


def _joined(method: Joining, members: Sequence[Model], weights: Sequence[float], state: State) -> Joined | Backend:
    """Return what answers in the name of all members. Raises RequestError where they do not go together."""
    if isinstance(method, TunedEnsemble):
        base, *tuned = members
        return method.backend(base, tuned, weights)
    if isinstance(method, TextEnsemble):
        return method.backend(members, weights)
    if isinstance(method, JointEnsemble):
        return several_in_one(method, members[0], state)
    if isinstance(method, TrainedEnsemble):
        return Joined(Average(), members, weights, state)
    return Joined(method, members, weights, state)


def _member(
    entry: Mapping[str, Any], method: Method, folder: Path, around: Around, problems: list[str]
) -> Model | None:
    """Open a member, or say what became of it."""
    told = {key: value for key, value in entry.items() if key != "digest"}
    inside = folder / str(told.get("ref"))
    if inside.exists():
        told["ref"] = str(inside)
    try:
        ref = ModelRef.model_validate(told)
        if "digest" in entry and open_checkpoint(str(ref.ref)).digest != entry["digest"]:
            raise RequestError(f"{ref.label}: is not what it was when {folder} was made; make the ensemble again")
        return _opened(method, ref, around)
    except RequestError as error:
        problems += error.problems
        return None


__all__ = ["load", "plan", "run"]
