"""The one training loop. It knows batches, losses, schedules and how to survive a kill; it knows no method.

Every step draws its randomness from (seed, step) and its batch from the step's number, so a run that was killed goes on
from its last saved state to the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from lfm.errors import LfmError, RequestError
from lfm.method import Method
from lfm.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lfm.models.encode import Batch, Examples

LOG = logging.getLogger("lfm")
Loss = Callable[["nn.Module", "Batch"], "Mapping[str, torch.Tensor]"]


class Descent(Method):
    """A method that takes steps of AdamW: of what size, and on how much at a time."""

    batch_size: int = Field(16, ge=1, description="Examples (windows, for text) in a batch.")
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are averaged into one step.")
    learning_rate: float = Field(1e-4, ge=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay; not on biases and norms.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Arithmetic of forward and backward pass.")


class Optimised(Descent):
    """A method whose learning rate rises once and falls once."""

    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the learning rate falls.")
    warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps over which the learning rate rises.")


class Trained(Optimised):
    """A method that trains on data: for how long, and when to stop."""

    epochs: float = Field(3.0, gt=0, description="Passes over the data.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps, in place of epochs.")
    patience: int | None = Field(
        None, ge=1, description="Stop after this many validations without a better loss, and return the best weights."
    )
    validate_every: int = Field(50, ge=1, description="Steps between validations.")


class Source(Protocol):
    """Where batches come from. The same number gives the same batch, so that a run can be taken up again."""

    def batch(self, number: int) -> Batch: ...


@dataclass(frozen=True)
class Epochs:
    """Batches of examples, in a new order each epoch; batch `number` is a function of the seed and that number."""

    examples: Examples
    batch_size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.examples) / min(self.batch_size, len(self.examples)))

    def batch(self, number: int) -> Batch:
        size = min(self.batch_size, len(self.examples))
        epoch, place = divmod(number, self.per_epoch)
        return self.examples.batch(self._order(epoch)[place * size : (place + 1) * size])

    def _order(self, epoch: int) -> list[int]:
        import torch

        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.examples), generator=generator).tolist()


@runtime_checkable
class Stateful(Protocol):
    """A source that learns as it goes, such as a generator, and is saved with the run."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None: ...


@dataclass
class Log:
    """What happened: one record for each step, one for each validation."""

    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the records as JSON lines."""
        records = [json.dumps(record) for record in (*self.steps, *self.validations)]
        path.write_text("\n".join(records) + "\n", encoding="utf-8")


@dataclass
class _State:
    """Everything that a run is, between two steps."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    source: Source
    step: int = 0
    log: Log = field(default_factory=Log)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    best_step: int = 0


def fit(
    module: nn.Module,
    source: Source,
    loss: Loss,
    groups: Iterable[Mapping[str, Any]],
    method: Descent,
    *,
    steps: int,
    seed: int,
    device: str,
    resume: Path,
    validate: Callable[[], float] | None = None,
    rate: Callable[[int], float] | None = None,
    visit: Callable[[int], None] | None = None,
    save_seconds: float = 600.0,
    quiet: bool = False,
) -> Log:
    """Train `module` in place for `steps` steps and return the log.

    `groups` are AdamW parameter groups, each with its `lr`; what is in none of them stays as it is, the statistics of
    batch norms included. `loss` returns named terms, means over a batch, whose sum is minimised. State is saved into
    `resume` every `save_seconds`, and taken up from there. `rate` gives the share of the peak learning rate at a step
    (from 0), for methods without a `schedule`; `visit` is called after each step with their number, before a state is
    saved: some numbers come again after a kill. Raises RequestError where there is nothing to train, and LfmError when
    the loss is no longer a number.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    rated: list[dict[str, Any]] = [{**group, "params": list(group["params"]), "peak": group["lr"]} for group in groups]
    trained = [parameter for group in rated for parameter in group["params"]]
    if not trained:
        raise RequestError("nothing is left to train: all weights are frozen")
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train in several precisions, one by one
    accelerator = Accelerator(
        cpu=device == "cpu",
        device_placement=False,  # the module is where it should be
        mixed_precision="bf16" if method.precision == "bfloat16" else "no",
        step_scheduler_with_optimizer=False,
    )
    optimizer = torch.optim.AdamW(rated, foreach=False)
    course = rate or _course(method, steps)
    with _fixed(module, trained):
        prepared, optimizer = accelerator.prepare(module, optimizer)
        state = _State(prepared, optimizer, source)
        _train_mode(state.module)
        _load(state, resume)
        saved_at = time.monotonic()
        with Progress("train", steps, quiet) as progress:
            progress.advance(state.step)
            while state.step < steps:
                _step(state, loss, method, steps, seed, accelerator, course)
                progress.advance(1, f"loss {state.log.steps[-1]['loss']:.4g}")
                if visit is not None:
                    visit(state.step)
                if validate is not None and isinstance(method, Trained):
                    due = state.step % method.validate_every == 0 or state.step == steps
                    if due and _stop(state, validate, method):
                        break
                if time.monotonic() - saved_at >= save_seconds:
                    _save(state, resume)
                    saved_at = time.monotonic()
        module = accelerator.unwrap_model(state.module, keep_fp32_wrapper=False)
    if state.best:
        module.load_state_dict(state.best, strict=False)
    module.eval()
    return state.log


@contextmanager
def _fixed(module: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no gradient be computed for what is not trained."""
    own = {id(parameter) for parameter in trained}
    others = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _train_mode(module: nn.Module) -> None:
    """Switch on dropout and its kind, and the statistics of batch norms that are trained."""
    from torch.nn.modules.batchnorm import _NormBase

    module.train()
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if isinstance(part, _NormBase) and own and not any(parameter.requires_grad for parameter in own):
            part.eval()


