"""Plans edits, measures before and after, and writes the edited model with its patches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lfm.checkpoint import Checkpoint, Delta, OutputFolder, Patched
from lfm.data.requests import Request, requests_of
from lfm.edit._contract import Edit, Guard, Inputs, LeastSquares, Tuned
from lfm.edit._guard import COMPARED, HEAT_MAPS, RETENTION, Watch, conflicts, heat_map
from lfm.edit._least_squares import Editor, Update, contexts_of, layers_of
from lfm.edit._score import Drift, Said, listen, metrics, records
from lfm.edit._statistics import Statistics, statistics
from lfm.errors import LfmError, RequestError
from lfm.method import Access
from lfm.models.anatomy import anatomy
from lfm.models.handle import Model
from lfm.models.local import load_model
from lfm.models.ref import ModelRef
from lfm.progress import Progress
from lfm.recipe.patches import MANIFEST, absent, edited_of, stack, write_edited
from lfm.recipe.step import Context, Outline, StepPlan, StepResult

EDITS = "edits.jsonl"  # what it said before and after, edit by edit


def plan(method: Edit, inputs: Inputs, context: Context) -> StepPlan:
    """Return what editing will read, write and take, and everything that speaks against it."""
    problems: list[str] = []
    requests: list[Request] = []
    try:
        requests = requests_of(context.rows(inputs.requests))
    except RequestError as error:
        problems += [f"requests: {problem}" for problem in error.problems]
    try:
        if inputs.text is not None:
            context.rows(inputs.text)
    except RequestError as error:
        problems += [f"text: {problem}" for problem in error.problems]
    try:
        [outline] = context.outlines([inputs.model])
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    if outline.access < Access.WEIGHTS or outline.ref.is_endpoint:
        problems.append(f"{outline.ref.label}: its weights are edited, and it offers none")
    earlier, more = _earlier(inputs, context) if outline.specs and not problems else ((), [])
    problems += more
    output = Outline(context.resolve(outline.ref), outline.specs, outline.config, outline.vocabulary)
    floats = sum(spec.size for spec in outline.specs.values())
    notes = tuple(conflicts(requests, earlier, None))
    return StepPlan(output, outline.nbytes * 2, outline.nbytes, floats * 8, problems=tuple(problems), notes=notes)


def _earlier(inputs: Inputs, context: Context) -> tuple[tuple[Delta, ...], list[str]]:
    """Return the patches that lie on the model already, and what speaks against more of them."""
    place = context.resolve(inputs.model).ref
    if place is None or not (Path(place).expanduser() / MANIFEST).is_file():
        return (), []  # or a step will make it
    try:
        edited = edited_of(context.open(inputs.model))
        return ((), []) if edited is None else (edited.patches, absent(edited, _place(inputs.base, context)))
    except RequestError as error:
        return (), list(error.problems)


def run(method: Edit, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Edit into `folder`."""
    settings = context.settings
    requests = requests_of(context.rows(inputs.requests))
    checkpoint = context.open(inputs.model)
    below, earlier = stack(checkpoint, _place(inputs.base, context), allow_pickle=settings.allow_pickle)
    model = load_model(context.resolve(inputs.model), device=settings.device, allow_pickle=settings.allow_pickle)
    if model.task != "causal-lm":
        raise RequestError(f"{model.label}: is made for {model.task}; edits are made to language models")
    before, drift = listen(model, requests), Drift(model, context.seed)
    updates = _updates(method, inputs, context, model, requests, checkpoint.digest)
    watch = _watch(inputs, model, updates.several, checkpoint, context.seed)
    notes = [*_unnamed(requests), *conflicts(requests, earlier, updates.overlap)]
    made = list(_kept(updates, watch, len(requests), settings.quiet))
    deltas = [_delta(update, below, method, model) for update in made]
    patched = Patched(below.weights, (*earlier, *deltas))
    _reload(model, patched, made, below)
    after = listen(model, requests)
    facts = {"edits": float(len(requests)), **metrics(before, after), **updates.facts}
    moved = drift.now(model)
    facts |= {} if moved is None else {"kl_drift": moved}
    facts["largest_loss"] = max((loss for update in made for loss in update.losses), default=0.0)
    deltas = [_scored(delta, update, requests, before, after) for delta, update in zip(deltas, made, strict=True)]
    digest, digests = write_edited(below, [*earlier, *deltas], folder, like=checkpoint)
    lines = [json.dumps(record, ensure_ascii=False) for record in records(requests, before, after)]
    folder.write_text(EDITS, "\n".join(lines) + "\n")
    if watch is not None:
        folder.write_text(RETENTION, watch.as_json())
        folder.write_json(HEAT_MAPS, [heat_map(watch.log)])
        facts, notes = facts | watch.metrics(), [*notes, *watch.notes()]
    return StepResult(digest, digests, facts, tuple(notes))


def _place(base: ModelRef | None, context: Context) -> str | None:
    return None if base is None else str(context.resolve(base).ref)


def _unnamed(requests: Sequence[Request]) -> list[str]:
    count = sum(request.subject is None for request in requests)
    return [f"no subject in {count} requests; the last token of the prompt stands for it"] if count else []


