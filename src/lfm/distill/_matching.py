"""Learning on data: teacher and student see the same examples, each as it reads them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lfm.checkpoint import OutputFolder, read_json
from lfm.data import Rows
from lfm.distill._contract import Folded, Inputs, Kept, Matching, Online, OnPolicy, Said, Successive, Taught
from lfm.distill._students import load_student, open_teacher, places_of_classes
from lfm.distill._training import finish, train
from lfm.distill._watching import View, linear_head, replace_head, views
from lfm.errors import RequestError
from lfm.method import Access, Data
from lfm.models._surroundings import seeded
from lfm.models.encode import IGNORE, Batch, Examples, inputs_of, targets
from lfm.models.handle import Model
from lfm.models.local import forward, unique_tensors
from lfm.recipe.step import Context, StepResult
from lfm.train import Descent, Epochs, Log, Source

TEACHER = "teacher"  # of a batch: the same examples as the teacher reads them
TOLD = ("top_ids", "top_log_probs")  # or in their place what it said of each label: its likeliest classes, (n, k) each


def learn_on_data(method: Matching, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Teach a student on data, into `folder`."""
    kept = method.kept()
    if kept is not None:
        return _learn_from_kept(method, kept, inputs, context, folder)
    teacher = open_teacher(method, inputs, context)
    if isinstance(method, Successive):
        return _generations(method, teacher, inputs, context, folder)
    student = load_student(inputs, teacher, context)
    return finish(student, teach(method, teacher, student, inputs, context, folder.resume), inputs, folder)


def _learn_from_kept(
    method: Matching, kept: Kept, inputs: Inputs, context: Context, folder: OutputFolder
) -> StepResult:
    """Teach a student by answers that lie on disk, or are put there first: the teacher is not held in memory."""
    from lfm.distill._cache import bytes_per_token, remembered

    teacher = remembered(kept, inputs, context)
    student = load_student(inputs, teacher, context)
    if student.encoder.tokenizer.get_vocab() != teacher.encoder.tokenizer.get_vocab():
        raise RequestError(f"{student.label}: has another tokenizer than the teacher, whose answers name its tokens")
    result = finish(student, teach(method, teacher, student, inputs, context, folder.resume), inputs, folder)
    size = len(teacher.encoder.tokenizer)
    bytes_of = {"cache_bytes_per_token": bytes_per_token(kept, size), "full_bytes_per_token": 2 * size}
    metrics = {**result.metrics, **{name: float(value) for name, value in bytes_of.items()}}
    return replace(result, metrics=metrics, notes=(*result.notes, f"the teacher's {kept.k} likeliest answers are kept"))


def teach(
    method: Matching, teacher: Model, student: Model, inputs: Inputs, context: Context, resume: Path, seed: int = 0
) -> Log:
    """Train a student in place; `seed` is added to that of the step."""
    if inputs.data is None:
        raise AssertionError("the plan lets nothing run without data")
    examples = Paired.of(context.rows(inputs.data), teacher, student, inputs.length)
    if type(method).needs.data is Data.LABELLED and not examples.labelled:
        raise RequestError(f"data: {type(method).__name__} learns from labels too, and {inputs.data.path} has none")
    pair = Pair(method, teacher, student, examples.labelled)
    per_epoch = math.ceil(len(examples) / (method.batch_size * method.accumulate))
    steps = method.steps or math.ceil(method.epochs * per_epoch)
    source = Timed(Epochs(examples, method.batch_size, context.seed + seed), method.accumulate, steps)
    learner = Learner.of(pair, source.batch(0), context.seed + seed)
    log = train(
        learner,
        source,
        lambda module, batch: module(batch, source.progress),
        method,
        steps,
        context,
        resume,
        seed=seed,
        validate=validation(method, pair, inputs, context, learner.extras),
    )
    learner.fold()
    return log


def _generations(
    method: Successive, teacher: Model, inputs: Inputs, context: Context, folder: OutputFolder
) -> StepResult:
    """Teach one student after the other, each by the one before; the last is written."""
    logs = Log()
    for number in range(method.generations):
        student = load_student(inputs, teacher, context, seed=number)
        place = folder.resume / f"generation-{number}"
        done = place.with_suffix(".safetensors")
        if done.is_file():  # a run that was killed goes on from here
            student.module.load_state_dict(load_file(done), strict=False)
            log = Log(**read_json(place.with_suffix(".json")))
        else:
            log = teach(method, teacher, student, inputs, context, place, number)
            _keep(student, log, place, done)
        logs.steps += [{"generation": float(number), **record} for record in log.steps]
        logs.validations += [{"generation": float(number), **record} for record in log.validations]
        student.module.eval()
        teacher = student.restrict(type(method).needs.access)
    return finish(student, logs, inputs, folder)


