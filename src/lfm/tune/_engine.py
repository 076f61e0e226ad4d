"""Runs any tuning method: loads the model, encodes the data, trains, saves an ordinary checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from lfm.checkpoint import OutputFolder, Spec
from lfm.data import DataSpec, Rows
from lfm.errors import RequestError
from lfm.models.anatomy import anatomy
from lfm.models.encode import IGNORE, Batch, class_names, inputs_of, targets
from lfm.models.handle import Model
from lfm.models.local import forward, load_model, save_model
from lfm.models.ref import Task
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.train import Epochs, fit
from lfm.tune._contract import Inputs, Tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def plan(method: Tune, inputs: Inputs, context: Context) -> StepPlan:
    """Return what tuning will read, write and take, and everything that speaks against it."""
    problems: list[str] = []
    for role, spec in (("data", inputs.data), ("validation", inputs.validation)):
        try:
            if spec is not None:
                context.rows(spec)
        except RequestError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    if method.patience is not None and inputs.validation is None:
        problems.append("patience needs validation data to watch; give `validation:` (for example `part: held_out`)")
    try:
        [outline] = context.outlines([inputs.model])
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    if _masked(inputs.task or outline.ref.task, outline):
        problems.append(f"{outline.ref.label}: masked language models cannot be tuned as such; give it another `task`")
    output = Outline(context.resolve(outline.ref), outline.specs, outline.config, outline.vocabulary)
    floats = sum(spec.size for spec in outline.specs.values())
    # weights, gradients and AdamW's two moments, in float32; activations come on top and are not known from headers
    return StepPlan(output, outline.nbytes, outline.nbytes, floats * 16, problems=tuple(problems))


def run(method: Tune, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Tune into `folder`."""
    rows = context.rows(inputs.data)
    model = _load(inputs, rows, context)
    examples = model.encoder.encode(rows, inputs.length, packed=True)
    validation = _validation(model, inputs, context, method.batch_size)
    groups = method.groups(model.module, anatomy(model.module))
    per_epoch = math.ceil(len(examples) / (method.batch_size * method.accumulate))
    steps = method.steps or math.ceil(method.epochs * per_epoch)
    log = fit(
        model.module,
        Epochs(examples, method.batch_size, context.seed),
        lambda module, batch: {"task": task_loss(module, batch, model.task)},
        groups,
        method,
        steps=steps,
        seed=context.seed,
        device=context.settings.device,
        resume=folder.resume,
        validate=validation,
        save_seconds=context.settings.save_seconds,
        quiet=context.settings.quiet,
    )
    log.write(folder.partial / "training.jsonl")
    dtype = inputs.dtype or _stored_dtype(inputs, context)
    digest, digests = save_model(model, folder, DTYPES.get(dtype or ""))
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    metrics = {
        "steps": float(len(log.steps)),
        "final_loss": log.steps[-1]["loss"],
        "trained_parameters": float(trained),
    }
    if log.validations:
        metrics["best_validation_loss"] = min(record["validation"] for record in log.validations)
    return StepResult(digest, digests, metrics)


def _load(inputs: Inputs, rows: Rows, context: Context) -> Model:
    return load_model(
        context.resolve(inputs.model),
        task=inputs.task,
        classes=class_names(rows) if "label" in rows.columns else None,
        new_head=inputs.new_head,
        seed=context.seed,
        device=context.settings.device,
        allow_pickle=context.settings.allow_pickle,
    )


def _masked(task: Task | None, outline: Outline) -> bool:
    """Whether this would train a masked language model on text without masks, which teaches it to copy."""
    names = (outline.config or {}).get("architectures") or ()
    return task == "masked-lm" or (task is None and any(str(name).endswith("ForMaskedLM") for name in names))


def _stored_dtype(inputs: Inputs, context: Context) -> str | None:
    """Return the type that most of the model's numbers are stored in."""
    if context.resolve(inputs.model).ref is None:
        return None
    specs = [spec for spec in context.open(inputs.model).specs.values() if spec.dtype in STORED]
    return STORED[_largest(specs)] if specs else None


def _largest(specs: list[Spec]) -> str:
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def task_loss(module: torch.nn.Module, batch: Batch, task: Task) -> torch.Tensor:
    """Return the mean cross-entropy over labels (over predicted tokens, for text)."""
    scores, labels = _scored(module, batch, task)
    return functional.cross_entropy(scores, labels)


def _scored(module: torch.nn.Module, batch: Batch, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(module.parameters()).device
    logits = forward(module, {name: value.to(device) for name, value in inputs_of(batch).items()})
    return targets(logits.float(), batch["labels"].to(device), task)


def _validation(model: Model, inputs: Inputs, context: Context, batch_size: int) -> Callable[[], float] | None:
    spec: DataSpec | None = inputs.validation
    if spec is None:
        return None
    examples = model.encoder.encode(context.rows(spec), inputs.length)
    batches = [range(start, min(start + batch_size, len(examples))) for start in range(0, len(examples), batch_size)]

    def mean_loss() -> float:
        """Return the mean over all labels, however they fall into batches."""
        total = count = 0.0
        with torch.no_grad():
            for batch in batches:
                scores, labels = _scored(model.module, examples.batch(batch), model.task)
                total += float(functional.cross_entropy(scores, labels, reduction="sum"))
                count += int((labels != IGNORE).sum())
        return total / count

    return mean_loss


__all__ = ["plan", "run", "task_loss"]
