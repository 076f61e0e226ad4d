"""Learning without data: a synthesiser makes the inputs, from models alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import nn

from lfm.checkpoint import OutputFolder
from lfm.data import DataSpec
from lfm.distill._contract import DataFree, Inputs, Said, Scene, Space, Synthesiser, Taught
from lfm.distill._picture import save_sheet
from lfm.distill._students import load_student, open_teacher
from lfm.distill._training import finish, train
from lfm.errors import LfmError, RequestError
from lfm.method import Access
from lfm.models._surroundings import seeded
from lfm.models.encode import Batch
from lfm.models.handle import Model
from lfm.models.local import forward
from lfm.models.ref import ImageSpec
from lfm.recipe.step import Context, StepResult

SHOWN = 64  # inputs that are kept to be looked at
SAMPLES = "synthesised.safetensors"
SHEET = "synthesised.png"
PIXELS = "pixel_values"


def learn_without_data(method: DataFree, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Teach a student on inputs that are made for it, into `folder`; anything that asks for data fails."""
    context = Sealed(context)
    teacher = open_teacher(method, inputs, context)
    student = load_student(inputs, teacher, context)
    device = next(student.module.parameters()).device
    scene = Scene(
        teacher,
        student.module,
        space_of(teacher),
        len(teacher.encoder.classes or ()),
        method.batch_size,
        method.steps,
        device,
    )
    with seeded(context.seed):
        synthesiser = method.synthesiser(scene)
    log = train(
        student.module,
        Synthesised(synthesiser),
        lambda module, batch: {
            **method.terms(_taught(teacher, module, batch)),
            **synthesiser.terms(module, batch[PIXELS]),
        },
        method,
        method.steps,
        context,
        folder.resume,
    )
    with seeded(context.seed + 1):
        shown = synthesiser.samples(SHOWN)
    metrics = save_samples(shown, answers(teacher, shown), student.module, folder)
    save_sheet(shown, scene.space, folder.partial / SHEET)
    notes = ["made without any data: from the teacher and random numbers alone", *synthesiser.notes]
    return finish(student, log, inputs, folder, notes, metrics)


class Sealed:
    """A context without data."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def rows(self, spec: DataSpec) -> NoReturn:
        raise LfmError(f"{spec.path}: data was asked for where there is to be none; this is a fault of the method")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class Synthesised:
    """A source of batches that a synthesiser makes, one after the other."""

    def __init__(self, synthesiser: Synthesiser) -> None:
        self._synthesiser = synthesiser

    def batch(self, number: int) -> Batch:
        return {PIXELS: self._synthesiser.images(number).detach()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        of = self._synthesiser
        found = {f"tensors.{name}": value for name, value in of.tensors.items()}
        for name, module in of.modules.items():
            found |= {f"modules.{name}.{key}": value for key, value in module.state_dict().items()}
        for name, optimiser in of.optimisers.items():
            for index, moments in optimiser.state_dict()["state"].items():
                found |= {f"optimisers.{name}.{index}.{key}": torch.as_tensor(v) for key, v in moments.items()}
        return found

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        of = self._synthesiser
        of.tensors = {key.split(".", 1)[1]: value for key, value in state.items() if key.startswith("tensors.")}
        for name, module in of.modules.items():
            module.load_state_dict(_under(state, f"modules.{name}."))
        for name, optimiser in of.optimisers.items():
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in _under(state, f"optimisers.{name}.").items():
                index, _, what = key.partition(".")
                moments.setdefault(int(index), {})[what] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _under(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def space_of(teacher: Model) -> Space:
    """Return what a teacher takes as input. Raises RequestError for one that takes no images."""
    image: ImageSpec | None = teacher.encoder.image
    if teacher.task != "image-classification" or image is None:
        raise RequestError(f"{teacher.label}: inputs can be made for image classifiers; for text see self_generated")
    mean, std = (torch.tensor(values).expand(image.channels).view(-1, 1, 1) for values in (image.mean, image.std))
    return Space((image.channels, image.size, image.size), (0 - mean) / std, (1 - mean) / std)


def answers(teacher: Model, images: torch.Tensor) -> torch.Tensor:
    """Return the teacher's logits, log-probabilities or, of one that tells labels alone, one-hot log-probabilities."""
    batch = {PIXELS: images}
    if teacher.access >= Access.LOGITS:
        return teacher.logits(batch)
    if teacher.access >= Access.PROBS:
        return teacher.log_probs(batch)
    labels = teacher.labels(batch)
    classes = len(teacher.encoder.classes or ())
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels[:, None], 1.0).log()


def _taught(teacher: Model, module: nn.Module, batch: Batch) -> Taught:
    return Taught(Said(answers(teacher, batch[PIXELS])), Said(forward(module, batch).float()))


def save_samples(
    images: torch.Tensor, said: torch.Tensor, student: nn.Module, folder: OutputFolder
) -> dict[str, float]:
    """Keep some inputs with what the teacher said of them, and return what can be told of their quality."""
    images, said = images.detach(), said.softmax(-1)
    student.eval()
    with torch.no_grad():
        agree = (forward(student, {PIXELS: images}).argmax(-1) == said.argmax(-1)).float().mean()
    tensors = {"images": images.contiguous().cpu(), "probabilities": said.contiguous().cpu()}
    save_file(tensors, folder.partial / SAMPLES)
    shares = said.argmax(-1).bincount(minlength=said.shape[1]).float() / len(said)
    balance = float(torch.special.entr(shares).sum()) / math.log(max(said.shape[1], 2))
    flat = images.flatten(1)
    apart = torch.cdist(flat, flat).sum() / max(len(flat) * (len(flat) - 1), 1) / flat.norm(dim=1).mean()
    return {
        "synthesised_confidence": float(said.max(-1).values.mean()),
        "synthesised_class_balance": balance,  # 1: all classes alike, 0: one class alone
        "synthesised_diversity": float(apart),  # mean distance of two of them, over their mean length
        "synthesised_agreement": float(agree),
    }