@dataclass(frozen=True)
class _Updates:
    """Updates that are made one after the other, and what is known before the first of them."""

    made: Iterator[Update]
    several: bool
    overlap: torch.Tensor | None = None
    facts: dict[str, float] = field(default_factory=dict)
    editor: Editor | None = None


def _updates(
    method: Edit, inputs: Inputs, context: Context, model: Model, requests: Sequence[Request], digest: str
) -> _Updates:
    if isinstance(method, Tuned):
        from lfm.edit._tuning import tune

        several = inputs.batch is not None and inputs.batch < len(requests)
        return _Updates(tune(method, model, requests, inputs.batch, context.seed), several)
    if not isinstance(method, LeastSquares):
        raise AssertionError(f"{type(method).__name__} is no way to edit")
    editor, facts = _editor(method, inputs, context, model, digest)
    size = inputs.batch or type(method).at_once or len(requests)
    parts = (requests[start : start + size] for start in range(0, len(requests), size))
    overlap = editor.overlap(requests) if len(requests) <= COMPARED else None
    return _Updates(map(editor.update, parts), size < len(requests), overlap, facts, editor)


def _editor(
    method: LeastSquares, inputs: Inputs, context: Context, model: Model, digest: str
) -> tuple[Editor, dict[str, float]]:
    layers = layers_of(method, model)
    known: Statistics | None = None
    facts: dict[str, float] = {}
    if inputs.statistics == "text":
        texts = None if inputs.text is None else _given_text(model, inputs, context)
        names = [layer.out.name for layer in layers]
        known = statistics(model, names, inputs.tokens, digest=digest, seed=context.seed, texts=texts)
        facts = {"statistics_tokens": float(known.tokens), "effective_rank": known.effective_rank(names[-1])}
    return Editor(method, model, layers, known, contexts_of(model, method.contexts, context.seed)), facts


def _watch(inputs: Inputs, model: Model, several: bool, checkpoint: Checkpoint, seed: int) -> Watch | None:
    """Return the guard, if one is asked for; of several updates one is kept unless it is said not to."""
    guard = inputs.guard or Guard(mode="refuse" if several else "off")
    if guard.mode == "off":
        return None
    return Watch(guard, model, lambda name: checkpoint.tensor(_on_disk(name, checkpoint)), seed)


def _kept(updates: _Updates, watch: Watch | None, count: int, quiet: bool) -> Iterator[Update]:
    """Make updates and yield those that count."""
    editor = updates.editor
    with Progress("edit", count, quiet) as progress:
        remembered = editor.remembered() if editor is not None and watch is not None else {}
        for update in updates.made:
            found = update if watch is None else watch.judge(update)
            progress.advance(len(update.requests))
            if editor is not None and watch is not None:
                if found is None:
                    editor.forget(remembered)
                remembered = editor.remembered()
            if found is not None:
                yield found


def _given_text(model: Model, inputs: Inputs, context: Context) -> list[torch.Tensor]:
    if inputs.text is None:
        return []
    examples = model.encoder.encode(context.rows(inputs.text), 128)
    batches = (examples.batch([index]) for index in range(len(examples)))
    return [batch["input_ids"][0] for batch in batches]


def _delta(update: Update, base: Checkpoint, method: Edit, model: Model) -> Delta:
    """Return an update as a patch of the base, its tensors called as they are there."""
    changes = {_on_disk(name, base): change for name, change in update.changes.items()}
    parts = {part.weight: part for block in anatomy(model.module).blocks for part in block.parts}
    told = {
        "method": type(method).__name__,
        "parameters": method.model_dump(mode="json"),
        "base_ref": base.ref,
        "modules": {
            _on_disk(name, base): {"parameter": name, "transposed": parts[name].transposed}
            for name in update.changes
            if name in parts
        },
        "requests": [
            {"id": one.id, "prompt": one.prompt, "target": one.target, "subject": one.subject, "old": one.old}
            for one in update.requests
        ],
        "losses": list(update.losses),
    }
    return Delta(changes, base.digest, told)


def _scored(
    delta: Delta, update: Update, requests: Sequence[Request], before: Sequence[Said], after: Sequence[Said]
) -> Delta:
    """Return a patch that says how its own edits do, with all others made and everything rounded."""
    mine = {request.id for request in update.requests}
    rows = [index for index, request in enumerate(requests) if request.id in mine]
    scores = metrics([before[row] for row in rows], [after[row] for row in rows])
    return replace(delta, provenance={**delta.provenance, "scores": scores})


def _on_disk(name: str, checkpoint: Checkpoint) -> str:
    """Return what a checkpoint calls a parameter: it may leave out a prefix, or have one more."""
    found = [other for other in checkpoint.specs if name == other or f".{name}".endswith(f".{other}")]
    found = found or [other for other in checkpoint.specs if f".{other}".endswith(f".{name}")]
    if len(found) != 1:
        raise LfmError(f"the matrix {name!r} is not to be found in {checkpoint.ref}")
    return found[0]


def _reload(model: Model, patched: Patched, made: Sequence[Update], base: Checkpoint) -> None:
    """Put the matrices as they will be saved, rounded to the checkpoint's type, into the module."""
    with torch.no_grad():
        for name in {name for update in made for name in update.changes}:
            model.module.get_parameter(name).copy_(patched.tensor(_on_disk(name, base)))


__all__ = ["plan", "run"]
