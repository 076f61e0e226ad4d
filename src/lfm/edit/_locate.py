"""Where an edit takes hold: the tokens of a prompt that name its subject, the target behind it, the modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lfm.data.requests import Request
from lfm.errors import RequestError
from lfm.models._graph import Part
from lfm.models.anatomy import Block, anatomy
from lfm.models.encode import IGNORE
from lfm.models.handle import Model


@dataclass(frozen=True)
class Asked:
    """A text as tokens: where its subject ends, and where the target begins (behind the last token, without one)."""

    ids: tuple[int, ...]
    subject: int
    target: int


def asked(model: Model, request: Request, before: str = "", *, target: str | None = None) -> Asked:
    """Return a request's prompt behind another text, with a target if one is given.

    Without a subject the last token of the prompt stands for it.
    """
    prompt = f"{before}{request.prompt}"
    ids, ends = tokens_of(model, prompt)
    at = len(ids) - 1
    if request.subject is not None:
        last = len(before) + request.prompt.rindex(request.subject) + len(request.subject)
        at = next(index for index, end in enumerate(ends) if end >= last)
    if target is None:
        return Asked(ids, at, len(ids))
    whole, _ = tokens_of(model, f"{prompt} {target}")
    shared = next((i for i, pair in enumerate(zip(ids, whole, strict=False)) if pair[0] != pair[1]), len(ids))
    if shared >= len(whole):
        raise RequestError(f"{request.where}: the target {target!r} has no token of its own behind the prompt")
    return Asked(whole, min(at, shared - 1), shared)


def tokens_of(model: Model, text: str) -> tuple[tuple[int, ...], list[int]]:
    """Return the tokens of a text, and at which character each of them ends; without a token that ends the text."""
    tokenizer: Any = model.encoder.tokenizer
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
    else:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        ends = [len(tokenizer.decode(ids[: index + 1], skip_special_tokens=True)) for index in range(len(ids))]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids, ends = ids[:-1], ends[:-1]
    return tuple(ids), ends


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return texts as one batch, filled up on the right."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def labels_of(texts: Sequence[Asked], length: int, device: torch.device) -> torch.Tensor:
    """Return for each place the token that should follow (n, length), where it belongs to a target."""
    labels = torch.full((len(texts), length), IGNORE)
    for row, text in enumerate(texts):
        for place in range(text.target, len(text.ids)):
            labels[row, place - 1] = text.ids[place]
    return labels.to(device)


# --- modules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """A block, and the way out of its MLP."""

    block: Block
    out: Part


def memories(model: Model) -> list[Memory]:
    """Return the blocks of a language model whose MLP can be edited, by their number.

    Raises RequestError for a model without them, or with a block that is no such memory.
    """
    blocks = anatomy(model.module).blocks
    found = [Memory(block, block.mlp_out) for block in blocks if block.mlp_out is not None]
    if not found or len(found) != len(blocks):
        raise RequestError(
            f"{model.label}: {len(found)} of its {len(blocks)} blocks have an MLP with one way out, "
            "which editing takes for a memory"
        )
    return found


def weight_of(module: nn.Module, part: Part) -> nn.Parameter:
    """Return the matrix of a part, as it is stored."""
    return module.get_parameter(part.weight)


def add_to(module: nn.Module, part: Part, values: torch.Tensor, rows: torch.Tensor) -> None:
    """Add `values` (outputs, n) times `rows` (n, width) to the matrix of a part, in place."""
    change = values @ rows
    weight = weight_of(module, part)
    with torch.no_grad():
        weight.add_((change.T if part.transposed else change).to(weight))


@contextmanager
def reading(module: nn.Module, names: Sequence[str], *, inputs: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what goes into (or comes out of) modules in the forward passes inside, the last one by name."""
    seen: dict[str, torch.Tensor] = {}

    def reader(name: str) -> Any:
        def into(_: nn.Module, given: tuple[Any, ...]) -> None:
            seen[name] = given[0]

        def out(_: nn.Module, __: Any, made: Any) -> None:
            seen[name] = made[0] if isinstance(made, tuple) else made

        return into if inputs else out

    handles = []
    for name in names:
        part = module.get_submodule(name)
        handles.append(
            part.register_forward_pre_hook(reader(name)) if inputs else part.register_forward_hook(reader(name))
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing(module: nn.Module, name: str, change: Any) -> Iterator[None]:
    """Let `change(tensor) -> tensor` take the place of what comes out of a module, inside."""

    def out(_: nn.Module, __: Any, made: Any) -> Any:
        return (change(made[0]), *made[1:]) if isinstance(made, tuple) else change(made)

    handle = module.get_submodule(name).register_forward_hook(out)
    try:
        yield
    finally:
        handle.remove()


def by_text(hidden: torch.Tensor, texts: int) -> torch.Tensor:
    """Return hidden states as (texts, length, width): some blocks (OPT's) put all texts in one row for their MLP."""
    return hidden.view(texts, -1, hidden.shape[-1])


def at_places(hidden: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Return hidden states (n, width) at one place of each text."""
    hidden = by_text(hidden, len(places))
    rows = torch.arange(len(places), device=hidden.device)
    return hidden[rows, torch.tensor(places, device=hidden.device)]
