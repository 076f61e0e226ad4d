"""Plain torch modules: the code that the user named, and a state dict that must fit it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lfm.checkpoint import open_checkpoint
from lfm.errors import RequestError, did_you_mean
from lfm.models._surroundings import first_line, seeded
from lfm.models.anatomy import anatomy
from lfm.models.encode import Encoder
from lfm.models.ref import ModelRef, Task


def plain_module(
    ref: ModelRef, task: Task | None, classes: Mapping[str, int] | None, new_head: bool, seed: int, allow_pickle: bool
) -> tuple[nn.Module, Task, Encoder]:
    with seeded(seed):
        module = build_plain(ref)
    saved: dict[str, int] = {}
    if ref.ref:
        checkpoint = open_checkpoint(ref.ref, allow_pickle=allow_pickle)
        saved = (checkpoint.config or {}).get("label2id", {})
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs}
        if not new_head:
            _fit_head(module, tensors)
        names = set(tensors)
        _add_counters(module, tensors)
        mismatch = _state_problems(module, tensors)
        if mismatch:
            raise RequestError(f"{ref.label}: does not fit the module of {ref.module}:", *mismatch)
        module.load_state_dict(tensors)
        _drop_counters(module, names)
    head = anatomy(module).head
    if head is None:
        raise RequestError(f"{ref.label}: no output layer found in the module of {ref.module}")
    if classes is not None and new_head:
        with seeded(seed):
            _replace_head(module, head, len(classes))
    count = _classes(module, head)
    own = classes if classes is not None and new_head else saved or {str(index): index for index in range(count)}
    task = task or "image-classification"
    return module, task, Encoder(task, None, ref.image, own)


def _counters(module: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    """Yield the batch norms by the name of their count of batches, which weights from early torch do not have."""
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.momentum and part.num_batches_tracked is not None:
            yield f"{name}.num_batches_tracked".lstrip("."), part


def _add_counters(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, _ in _counters(module):
        tensors.setdefault(name, torch.tensor(0))


def _drop_counters(module: nn.Module, names: Set[str]) -> None:
    """Let batch norms do without a count that was not in the file: what is saved merges with what was loaded."""
    for name, part in list(_counters(module)):
        if name not in names:
            part.num_batches_tracked = None


def _fit_head(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the module the number of classes that its weights have: a head may have been replaced when it was tuned."""
    head = anatomy(module).head
    weight = tensors.get(f"{head}.weight")
    if head and weight is not None and weight.shape[0] != _classes(module, head):
        _replace_head(module, head, weight.shape[0])


def _classes(module: nn.Module, head: str) -> int:
    weight = module.get_submodule(head).weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _replace_head(module: nn.Module, head: str, count: int) -> None:
    old = module.get_submodule(head)
    if not isinstance(old, nn.Linear):
        raise RequestError(f"the output layer {head} is a {type(old).__name__}; only a Linear can be replaced")
    parent, _, name = head.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Linear(old.in_features, count, bias=old.bias is not None))


def build_plain(ref: ModelRef) -> nn.Module:
    """Run the code that the user named; it is the only code of theirs that is ever run."""
    place, _, name = str(ref.module).rpartition(":")
    if not place:
        raise RequestError(f"module: {ref.module}: write `path/file.py:function` or `package.module:function`")
    if place.endswith(".py") and not Path(place).is_file():
        raise RequestError(f"module: {place}: no such file")
    try:
        found = _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever their code raises
        raise RequestError(f"module: {place}: {type(error).__name__}: {first_line(error)}") from error
    build = getattr(found, name, None)
    if not callable(build):
        raise RequestError(f"module: {place} has no {name!r}{did_you_mean(name, vars(found))}")
    try:
        inspect.signature(build).bind(**ref.arguments)
    except TypeError as error:
        raise RequestError(f"module: {ref.module}: {error}; say so under `arguments`") from None
    try:
        module = build(**ref.arguments)
    except Exception as error:  # whatever their code raises
        raise RequestError(f"module: {ref.module}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise RequestError(f"module: {ref.module} returned {type(module).__name__}, not a torch module")
    return module


def _run_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, which dataclasses and their kind look up while it is run."""
    name = f"lfm_module_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _state_problems(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    state = module.state_dict()
    problems = [f"the weights lack {name!r}" for name in state if name not in tensors]
    problems += [f"the module has no {name!r}" for name in tensors if name not in state]
    problems += [
        f"{name!r} is {list(tensors[name].shape)} in the weights and {list(tensor.shape)} in the module"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    rest = len(problems) - 8
    return problems[:8] + ([f"and {rest:,} more"] if rest > 0 else [])
