"""Models in this process: any transformers model, and any torch module with a state dict."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lfm.checkpoint import (
    MemoryWeights,
    OutputFolder,
    Spec,
    Weights,
    dtype_name,
    open_checkpoint,
    read_json,
    torch_dtype,
)
from lfm.errors import LfmError, RequestError
from lfm.method import Access
from lfm.models._hidden import Loss, gradients_to_input, hidden_features
from lfm.models._plain import build_plain, plain_module
from lfm.models._pretrained import auto_class, byte_tokenizer, config_of, pretrained_model, task_of
from lfm.models._surroundings import first_line, quiet_transformers
from lfm.models._wording import Wording
from lfm.models.anatomy import anatomy
from lfm.models.encode import Batch, inputs_of
from lfm.models.handle import Model, Tell
from lfm.models.ref import ImageSpec, ModelRef, Task
from lfm.models.text import Completion, Prompt, Sampling
from lfm.models.writing import ModuleStepper, Stepper, TextModel, write
from lfm.recipe.step import Outline


class LocalBackend:
    """A module in memory."""

    offers = Access.WEIGHTS

    def __init__(self, module: nn.Module, tokenizer: Any) -> None:
        self.module = module
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def logits(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():  # not inference_mode: a student may learn from what comes out
            return self._run(self._inputs(batch)).float()

    def features(self, batch: Batch) -> torch.Tensor:
        return hidden_features(self.module, self._head, self._run, self._inputs(batch))

    def input_gradients(self, batch: Batch, loss: Loss) -> torch.Tensor:
        return gradients_to_input(self.module, self._run, self._inputs(batch), loss)

    @cached_property
    def _head(self) -> str | None:
        return anatomy(self.module).head

    def _inputs(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) for name, value in inputs_of(batch).items()}

    def _run(self, inputs: Batch) -> torch.Tensor:
        self.module.eval()
        return forward(self.module, inputs)

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch).argmax(-1)

    def stepper(self) -> Stepper:
        self._text_model()
        self.module.eval()
        return ModuleStepper(self.module)

    @property
    def wording(self) -> Wording:
        return self._text_model().wording

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        return write(self._text_model(), prompts, how, tell)

    def _text_model(self) -> TextModel:
        if self._tokenizer is None or not hasattr(self.module, "generate"):
            raise RequestError("this model does not write text")
        return TextModel(self.module, self._tokenizer)


def forward(module: nn.Module, inputs: Batch) -> torch.Tensor:
    """Return a module's logits: a transformers model takes named inputs, a plain module its one input."""
    if hasattr(module, "save_pretrained"):
        logits: torch.Tensor = module(**inputs).logits
        return logits
    made = module(next(iter(inputs.values())))
    plain: torch.Tensor = made if isinstance(made, torch.Tensor) else made.logits
    return plain


# --- loading --------------------------------------------------------------------------------------------------------


def load_model(
    ref: ModelRef,
    *,
    access: Access = Access.WEIGHTS,
    task: Task | None = None,
    classes: Mapping[str, int] | None = None,
    new_head: bool = False,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> Model:
    """Load a model into memory, in float32 and evaluation mode.

    `classes` gives a classifier its classes (label to index) where it has none, or in place of its own with
    `new_head`; new weights are drawn from `seed`. Raises RequestError for models that cannot be loaded or do not fit.
    """
    if ref.module:
        module, task, encoder = plain_module(ref, task or ref.task, classes, new_head, seed, allow_pickle)
    else:
        module, task, encoder = pretrained_model(ref, task or ref.task, classes, new_head, seed, allow_pickle)
    try:
        module = module.float().eval().to(device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise RequestError(f"{ref.label}: cannot be moved to {device}: {first_line(error)}") from None
    return Model(LocalBackend(module, encoder.tokenizer), access, task, encoder, ref.label)


def outline_new(ref: ModelRef) -> Outline:
    """Return what a model that is yet to be made will look like, without making it."""
    with torch.device("meta"), quiet_transformers():
        if ref.module:
            module = build_plain(ref)
            config = None
        else:
            made = config_of(ref)
            module = auto_class(task_of(ref.task, made, ref)).from_config(made)
            config = made.to_dict() | {"architectures": [type(module).__name__]}
    specs = {name: Spec(dtype_name(t.dtype), tuple(t.shape)) for name, t in unique_tensors(module).items()}
    return Outline(ref, specs, config)


def unique_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's state dict with every shared (tied) tensor once, under the first of its names."""
    first: dict[int, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        first.setdefault(id(tensor), name)
    own = set(first.values())
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in own}


# --- saving ---------------------------------------------------------------------------------------------------------


def save_model(model: Model, folder: OutputFolder, dtype: torch.dtype | None) -> tuple[str, dict[str, str]]:
    """Write a model with everything that it needs into an output folder; returns digest and tensor digests.

    Floating-point weights are cast to `dtype` where one is given; the model itself stays as it is.
    """
    module, own = model.module, hasattr(model.module, "save_pretrained")
    weights: Weights = _renamed(module, folder, dtype) if own else MemoryWeights(unique_tensors(module))
    specs = {
        name: Spec(dtype_name(dtype), spec.shape) if dtype is not None and spec.floating else spec
        for name, spec in weights.specs.items()
    }
    writer = folder.tensors(specs)
    for name, spec in specs.items():
        for _, part in weights.chunks(name, 1 << 20):
            cast = part.to(torch_dtype(spec.dtype))
            if spec.floating and not torch.isfinite(cast).all():
                raise LfmError(f"tensor {name!r} holds NaN or Inf after training; lower the learning rate")
            writer.write(name, cast)
    digest = writer.finish()
    encoder = model.encoder
    if encoder.tokenizer is not None:
        encoder.tokenizer.save_pretrained(folder.partial)
    if encoder.image is not None and own:
        folder.write_json("preprocessor_config.json", _preprocessor(encoder.image))
    classes = dict(encoder.classes or {})
    if not own and classes != {str(index): index for index in range(len(classes))}:
        names = {str(index): name for name, index in classes.items()}
        folder.write_json("config.json", {"id2label": names, "label2id": classes})
    return digest, writer.digests()


def _renamed(module: Any, folder: OutputFolder, dtype: torch.dtype | None) -> Weights:
    """Let transformers save, which knows how its names in memory map to those on disk; only the weights are left."""
    draft = folder.resume / "saved"
    shutil.rmtree(draft, ignore_errors=True)
    with quiet_transformers():
        module.save_pretrained(draft)
    for path in sorted(draft.glob("*config.json")):
        content = read_json(path)
        if dtype is not None and "dtype" in content:
            content["dtype"] = str(dtype).removeprefix("torch.")
        folder.write_json(path.name, content)
    return open_checkpoint(draft).weights


def _preprocessor(image: ImageSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*image.mean] * (image.channels // len(image.mean)),
        "image_std": [*image.std] * (image.channels // len(image.std)),
    }


__all__ = [
    "LocalBackend",
    "byte_tokenizer",
    "forward",
    "load_model",
    "outline_new",
    "save_model",
    "unique_tensors",
]
