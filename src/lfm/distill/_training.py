"""What all ways to distill do alike: train the student where the step runs, and write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfm.checkpoint import OutputFolder
from lfm.distill._contract import Inputs
from lfm.models.handle import Model
from lfm.models.local import save_model
from lfm.recipe.step import Context, StepResult
from lfm.train import Log, Loss, Optimised, Source, fit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train(
    module: nn.Module,
    source: Source,
    loss: Loss,
    method: Optimised,
    steps: int,
    context: Context,
    resume: Path,
    *,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    visit: Callable[[int], None] | None = None,
) -> Log:
    """Train a module in place, with the settings of the step around; `seed` is added to that of the step."""
    settings = context.settings
    return fit(
        module,
        source,
        loss,
        parameter_groups(module, method.learning_rate, method.weight_decay),
        method,
        steps=steps,
        seed=context.seed + seed,
        device=settings.device,
        resume=resume,
        validate=validate,
        visit=visit,
        save_seconds=settings.save_seconds,
        quiet=settings.quiet,
    )


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[Mapping[str, Any]]:
    """Return groups for AdamW: biases and norms do not decay."""
    own = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = (([p for p in own if p.ndim > 1], weight_decay), ([p for p in own if p.ndim <= 1], 0.0))
    return [{"params": params, "lr": learning_rate, "weight_decay": decay} for params, decay in groups if params]


def finish(
    student: Model,
    log: Log,
    inputs: Inputs,
    folder: OutputFolder,
    notes: Sequence[str] = (),
    facts: Mapping[str, float] | None = None,
) -> StepResult:
    """Write the student and the log of its training; `facts` are metrics besides those of the training."""
    log.write(folder.partial / "training.jsonl")
    digest, digests = save_model(student, folder, DTYPES.get(inputs.dtype or ""))
    metrics = {"steps": float(len(log.steps)), "final_loss": log.steps[-1]["loss"]}
    if log.validations:
        metrics["best_validation_loss"] = min(record["validation"] for record in log.validations)
    return StepResult(digest, digests, {**metrics, **(facts or {})}, notes=tuple(notes))
