"""Students: existing models, new ones, and those that are made from the teacher."""

from __future__ import annotations

import torch

from lfm.distill._contract import Inputs, Smaller
from lfm.errors import RequestError
from lfm.method import Method
from lfm.models.handle import Model
from lfm.models.local import load_model
from lfm.models.open import open_in
from lfm.models.ref import ModelRef
from lfm.models.shrink import shrink
from lfm.recipe.step import Context


def open_teacher(method: Method, inputs: Inputs, context: Context) -> Model:
    """Return the teacher with exactly the access that the method needs: a run shows that it takes no more."""
    return open_in(context, context.resolve(inputs.teacher), access=type(method).needs.access)


def load_student(inputs: Inputs, teacher: Model, context: Context, *, seed: int = 0) -> Model:
    """Return the student, in memory; a new one reads what the teacher reads and knows its classes.

    `seed` is added to that of the step, where new weights are drawn.
    """
    settings = context.settings
    if isinstance(inputs.student, Smaller):
        made = inputs.student
        whole = load_model(context.resolve(inputs.teacher), device=settings.device, allow_pickle=settings.allow_pickle)
        return shrink(whole, layers=made.layers, width=made.width, weights=made.weights, seed=context.seed + seed)
    ref = reading_as(context.resolve(inputs.student), context.resolve(inputs.teacher), teacher)
    student = load_model(
        ref,
        task=ref.task or teacher.task,
        classes=teacher.encoder.classes if ref.ref is None else None,
        new_head=ref.ref is None and bool(teacher.encoder.classes),
        seed=context.seed + seed,
        device=settings.device,
        allow_pickle=settings.allow_pickle,
    )
    if student.task != teacher.task:
        raise RequestError(f"{student.label}: is made for {student.task}, and the teacher for {teacher.task}")
    return student


def reading_as(student: ModelRef, teacher: ModelRef, read: Model) -> ModelRef:
    """Return a new student with the teacher's tokenizer and image format, where it names none."""
    if student.ref is not None:
        return student
    changes: dict[str, object] = {}
    if student.tokenizer is None and read.encoder.tokenizer is not None:
        changes["tokenizer"] = teacher.tokenizer or teacher.ref
    if student.image is None and student.module is not None and read.encoder.image is not None:
        changes["image"] = read.encoder.image
    return student.model_copy(update=changes)


def places_of_classes(teacher: Model, student: Model) -> torch.Tensor | None:
    """Return where each class of the student stands among the teacher's; None where both have one order.

    Raises RequestError where they do not know the same classes.
    """
    theirs, ours = teacher.encoder.classes, student.encoder.classes
    if theirs is None or ours is None or dict(theirs) == dict(ours):
        return None
    if set(theirs) != set(ours):
        odd = sorted(set(theirs) ^ set(ours))
        raise RequestError(
            f"teacher and student do not know the same classes: {', '.join(odd[:5])}"
            f"{f' ... ({len(odd)})' if len(odd) > 5 else ''}; give a new student (`config:` or `module:`)"
        )
    return torch.tensor([theirs[name] for name in sorted(ours, key=lambda name: ours[name])])
