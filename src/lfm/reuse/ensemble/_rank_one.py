"""A module that is several at once: around each of its layers, inputs and outputs are times a member's vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import Batch, inputs_of
from lfm.models.handle import Tell
from lfm.models.local import forward
from lfm.models.text import Completion, Prompt, Sampling
from lfm.reuse.ensemble._averaging import averaged
from lfm.reuse.ensemble._contract import Layer, State

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers_of(module: nn.Module, batch: Batch) -> list[Layer]:
    """Return the layers that answering calls, in the order in which it does. `batch` is of two examples or more.

    Raises RequestError where one is called with rows that are not examples: what is whose could not be told there.
    """
    names = {part: name for name, part in module.named_modules() if _is_layer(part)}
    called: dict[str, int] = {}

    def note(part: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        called[names[part]] = len(inputs[0]) if inputs else 0

    hooks = [part.register_forward_hook(note) for part in names]
    inputs = inputs_of(batch)
    try:
        with torch.no_grad():
            forward(module.eval(), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    count = len(next(iter(inputs.values())))
    problems = [
        f"layer {name}: is called with {rows} rows for {count} examples, so that members cannot share it"
        for name, rows in called.items()
        if rows != count
    ]
    problems += [] if called else ["has no linear layer and no convolution that members could share"]
    if problems:
        raise RequestError(*problems)
    return [_layer(name, module.get_submodule(name)) for name in called]


def _is_layer(part: nn.Module) -> bool:
    return isinstance(part, (nn.Linear, *CONVOLUTIONS)) or hasattr(part, "nf")  # the latter is GPT-2's Conv1D


def _layer(name: str, part: Any) -> Layer:
    if isinstance(part, nn.Linear):
        reads, writes = part.in_features, part.out_features
    elif isinstance(part, CONVOLUTIONS):
        reads, writes = part.in_channels, part.out_channels
    else:
        reads, writes = part.weight.shape
    return Layer(name, reads, writes, part.bias is not None)


class RankOne(nn.Module):
    """The members in one module, given the vectors that `JointEnsemble.draw` makes.

    `owners` (rows,) says which member each row of the inputs is for.
    """

    def __init__(self, module: nn.Module, vectors: State) -> None:
        super().__init__()
        self.module = module
        self._names = sorted(vectors)
        self._vectors = nn.ParameterList([nn.Parameter(vectors[name].clone()) for name in self._names])
        self._owners = torch.zeros(0, dtype=torch.long)
        for name in self._names:
            kind, _, path = name.partition(".")
            if kind == "r":
                part = module.get_submodule(path)
                part.register_forward_pre_hook(self._entering(path, part))
                part.register_forward_hook(self._leaving(path, part))

    @property
    def vectors(self) -> State:
        """The members' own numbers as they are now."""
        return {name: value.detach() for name, value in zip(self._names, self._vectors, strict=True)}

    @property
    def own(self) -> list[nn.Parameter]:
        """The members' own numbers, to be trained."""
        return list(self._vectors)

    def forward(self, inputs: Batch, owners: torch.Tensor) -> torch.Tensor:
        self._owners = owners
        return forward(self.module, inputs)

    def _entering(self, path: str, part: nn.Module) -> Callable[..., Any]:
        def enter(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            first, *rest = inputs
            return (first * self._for_rows(f"r.{path}", part, first), *rest)

        return enter

    def _leaving(self, path: str, part: nn.Module) -> Callable[..., Any]:
        shifts = f"c.{path}" in self._names

        def leave(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            output = output * self._for_rows(f"s.{path}", part, output)
            return output + self._for_rows(f"c.{path}", part, output) if shifts else output

        return leave

    def _for_rows(self, name: str, part: nn.Module, like: torch.Tensor) -> torch.Tensor:
        """Return the vector of each row's member, along the axis of `like` (rows, ...) that holds channels."""
        chosen: torch.Tensor = self._vectors[self._names.index(name)][self._owners]
        if isinstance(part, CONVOLUTIONS):
            return chosen.view(*chosen.shape, *[1] * (like.ndim - 2))
        return chosen.view(len(chosen), *[1] * (like.ndim - 2), -1)


def owners_of(members: int, rows: int, *, repeated: bool, device: torch.device) -> torch.Tensor:
    """Return whose each row is: all rows once for each member, or a share of them."""
    if repeated:
        return torch.arange(members, device=device).repeat_interleave(rows)
    return torch.arange(rows, device=device) * members // rows


def repeated(inputs: Batch, times: int) -> Batch:
    """Return tensors (rows, ...) one behind the other, so many times."""
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


class RankOneBackend:
    """Answers with the mean of all members' probabilities, asked in one pass."""

    offers = Access.PROBS

    def __init__(self, module: RankOne, members: int) -> None:
        self._module = module.eval()
        self._members = members

    def each(self, batch: Batch) -> torch.Tensor:
        """Return log-probabilities (members, n, classes)."""
        device = next(self._module.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs_of(batch).items()}
        rows = len(next(iter(inputs.values())))
        owners = owners_of(self._members, rows, repeated=True, device=device)
        with torch.no_grad():
            logits: torch.Tensor = self._module(repeated(inputs, self._members), owners)
        return logits.float().log_softmax(-1).view(self._members, rows, -1)

    def logits(self, batch: Batch) -> torch.Tensor:
        shares = torch.full((self._members,), 1 / self._members)
        return averaged(list(self.each(batch)), shares, "probabilities")

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch).argmax(-1)

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        raise RequestError("this ensemble does not write text")
