"""Learning on data: teacher and student see the same examples, each as it reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lfm.checkpoint import OutputFolder
from lfm.data import Rows
from lfm.distill._contract import Inputs, Matching, Said, Taught
from lfm.distill._students import load_student, places_of_classes
from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import IGNORE, Batch, Examples, inputs_of, targets
from lfm.models.handle import Model
from lfm.models.local import forward, save_model
from lfm.models.open import open_in
from lfm.recipe.step import Context, StepResult
from lfm.train import Epochs, Log, fit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEACHER = "teacher"  # of a batch: the same examples as the teacher reads them


def learn_on_data(method: Matching, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Teach a student on data, into `folder`."""
    if inputs.data is None:
        raise AssertionError("the plan lets nothing run without data")
    rows = context.rows(inputs.data)
    teacher = open_in(context, inputs.teacher, access=type(method).needs.access)
    student = load_student(inputs, teacher, context)
    pair = Pair(method, teacher, student)
    examples = Paired.of(rows, teacher, student, inputs.length)
    per_epoch = math.ceil(len(examples) / (method.batch_size * method.accumulate))
    steps = method.steps or math.ceil(method.epochs * per_epoch)
    log = fit(
        student.module,
        Epochs(examples, method.batch_size, context.seed),
        lambda module, batch: method.terms(pair.taught(module, batch)),
        parameter_groups(student.module, method.learning_rate, method.weight_decay),
        method,
        steps=steps,
        seed=context.seed,
        device=context.settings.device,
        resume=folder.resume,
        validate=_validation(method, pair, inputs, context),
        save_seconds=context.settings.save_seconds,
        quiet=context.settings.quiet,
    )
    return finish(student, log, inputs, folder)


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[Mapping[str, Any]]:
    """Return groups for AdamW: biases and norms do not decay."""
    own = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = (([p for p in own if p.ndim > 1], weight_decay), ([p for p in own if p.ndim <= 1], 0.0))
    return [{"params": params, "lr": learning_rate, "weight_decay": decay} for params, decay in groups if params]


def finish(student: Model, log: Log, inputs: Inputs, folder: OutputFolder, notes: Sequence[str] = ()) -> StepResult:
    """Write the student and the log of its training."""
    log.write(folder.partial / "training.jsonl")
    digest, digests = save_model(student, folder, DTYPES.get(inputs.dtype or ""))
    metrics = {"steps": float(len(log.steps)), "final_loss": log.steps[-1]["loss"]}
    if log.validations:
        metrics["best_validation_loss"] = min(record["validation"] for record in log.validations)
    return StepResult(digest, digests, metrics, notes=tuple(notes))


# --- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired(Examples):
    """Examples as the student reads them, and beside them as the teacher does, where it reads in another way."""

    student: Examples
    teacher: Examples | None
    labelled: bool

    @classmethod
    def of(cls, rows: Rows, teacher: Model, student: Model, length: int) -> Paired:
        """Encode rows for both. Raises RequestError for rows that do not fit a model's task."""
        labelled = student.task == "causal-lm" or "label" in rows.columns
        own = student.encoder.encode(rows, length, packed=True, labelled=labelled)
        if _reads_alike(teacher, student):
            return cls(own, None, labelled)
        theirs = teacher.encoder.encode(rows, length, packed=True, labelled=False)
        if len(theirs) != len(own):
            raise RequestError(f"{rows.origin}: teacher and student cut it into {len(theirs)} and {len(own)} examples")
        return cls(own, theirs, labelled)

    def __len__(self) -> int:
        return len(self.student)

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.student.batch(indices)
        return batch if self.teacher is None else {**batch, TEACHER: self.teacher.batch(indices)}


def _reads_alike(teacher: Model, student: Model) -> bool:
    one, other = teacher.encoder, student.encoder
    if type(one) is not type(other):
        return False
    if one.tokenizer is None or other.tokenizer is None:
        return one.tokenizer is other.tokenizer and one.image == other.image
    return bool(one.tokenizer.get_vocab() == other.tokenizer.get_vocab() and one.pad == other.pad)


@dataclass(frozen=True)
class Pair:
    """A teacher and a student that answer the same questions."""

    method: Matching
    teacher: Model
    student: Model

    def taught(self, module: nn.Module, batch: Batch) -> Taught:
        """Return what both say of a batch; only the student's part has gradients."""
        device = next(module.parameters()).device
        own = {name: value.to(device) for name, value in inputs_of(batch).items() if name != TEACHER}
        said = forward(module, own).float()
        task = self.student.task
        student, labels = targets(said, batch["labels"].to(device), task)
        teacher, _ = targets(self._asked(batch).to(device), batch["labels"].to(device), task)
        teacher = teacher if self._places is None else teacher[:, self._places.to(device)]
        if task == "causal-lm":
            kept = labels != IGNORE
            width = min(teacher.shape[-1], student.shape[-1])  # tables are often padded to a round number of rows
            student, teacher, labels = student[kept, :width], teacher[kept, :width], labels[kept]
        return Taught(Said(teacher), Said(student), labels)

    def _asked(self, batch: Batch) -> torch.Tensor:
        asked = batch.get(TEACHER, {name: value for name, value in batch.items() if name != TEACHER})
        return self.teacher.logits(asked) if self.teacher.access >= Access.LOGITS else self.teacher.log_probs(asked)

    @property
    def _places(self) -> torch.Tensor | None:
        return places_of_classes(self.teacher, self.student)


def _validation(method: Matching, pair: Pair, inputs: Inputs, context: Context) -> Callable[[], float] | None:
    """Return what gives the loss on held-out examples."""
    if inputs.validation is None:
        return None
    examples = Paired.of(context.rows(inputs.validation), pair.teacher, pair.student, inputs.length)
    size = method.batch_size
    batches = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]

    def mean_loss() -> float:
        total = count = 0.0
        with torch.no_grad():
            for indices in batches:
                taught = pair.taught(pair.student.module, examples.batch(indices))
                rows = len(taught.student.logits)
                total += float(sum(method.terms(taught).values())) * rows
                count += rows
        return total / count

    return mean_loss