def _step(
    state: _State, loss: Loss, method: Descent, steps: int, seed: int, accelerator: Any, course: Callable[[int], float]
) -> None:
    """Take one optimiser step, and log it."""
    import torch

    rate = course(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    sums: dict[str, float] = {}
    with _randomness(seed, state.step):
        batches = [state.source.batch(state.step * method.accumulate + micro) for micro in range(method.accumulate)]
        for batch, share in zip(batches, _shares(batches), strict=True):
            with accelerator.autocast():
                terms = loss(state.module, batch)
                total = torch.stack(list(terms.values())).sum()
            accelerator.backward(total * share)
            for name, value in {**terms, "loss": total}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    norm = float(accelerator.clip_grad_norm_(trained, method.clip))
    for what, number in (("loss", sums["loss"]), ("gradient", norm)):
        if not math.isfinite(number):
            raise LfmError(f"the {what} became {number} at step {state.step + 1} of {steps}; lower the learning rate")
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    record = {"step": state.step, **sums, "learning_rate": method.learning_rate * rate, "gradient_norm": norm}
    state.log.steps.append(record)


def _shares(batches: Sequence[Batch]) -> list[float]:
    """Return the part of each batch in a step's mean: that of its labels, as if all were one large batch."""
    from lfm.models.encode import IGNORE

    counts = [int((batch["labels"] != IGNORE).sum()) if "labels" in batch else 1 for batch in batches]
    return [count / sum(counts) for count in counts] if sum(counts) else [1 / len(counts)] * len(counts)


def _stop(state: _State, validate: Callable[[], float], method: Trained) -> bool:
    """Validate; keep the best weights; return whether patience is at its end."""
    state.module.eval()
    found = validate()
    _train_mode(state.module)
    state.log.validations.append({"step": state.step, "validation": found})
    if method.patience is None:
        return False
    if found < state.best_loss:
        state.best_loss, state.best_step = found, state.step
        state.best = {name: tensor.detach().clone() for name, tensor in _tensors(state.module).items()}
    return state.step - state.best_step >= method.patience * method.validate_every


def _course(method: Descent, steps: int) -> Callable[[int], float]:
    """Return the learning rate at each step, as a share of its peak, by the method's own schedule."""
    if not isinstance(method, Optimised):
        raise AssertionError(f"{type(method).__name__} has no schedule, and no `rate` was given")
    return lambda step: _rate(step, steps, method)


def _rate(step: int, steps: int, method: Optimised) -> float:
    """Return the share of the peak learning rate at a step (from 0)."""
    rising = math.ceil(method.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if method.schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return 1 - done if method.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@contextmanager
def _randomness(seed: int, step: int) -> Iterator[None]:
    """Let dropout and its kind draw from (seed, step), so that there is no generator state to save."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


# --- saved states ---------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    from lfm.models.local import unique_tensors

    return unique_tensors(module)


def _save(state: _State, resume: Path) -> None:
    """Write the state beside the last one, then drop that: at every moment one of them is whole."""
    from safetensors.torch import save_file

    place = resume / f"step-{state.step:09d}"
    draft = resume / "draft"
    for left_over in (draft, place):
        shutil.rmtree(left_over, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {f"module.{name}": tensor.detach() for name, tensor in _tensors(state.module).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    if isinstance(state.source, Stateful):
        tensors |= {f"source.{name}": value for name, value in state.source.state_dict().items()}
    save_file(
        {name: tensor.contiguous().cpu().clone() for name, tensor in tensors.items()}, draft / "state.safetensors"
    )
    record = {
        "sha256": _digest(draft / "state.safetensors"),
        "step": state.step,
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "best_step": state.best_step,
        "steps": state.log.steps,
        "validations": state.log.validations,
    }
    (draft / "state.json").write_text(json.dumps(record), encoding="utf-8")
    draft.rename(place)
    for old in resume.glob("step-*"):
        if old != place:
            shutil.rmtree(old)


def _load(state: _State, resume: Path) -> None:
    """Take up the last state that was saved whole, if there is one."""
    for place in sorted(resume.glob("step-*"), reverse=True):
        found = _read(place)
        if found is not None:
            _take_up(state, *found)
            return
        LOG.warning("note: %s: this saved state is damaged and not used", place)


def _read(place: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Return a saved record and its tensors, or None where a file is damaged or missing."""
    from safetensors.torch import load_file

    try:
        record = json.loads((place / "state.json").read_text(encoding="utf-8"))
        whole = record["sha256"] == _digest(place / "state.safetensors")
    except (OSError, ValueError, KeyError):
        return None
    return (record, load_file(place / "state.safetensors")) if whole else None


def _digest(path: Path) -> str:
    """Return a file's sha256, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_up(state: _State, record: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "best": {}, "optimizer": {}, "source": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    state.module.load_state_dict(parts["module"], strict=False)  # tied tensors are there once
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in parts["optimizer"].items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = tensor
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})
    if isinstance(state.source, Stateful):
        state.source.load_state_dict(parts["source"])
    state.step, state.best, state.best_step = record["step"], parts["best"], record["best_step"]
    state.best_loss = math.inf if record["best_loss"] is None else record["best_loss"]
    state.log = Log(record["steps"], record["validations"])