def _keep(student: Model, log: Log, place: Path, done: Path) -> None:
    """Write a student that is taught, the weights last and at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".json").write_text(json.dumps({"steps": log.steps, "validations": log.validations}))
    draft = place.with_suffix(".draft")
    tensors = unique_tensors(student.module)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, draft)
    draft.rename(done)
    shutil.rmtree(place, ignore_errors=True)


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

    method: Descent
    teacher: Model
    student: Model
    labelled: bool = True

    def taught(self, module: nn.Module, batch: Batch, extras: nn.Module | None = None, progress: float = 1.0) -> Taught:
        """Return what both say of a batch; only the student's part has gradients, unless both learn."""
        device = next(module.parameters()).device
        own = {name: value.to(device) for name, value in inputs_of(batch).items() if name != TEACHER}
        with ExitStack() as stack:
            seen = [stack.enter_context(view.open()) for view in self._views]
            said = forward(module, own).float()
            told = batch.get(TEACHER, {})
            asked = said.detach() if TOLD[0] in told else self._asked(batch).to(device)
        task = self.student.task
        student, labels = targets(said, batch["labels"].to(device), task)
        if TOLD[0] in told:
            kept = labels != IGNORE
            ids, log_probs = (told[name].to(device) for name in TOLD)
            return Taught(Said(log_probs, ids=ids), Said(student[kept]), labels[kept], extras, progress)
        teacher, _ = targets(asked, batch["labels"].to(device), task)
        teacher = teacher if self._places is None else teacher[:, self._places.to(device)]
        if task == "causal-lm":
            kept = labels != IGNORE
            width = min(teacher.shape[-1], student.shape[-1])  # tables are often padded to a round number of rows
            student, teacher, labels = student[kept, :width], teacher[kept, :width], labels[kept]
        mask = own.get("attention_mask")
        hidden = [view.states(states, mask) for view, states in zip(self._views, seen, strict=True)]
        theirs, ours = hidden or ((), ())
        return Taught(
            Said(teacher, theirs, mask), Said(student, ours, mask), labels if self.labelled else None, extras, progress
        )

    def _asked(self, batch: Batch) -> torch.Tensor:
        asked = batch.get(TEACHER, {name: value for name, value in batch.items() if name != TEACHER})
        if isinstance(self.method, Online):
            module = self.teacher.module
            device = next(module.parameters()).device
            return forward(module, {name: value.to(device) for name, value in inputs_of(asked).items()}).float()
        return self.teacher.logits(asked) if self.teacher.access >= Access.LOGITS else self.teacher.log_probs(asked)

    @cached_property
    def _views(self) -> tuple[View, ...]:
        """What is seen of the teacher and of the student."""
        return views(self.method, self.teacher, self.student)

    @property
    def _places(self) -> torch.Tensor | None:
        return places_of_classes(self.teacher, self.student)


@dataclass
class Timed:
    """A source of batches that knows how far training is, by the batch that it was last asked for."""

    source: Source
    accumulate: int
    steps: int
    progress: float = field(default=0.0, init=False)

    def batch(self, number: int) -> Batch:
        self.progress = number // self.accumulate / self.steps
        return self.source.batch(number)


class Learner(nn.Module):
    """Everything that is trained: the student, what is trained along, and a teacher that learns as well."""

    def __init__(self, pair: Pair, extras: nn.Module | None) -> None:
        super().__init__()
        self.student = pair.student.module
        self.extras = extras
        self.teacher = pair.teacher.module if isinstance(pair.method, Online) else None
        self._pair = pair
        self._heads: tuple[nn.Linear, nn.Linear] | None = None

    @classmethod
    def of(cls, pair: Pair, batch: Batch, seed: int) -> Learner:
        """Return it, with what the method trains along, fitted to the shapes that a first batch has inside."""
        method, extras = pair.method, None
        assert isinstance(method, Matching)
        pair.student.module.eval()
        with torch.no_grad():
            taught = pair.taught(pair.student.module, batch)
        theirs, ours = ([tuple(state.shape[1:]) for state in said.hidden] for said in (taught.teacher, taught.student))
        with seeded(seed):
            extras = method.connectors(theirs, ours)
        if extras is not None:
            extras = extras.to(next(pair.student.module.parameters()).device)
        learner = cls(pair, extras)
        if isinstance(method, Folded):
            learner._heads = (
                linear_head(pair.teacher, taught.teacher.hidden),
                linear_head(pair.student, taught.student.hidden),
            )
        return learner

    def forward(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        """Return the terms of the loss."""
        method = self._pair.method
        assert isinstance(method, Matching)
        return dict(method.terms(self._pair.taught(self.student, batch, self.extras, progress)))

    def fold(self) -> None:
        """Give the student the output layer that the method makes of what was trained along."""
        if self._heads is not None and isinstance(self._pair.method, Folded) and self.extras is not None:
            theirs, ours = self._heads
            places = places_of_classes(self._pair.teacher, self._pair.student)
            replace_head(ours, self._pair.method.head(self.extras, theirs), places)


def validation(
    method: Matching | OnPolicy, pair: Pair, inputs: Inputs, context: Context, extras: nn.Module | None = None
) -> Callable[[], float] | None:
    """Return what gives the loss on held-out examples."""
    if inputs.validation is None:
        return None
    examples = Paired.of(context.rows(inputs.validation), pair.teacher, pair.student, inputs.length)
    pair = replace(pair, labelled=examples.labelled)
    size = method.batch_size
    batches = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]

    def mean_loss() -> float:
        total = count = 0.0
        with torch.no_grad():
            for indices in batches:
                taught = pair.taught(pair.student.module, examples.batch(indices), extras)
                rows = len(taught.student.logits)
                total += float(sum(method.terms(taught).values())) * rows
                count += rows
        return total / count

    return mean_loss
