"""Edits by least squares: values are searched for, keys read off, and matrices changed so that one gives the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lfm.checkpoint import Change, LowRank
from lfm.data.requests import Request
from lfm.edit._contract import Layer, LeastSquares
from lfm.edit._locate import Asked, Memory, add_to, asked, at_places, memories, padded, reading
from lfm.edit._statistics import Statistics
from lfm.edit._targets import find_values
from lfm.errors import RequestError
from lfm.models.handle import Model
from lfm.models.samples import sampled_tokens

SPREAD = 5  # blocks over which a change of the stream is spread, if not told


@dataclass(frozen=True)
class Update:
    """One update: what it changes, by the matrix's name, for which requests, and how the search went."""

    requests: tuple[Request, ...]
    changes: Mapping[str, Change]
    losses: tuple[float, ...]


def layers_of(method: LeastSquares, model: Model) -> list[Memory]:
    """Return the blocks that are edited, from the input on. Raises RequestError for blocks that are not there."""
    known = memories(model)
    if method.layers is not None:
        missing = [layer for layer in method.layers if not 0 <= layer < len(known)]
        if missing:
            raise RequestError(f"{model.label}: layers: has blocks 0 to {len(known) - 1}, not {missing}")
        return [known[layer] for layer in sorted(set(method.layers))]
    last = min(max(round(len(known) / 3), 1), len(known) - 1)
    return known[max(0, last - SPREAD + 1) : last + 1] if method.stream else [known[last]]


def contexts_of(model: Model, count: int, seed: int) -> list[str]:
    """Return beginnings of texts that the model makes up: half of five tokens, half of ten, as ROME has them."""
    if not count:
        return []
    tokenizer = model.encoder.tokenizer
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True).strip()
        for length, many in ((6, count - count // 2), (11, count // 2))
        if many
        for ids in sampled_tokens(model, many, length, seed=seed + length)
    ]
    return [f"{text}. " for text in texts if text]


class Editor:
    """Makes updates one after the other, in the module in memory."""

    def __init__(
        self,
        method: LeastSquares,
        model: Model,
        layers: Sequence[Memory],
        known: Statistics | None,
        contexts: list[str],
    ) -> None:
        self._method = method
        self._model = model
        self._layers = layers
        self._contexts = contexts
        self._covariances = {layer.out.name: _ridged(method, layer, known) for layer in layers}
        self._earlier = {name: torch.zeros_like(c) for name, c in self._covariances.items()}

    def update(self, requests: Sequence[Request]) -> Update:
        """Make one update for these requests."""
        method, top = self._method, self._layers[-1]
        place = top.block.name if method.stream else top.out.name
        found = find_values(self._model, requests, top, method, self._contexts)
        changes: dict[str, Change] = {}
        for index, layer in enumerate(self._layers):
            left = found.values - self._now(requests, place)
            keys = method.columns(*self._keys(requests, layer))
            residuals = left.T / (len(self._layers) - index)
            changes[layer.out.weight] = self._change(layer, torch.cat(keys, 1), residuals.repeat(1, len(keys)))
        return Update(tuple(requests), changes, tuple(found.losses.tolist()))

    def remembered(self) -> dict[str, torch.Tensor]:
        """Return what is known of the keys of earlier edits, for `forget`."""
        return {name: earlier.clone() for name, earlier in self._earlier.items()}

    def forget(self, remembered: Mapping[str, torch.Tensor]) -> None:
        """Know of no other earlier edits than when this was returned: those since were taken back."""
        self._earlier = dict(remembered)

    def overlap(self, requests: Sequence[Request]) -> torch.Tensor:
        """Return how much of what goes into the last memory requests share (n, n): the cosine of keys under C^-1."""
        keys = self._keys(requests, self._layers[-1])[1]
        gram = keys.T @ torch.linalg.solve(self._covariances[self._layers[-1].out.name], keys)
        lengths = gram.diagonal().clamp_min(1e-30).sqrt()
        shared: torch.Tensor = gram / lengths[:, None] / lengths
        return shared

    def _change(self, layer: Memory, keys: torch.Tensor, residuals: torch.Tensor) -> LowRank:
        name = layer.out.name
        rows = self._method.rows(Layer(keys, residuals, self._covariances[name], self._earlier[name]))
        self._earlier[name] += keys @ keys.T
        add_to(self._model.module, layer.out, residuals, rows)
        u, v = (rows.T, residuals.T) if layer.out.transposed else (residuals, rows)
        return LowRank(u.float().contiguous(), v.float().contiguous())

    def _now(self, requests: Sequence[Request], place: str) -> torch.Tensor:
        """Return what comes out of a module at the ends of the subjects (n, width), in float64."""
        texts = [asked(self._model, request) for request in requests]
        return self._read(texts, place, inputs=False)

    def _keys(self, requests: Sequence[Request], layer: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what goes into a memory at the ends of the subjects (width, n): of prompts alone, and on average."""
        texts = [asked(self._model, request, before) for before in ("", *self._contexts) for request in requests]
        found = self._read(texts, layer.out.name, inputs=True).view(-1, len(requests), layer.out.input_dim)
        if type(self._method).stream and self._contexts:  # as MEMIT's authors weigh them: the prompt alone is half
            return found[0].T, ((found[0] + found[1:].mean(0)) / 2).T
        return found[0].T, found.mean(0).T

    def _read(self, texts: Sequence[Asked], name: str, *, inputs: bool) -> torch.Tensor:
        module = self._model.module
        device = next(module.parameters()).device
        found = []
        with torch.no_grad(), reading(module, [name], inputs=inputs) as seen:
            for start in range(0, len(texts), 64):
                part = texts[start : start + 64]
                module(**padded([text.ids for text in part], device))
                found.append(at_places(seen[name], [text.subject for text in part]).double().cpu())
        return torch.cat(found)


def _ridged(method: LeastSquares, layer: Memory, known: Statistics | None) -> torch.Tensor:
    width = layer.out.input_dim
    if known is None:
        return torch.eye(width, dtype=torch.float64)
    found = known.covariances[layer.out.name]
    return found + method.ridge * found.diagonal().mean() * torch.eye(width, dtype=torch.float64)
