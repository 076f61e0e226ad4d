"""Learning from answers: an inquirer asks the teacher, within a budget, and the student learns what was said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lfm.checkpoint import OutputFolder
from lfm.distill._asked import Asked, of_bytes, to_bytes
from lfm.distill._contract import BlackBox, Inputs, Inquirer, Inquiry, Said, Taught
from lfm.distill._students import load_student, places_of_classes
from lfm.distill._synthesis import PIXELS, SHOWN, Sealed, Synthesised, save_samples, space_of
from lfm.distill._training import finish, train
from lfm.errors import RequestError
from lfm.method import Data
from lfm.models._surroundings import seeded
from lfm.models.encode import Batch, Examples
from lfm.models.handle import Model
from lfm.models.local import forward
from lfm.models.open import open_in
from lfm.recipe.step import Context, StepResult

SAID = "said"
CURVE = "agreement.jsonl"
POINTS = 10  # of the curve
MOST_MEASURED = 1000  # held-out inputs


def learn_by_asking(method: BlackBox, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Teach a student what a teacher answers, into `folder`; no more is asked than the method's `queries`."""
    if type(method).needs.data is Data.NONE:
        context = Sealed(context)
    ref = context.resolve(inputs.teacher)
    teacher = open_in(context, ref, access=min(type(method).most, ref.offers))
    student = load_student(inputs, teacher, context)
    _check(teacher, student)
    measured = min(int(method.queries * method.measured), MOST_MEASURED)
    steps = max(method.steps, method.lessons(method.queries - measured))
    asked = Asked(teacher, method.queries, folder.resume / "asked", space_of(teacher))
    inquiry = Inquiry(
        asked,
        student.module,
        space_of(teacher),
        method.queries - measured,
        method.batch_size,
        steps * method.accumulate,
        method.asking,
        next(student.module.parameters()).device,
        _proxy(inputs, student, context),
    )
    with seeded(context.seed):
        lessons = Lessons(method.inquirer(inquiry), inquiry, measured)
    log = train(
        student.module,
        lessons,
        lambda module, batch: method.terms(_taught(asked, module, batch)),
        method,
        steps,
        context,
        folder.resume,
        visit=lambda step: lessons.measure(step, steps),
    )
    metrics = save_samples(*lessons.inquirer.known(SHOWN), student.module, folder)
    metrics |= lessons.curve(folder.partial / CURVE)
    return finish(student, log, inputs, folder, [_how_made(method, asked, inputs)], metrics)


def _check(teacher: Model, student: Model) -> None:
    """Raise RequestError where what is made for the teacher would not be what the student sees."""
    if teacher.task == "image-classification" and teacher.encoder.image is None:
        raise RequestError(f"{teacher.label}: does not say what its images are like, as endpoints of `lfm serve` do")
    if student.encoder.image != teacher.encoder.image:
        raise RequestError(
            f"{student.label}: takes images in another size or normalised in another way than {teacher.label}; "
            "give a student that takes the teacher's"
        )
    if places_of_classes(teacher, student) is not None:
        raise RequestError(f"{student.label}: has the classes of {teacher.label} in another order; give a new student")


def _proxy(inputs: Inputs, student: Model, context: Context) -> Examples | None:
    if inputs.data is None:
        return None
    return student.encoder.encode(context.rows(inputs.data), inputs.length, labelled=False)


def _how_made(method: BlackBox, asked: Asked, inputs: Inputs) -> str:
    what = "probabilities" if asked.soft else "labels"
    data = "random numbers alone" if inputs.data is None else f"the unlabelled images of {inputs.data.path}"
    return f"made from the teacher's {what} for {asked.count:,} inputs (of {method.queries:,} allowed) and {data}"


def _taught(asked: Asked, module: nn.Module, batch: Batch) -> Taught:
    said = batch[SAID]
    labels = None if asked.soft else said.argmax(-1)
    return Taught(Said(said), Said(forward(module, {PIXELS: batch[PIXELS]}).float()), labels)


class Lessons(Synthesised):
    """A source of batches that an inquirer asks for; with it are saved the count, the held-out inputs, the curve."""

    def __init__(self, inquirer: Inquirer, inquiry: Inquiry, measured: int) -> None:
        super().__init__(inquirer)
        self.inquirer = inquirer
        self._inquiry = inquiry
        self._measured = measured
        self._own = {"curve": torch.full((POINTS, 3), -1.0, dtype=torch.float64)}  # step, queries, agreement

    def batch(self, number: int) -> Batch:
        if "held_out" not in self._own:
            self._hold_out()
        images, said = self.inquirer.lesson(number)
        return {PIXELS: images.detach(), SAID: said}

    def _hold_out(self) -> None:
        """Ask about inputs that no lesson will hold; they are the same whatever a method does with chance."""
        space, device = self._inquiry.space, self._inquiry.device
        with torch.random.fork_rng(devices=[]):
            images = to_bytes(self.inquirer.held_out(self._measured), space)
        said = self._inquiry.teacher(of_bytes(images, space, device))
        self._own |= {"held_out": images.cpu(), "held_out_labels": said.argmax(-1).cpu()}

    def measure(self, step: int, steps: int) -> None:
        """Note how often the student agrees with the teacher on held-out inputs, at ten of the steps."""
        place = step * POINTS // steps - 1
        if place < 0 or step != -(-(place + 1) * steps // POINTS) or not self._measured:
            return
        images = of_bytes(self._own["held_out"], self._inquiry.space, self._inquiry.device)
        with torch.no_grad(), evaluated(self._inquiry.student) as student:
            agree = forward(student, {PIXELS: images}).argmax(-1).cpu() == self._own["held_out_labels"]
        self._own["curve"][place] = torch.tensor([step, self._inquiry.teacher.count, agree.double().mean()])

    def curve(self, path: Path) -> dict[str, float]:
        """Write the curve as JSON lines, and return what lineage keeps of it."""
        points = [
            {"step": int(step), "queries": int(queries), "agreement": agreement}
            for step, queries, agreement in self._own["curve"].tolist()
            if step > 0
        ]
        path.write_text("".join(f"{json.dumps(point)}\n" for point in points), encoding="utf-8")
        found = {f"agreement_after_{point['queries']}_queries": point["agreement"] for point in points}
        return {"queries": float(self._inquiry.teacher.count), **found}

    def state_dict(self) -> dict[str, torch.Tensor]:
        asked = self._inquiry.teacher
        asked.saved()
        own = {**self._own, "queries": torch.tensor(asked.count)}
        return super().state_dict() | {f"own.{name}": value for name, value in own.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self._own = {name.removeprefix("own."): value for name, value in state.items() if name.startswith("own.")}
        self._inquiry.teacher.go_on(int(self._own.pop("queries")))


@contextmanager
def evaluated(module: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout and the batch norms' own statistics off, and back to how each of them was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in modes:
            part.training = training


__all__ = ["learn_by_asking"]
