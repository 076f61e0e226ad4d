"""Trains one model into an ensemble; members are written as checkpoints of their own, at the steps that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lfm.checkpoint import OutputFolder, open_checkpoint
from lfm.data import Rows
from lfm.errors import RequestError
from lfm.models.encode import Batch, class_names, inputs_of, targets
from lfm.models.handle import Model
from lfm.models.local import forward, save_model
from lfm.models.open import open_in
from lfm.models.ref import ModelRef, Task
from lfm.recipe.step import Context, Outline
from lfm.reuse.ensemble._contract import Inputs, JointEnsemble, State, TrainedEnsemble
from lfm.reuse.ensemble._members import MEMBERS
from lfm.reuse.ensemble._rank_one import RankOne, RankOneBackend, layers_of, owners_of, repeated
from lfm.train import Epochs, Log, fit


def request_problems(method: TrainedEnsemble, inputs: Inputs, rows: Rows | None) -> Iterator[str]:
    """Yield what speaks against a run before a model is loaded."""
    name = type(method).__name__
    if inputs.data is None:
        yield f"{name} trains a model; give labelled examples as `data`"
    if inputs.calibrate != "no":
        yield (
            f"{name} knows all of `data` by the time it could calibrate; leave out `calibrate`, and calibrate what "
            "comes out on other examples: `ensemble average` of it alone"
        )
    if inputs.copy_members:
        yield f"{name}: its members lie in the output anyway; leave out copy_members"
    if isinstance(method, JointEnsemble) and method.batches == "divided" and method.batch_size < method.members:
        yield (
            f"{name}: a batch of {method.batch_size} cannot be divided over {method.members} members; "
            "raise batch_size, or set `batches: repeated`"
        )
    if method.steps is not None or (rows is not None and "label" in rows.columns):
        yield from _too_few(method, _steps(method, len(rows) if rows is not None else 1))


def _steps(method: TrainedEnsemble, examples: int) -> int:
    per_epoch = math.ceil(examples / (method.batch_size * method.accumulate))
    return method.steps or math.ceil(method.epochs * per_epoch)


def _too_few(method: TrainedEnsemble, steps: int) -> Iterator[str]:
    if steps < method.fewest:
        yield (
            f"{type(method).__name__} takes {method.fewest} steps at least, as it is set up, and this is a run of "
            f"{steps}; give more `epochs` (or `steps`), or ask for fewer members"
        )


def size_of(method: TrainedEnsemble, outline: Outline) -> tuple[int, int]:
    """Return the bytes that a run writes, and those that weights, gradients and AdamW's moments take in float32."""
    floats = sum(spec.size for spec in outline.specs.values())
    return 4 * floats * len(method.course(method.fewest).kept), 16 * floats


@dataclass(frozen=True)
class Made:
    """What a run came by: what the manifest says of each member, what they share, what is worth telling."""

    members: list[dict[str, Any]]
    state: State
    metrics: dict[str, float]


def train(method: TrainedEnsemble, inputs: Inputs, context: Context, folder: OutputFolder) -> Made:
    """Train into `folder`; killed at any moment, the same run goes on to the same bits."""
    assert inputs.data is not None
    rows = context.rows(inputs.data)
    ref = context.resolve(inputs.models[0])
    model = open_in(context, ref, classes=class_names(rows) if "label" in rows.columns else None)
    _check_task(method, model)
    examples = model.encoder.encode(rows, inputs.length, packed=True)
    problems = list(_too_few(method, _steps(method, len(examples))))
    if problems:
        raise RequestError(*problems)
    course = method.course(_steps(method, len(examples)))
    several = _several(method, model, examples.batch(range(min(3, len(examples)))), context.seed)
    trained = model.module if several is None else several
    groups = _groups(method, trained)
    places = {step: folder.resume / MEMBERS / str(number) for number, step in enumerate(course.kept, 1)}

    def visit(step: int) -> None:
        if step in places:
            _keep(model, places[step])

    log = fit(
        trained,
        Epochs(examples, method.batch_size, context.seed),
        _loss(method, model.task),
        groups,
        method,
        steps=course.steps,
        seed=context.seed,
        device=context.settings.device,
        resume=folder.resume / "training",
        rate=course.rate,
        visit=visit,
        save_seconds=context.settings.save_seconds,
        quiet=context.settings.quiet,
    )
    log.write(folder.partial / "training.jsonl")
    entries = [_entry(ref, place, folder) for place in places.values()]
    state = {} if several is None else {name: value.cpu() for name, value in several.vectors.items()}
    count = method.members if isinstance(method, JointEnsemble) else len(entries)
    return Made(entries, state, _metrics(log, groups, count))


