"""The linear model that touches a module at its weights, moved by a sum of task vectors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import Batch, inputs_of
from lfm.models.handle import Model, Tell
from lfm.models.local import forward
from lfm.models.text import Completion, Prompt, Sampling

Weights = dict[str, torch.Tensor]


class TangentBackend:
    """Answers f(x; w_0) + J(x; w_0) D with D = sum of weight * (member - base), added up in the order of members."""

    offers = Access.LOGITS

    def __init__(self, base: Model, members: Sequence[Model], weights: Sequence[float]) -> None:
        _check(base, members)
        _begin()
        self._called = _Logits(base.module).eval()
        self._weights = weights_of(self._called)
        self._moved = self._sum(members, weights)

    def _sum(self, members: Sequence[Model], weights: Sequence[float]) -> Weights:
        moved = {name: torch.zeros_like(value) for name, value in self._weights.items()}
        for member, weight in zip(members, weights, strict=True):
            if weight == 0:  # not even a rounding error of it
                continue
            theirs = weights_of(_Logits(member.module))
            for name, value in self._weights.items():
                moved[name] += weight * (theirs[name] - value)
        return moved

    def logits(self, batch: Batch) -> torch.Tensor:
        device = next(iter(self._weights.values())).device
        inputs = {name: value.to(device) for name, value in inputs_of(batch).items()}

        def at(weights: Weights) -> torch.Tensor:
            called: torch.Tensor = functional_call(self._called, weights, (inputs,))
            return called

        # The other kernels of attention have no forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            here, change, *_ = jvp(at, (self._weights,), (self._moved,))
        moved: torch.Tensor = here + change
        return moved.float()

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch).argmax(-1)

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        raise RequestError("this ensemble does not write text")


@cache
def _begin() -> None:
    """Let torch make ready for forward derivatives, which it does at their first use by what it has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


class _Logits(nn.Module):
    """A model whose output is its logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Batch) -> torch.Tensor:
        return forward(self.module, inputs)


def weights_of(module: nn.Module) -> Weights:
    """Return a module's weights without what is shared (tied) or a buffer."""
    return {name: value.detach() for name, value in module.named_parameters()}


def _check(base: Model, members: Sequence[Model]) -> None:
    """Raise RequestError with everything about the members that does not fit the base."""
    if not base.task.endswith("classification"):
        raise RequestError(f"Tangent joins classifiers, and {base.label} is a {base.task} model")
    problems = [f"{m.label}: {why}" for m in members if (why := _misfit(base, m))]
    if problems:
        raise RequestError(*problems)


def _misfit(base: Model, member: Model) -> str | None:
    if member.task != base.task:
        return f"is a {member.task} model, and the base {base.label} is for {base.task}"
    if member.encoder.classes != base.encoder.classes:
        return f"its classes, or their order, are not those of the base {base.label}"
    if member.encoder.image != base.encoder.image:
        return f"reads images in another way than the base {base.label}"
    mine, theirs = (model.encoder.tokenizer for model in (base, member))
    if (mine is None) != (theirs is None) or (mine is not None and mine.get_vocab() != theirs.get_vocab()):
        return f"its tokenizer is not that of the base {base.label}"
    have, want = ({n: v.shape for n, v in weights_of(model.module).items()} for model in (member, base))
    other = [name for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]
    if type(member.module) is not type(base.module) or other:
        named = f" ({', '.join(other[:3])}{' ...' if len(other) > 3 else ''})" if other else ""
        return f"is not of the architecture of the base {base.label}{named}"
    return None
