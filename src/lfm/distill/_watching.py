"""What goes on inside of two models: which layers are compared, and what they gave when the models last ran."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lfm.distill._contract import Inside, Read
from lfm.distill._features import pooled
from lfm.errors import RequestError
from lfm.models.anatomy import anatomy, layers
from lfm.models.handle import Model
from lfm.train import Descent


@dataclass(frozen=True)
class View:
    """Parts of a module, and whether to see what they are given, pooled, in place of what they give."""

    module: nn.Module
    parts: tuple[str, ...] = ()
    given: bool = False

    @contextmanager
    def open(self) -> Iterator[dict[str, torch.Tensor]]:
        """Let hidden states be seen, by the name of the part, while the module runs."""
        seen: dict[str, torch.Tensor] = {}
        hooks = []
        for name in dict.fromkeys(self.parts):
            part = self.module.get_submodule(name)
            if self.given:
                hooks.append(part.register_forward_pre_hook(lambda _, given, name=name: _keep(seen, name, given)))
            else:
                hooks.append(part.register_forward_hook(lambda _, __, made, name=name: _keep(seen, name, made)))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def states(self, seen: dict[str, torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return what was seen of each part, float32."""
        missing = [name for name in self.parts if name not in seen]
        if missing:
            raise RequestError(f"{missing[0]} was not run, so its hidden states cannot be matched; choose other layers")
        found = (seen[name].float() for name in self.parts)
        return tuple(pooled(state, mask) for state in found) if self.given else tuple(found)


def _keep(seen: dict[str, torch.Tensor], name: str, value: Any) -> None:
    """Note a hidden state; many layers give it first among other things."""
    while isinstance(value, (tuple, list)):
        value = value[0]
    seen[name] = value


def views(method: Descent, teacher: Model, student: Model) -> tuple[View, ...]:
    """Return what a method sees of teacher and student; nothing where it looks at answers alone."""
    if isinstance(method, Inside):
        ours, theirs = layers(student.module), layers(teacher.module)
        pairs = matched(len(ours), len(theirs), method.layers)
        return (
            View(teacher.module, tuple(theirs[place] for _, place in pairs)),
            View(student.module, tuple(ours[place] for place, _ in pairs)),
        )
    if isinstance(method, Read):
        return View(teacher.module, (_head(teacher),), True), View(student.module, (_head(student),), True)
    return ()


def matched(ours: int, theirs: int, how: str | dict[int, int]) -> list[tuple[int, int]]:
    """Return pairs of places among so many layers of the student and of the teacher.

    `all` cuts both into as many equal runs as the shallower has layers, and matches the last layer of each run.
    """
    if isinstance(how, dict):
        bad = [f"the student has no layer {place}" for place in how if not -ours <= place < ours]
        bad += [f"the teacher has no layer {place}" for place in how.values() if not -theirs <= place < theirs]
        if bad or not how:
            told = f"(student {ours}, teacher {theirs} layers)"
            raise RequestError(*[f"layers: {problem} {told}" for problem in bad or ["an empty map matches nothing"]])
        return [(place % ours, other % theirs) for place, other in how.items()]
    runs = min(ours, theirs) if how == "all" else 1
    if not runs:
        raise RequestError("layers: a model without layers gives no hidden states; match its answers (response)")
    return [(round(run * ours / runs) - 1, round(run * theirs / runs) - 1) for run in range(1, runs + 1)]


def _head(model: Model) -> str:
    head = anatomy(model.module).head
    if head is None:
        raise RequestError(f"{model.label}: has no output layer whose input could be matched; match layers (fitnets)")
    return head


# --- another output layer -------------------------------------------------------------------------------------------


def linear_head(model: Model, states: Sequence[torch.Tensor]) -> nn.Linear:
    """Return the output layer, where it is a matrix of its own that reads one vector for each example."""
    name = _head(model)
    head = model.module.get_submodule(name)
    if not isinstance(head, nn.Linear) or anatomy(model.module).tied_head or model.task == "causal-lm":
        raise RequestError(
            f"{model.label}: its output layer {name} is no matrix of its own that reads one vector, "
            "so none can be put in its place; match what it reads (fitnets) instead"
        )
    if states[0].shape[-1] != head.in_features:
        raise RequestError(f"{model.label}: its output layer reads {head.in_features} units, not {states[0].shape[-1]}")
    return head


def replace_head(old: nn.Linear, new: nn.Linear, places: torch.Tensor | None) -> None:
    """Give an output layer other weights, those of the classes in the order that it has."""
    weight, bias = new.weight.detach(), new.bias.detach()
    if places is not None:
        weight, bias = weight[places.to(weight.device)], bias[places.to(bias.device)]
    if old.bias is None:
        raise RequestError("simkd: the student's output layer has no bias, which the teacher's needs; give it one")
    with torch.no_grad():
        old.weight.copy_(weight)
        old.bias.copy_(bias)