def _check_task(method: TrainedEnsemble, model: Model) -> None:
    name, joint = type(method).__name__, isinstance(method, JointEnsemble)
    if joint and not model.task.endswith("classification"):
        raise RequestError(f"{model.label}: {name} trains classifiers, and this is a {model.task} model")
    if model.task == "masked-lm":
        raise RequestError(f"{model.label}: masked language models cannot be trained as such; give it another `task`")


def _several(method: TrainedEnsemble, model: Model, batch: Batch, seed: int) -> RankOne | None:
    """Return all members in one module, where they are trained at once."""
    if not isinstance(method, JointEnsemble):
        return None
    device = next(model.module.parameters()).device
    layers = layers_of(model.module, {name: value.to(device) for name, value in batch.items()})
    vectors = method.draw(layers, torch.Generator().manual_seed(seed))
    return RankOne(model.module, {name: value.to(device) for name, value in vectors.items()})


def _groups(method: TrainedEnsemble, module: nn.Module) -> list[Mapping[str, Any]]:
    """Return AdamW's groups: matrices decay, biases, norms and what members have of their own do not."""
    own = module.own if isinstance(module, RankOne) else []
    shared = module.module if isinstance(module, RankOne) else module
    groups: list[Mapping[str, Any]] = [
        {
            "params": [weight],
            "lr": method.learning_rate,
            "weight_decay": method.weight_decay if weight.ndim > 1 else 0.0,
        }
        for weight in shared.parameters()
        if weight.requires_grad
    ]
    if isinstance(method, JointEnsemble):
        groups.append({"params": own, "lr": method.learning_rate * method.factor_rate, "weight_decay": 0.0})
    return groups


def _loss(method: TrainedEnsemble, task: Task) -> Callable[[nn.Module, Batch], dict[str, torch.Tensor]]:
    """Return the mean cross-entropy over labels (over predicted tokens, for text), of all members alike."""

    def loss(module: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        device = next(module.parameters()).device
        moved = {name: value.to(device) for name, value in batch.items()}
        inputs, labels = inputs_of(moved), moved["labels"]
        if isinstance(method, JointEnsemble):
            all_of_it = method.batches == "repeated"
            owners = owners_of(method.members, len(labels), repeated=all_of_it, device=device)
            times = method.members if all_of_it else 1
            logits, labels = module(repeated(inputs, times), owners), labels.repeat(times)
        else:
            logits = forward(module, inputs)
        return {"task": functional.cross_entropy(*targets(logits.float(), labels, task))}

    return loss


def _keep(model: Model, place: Path) -> None:
    """Write a model as it is now, as a whole or not at all. What lies there already has the same bits."""
    if not place.is_dir():
        with OutputFolder(place, key=place.name) as folder:
            save_model(model, folder, None)
            folder.commit()


def _entry(ref: ModelRef, place: Path, folder: OutputFolder) -> dict[str, Any]:
    """Copy a member into the output, and return what the manifest says of it."""
    inside = Path(MEMBERS) / place.name  # copied and not moved: a run that is killed here begins with what is kept
    folder.copy({str(inside / file.relative_to(place)): file for file in place.rglob("*") if file.is_file()})
    told = ref.model_dump(mode="json", exclude_defaults=True, exclude={"config", "tokenizer", "access"})
    return {**told, "ref": str(inside), "digest": open_checkpoint(place).digest}


def _metrics(log: Log, groups: Sequence[Mapping[str, Any]], members: int) -> dict[str, float]:
    return {
        "steps": float(len(log.steps)),
        "final_loss": log.steps[-1]["loss"],
        "trained_parameters": float(sum(weight.numel() for group in groups for weight in group["params"])),
        "members": float(members),
    }


def several_in_one(method: JointEnsemble, shared: Model, state: State) -> RankOneBackend:
    """Return what answers in the name of all members that share these weights."""
    device = next(shared.module.parameters()).device
    module = RankOne(shared.module, {name: value.to(device) for name, value in state.items()})
    return RankOneBackend(module, method.members)
