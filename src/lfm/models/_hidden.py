"""What goes on inside a module in memory: the input of its output layer, gradients to its own input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lfm.errors import RequestError

Run = Callable[[dict[str, torch.Tensor]], torch.Tensor]  # inputs -> logits
Loss = Callable[[torch.Tensor], torch.Tensor]  # logits -> one number


def hidden_features(module: nn.Module, head: str | None, run: Run, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the output layer reads, (batch, width): of tokens and of places in an image, the mean.

    Padding takes no part in the mean. Raises RequestError for a module without one output layer.
    """
    if head is None:
        raise RequestError("it has no output layer whose input could serve as features")
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0])

    with _hooked(module.get_submodule(head).register_forward_pre_hook(keep)), torch.no_grad():
        run(inputs)
    if len(seen) != 1:
        raise RequestError(f"its output layer {head} was run {len(seen)} times, which leaves no one input as features")
    return _pooled(seen[0].float(), inputs.get("attention_mask"))


def _pooled(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if hidden.ndim == 4:  # (batch, channels, height, width)
        return hidden.mean((2, 3))
    if hidden.ndim == 2:
        return hidden
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def gradients_to_input(module: nn.Module, run: Run, inputs: dict[str, torch.Tensor], loss: Loss) -> torch.Tensor:
    """Return the gradient of `loss` (of the logits) to the pixels, or to the embeddings of the tokens.

    Shapes are those of the pixels (batch, channels, height, width) and of the embeddings (batch, length, width).
    Weights keep what gradients they have.
    """
    with torch.enable_grad():
        if "input_ids" not in inputs:
            name = next(iter(inputs))
            leaf = inputs[name].detach().clone().requires_grad_()
            return _gradient(loss(run({**inputs, name: leaf}).float()), leaf)
        leaves: list[torch.Tensor] = []

        def replace(_: nn.Module, __: tuple[Any, ...], made: torch.Tensor) -> torch.Tensor:
            leaves.append(made.detach().requires_grad_())
            return leaves[-1]

        with _hooked(_token_table(module).register_forward_hook(replace)):
            value = loss(run(inputs).float())
        if len(leaves) != 1:
            raise RequestError(f"its tokens were embedded {len(leaves)} times; gradients take one embedding")
        return _gradient(value, leaves[0])


def _gradient(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    if value.ndim or not value.requires_grad:
        raise RequestError(f"a loss is one number made of the logits, got shape {list(value.shape)}")
    [gradient] = torch.autograd.grad(value, [leaf])  # of the leaf alone: weights collect nothing
    return gradient


def _token_table(module: nn.Module) -> nn.Module:
    found = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None  # type: ignore[operator]
    found = found or next((part for part in module.modules() if isinstance(part, nn.Embedding)), None)
    if found is None:
        raise RequestError("it has no table of token embeddings to take gradients to")
    return found


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
