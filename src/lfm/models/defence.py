"""Telling less than a model knows, so that it is not as easily copied by those who may ask it.

    perturb   p' = (1 - a) p + a q,   q uniform on the simplex, drawn from the input;   a = X, less to keep the argmax
    top_k     the k largest probabilities, divided by their sum; 0 for all others
    round     p in units of 10^-N, the largest remainders rounded up, so that the sum stays 1

They are applied in this order, and the most probable class stays the most probable one. The same input is always told
the same, whoever asks and how often, so that no averaging over repeats takes the noise away. Inputs that differ in
anything at all get noise of their own: an average over inputs that hardly differ does take it away, at the price of as
many queries. Noise is keyed with a secret besides the input: whoever knows the secret can compute it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lfm.errors import RequestError
from lfm.method import Access

if TYPE_CHECKING:
    import torch

    from lfm.models.encode import Batch
    from lfm.models.handle import Model, Tell
    from lfm.models.text import Completion, Prompt, Sampling

KEPT = 1 - 1e-6  # share of the noise that would make two classes equal


class Defence(BaseModel):
    """What is done to probabilities before they are told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    round: int | None = Field(
        None, ge=0, le=9, description="Decimals of probabilities; of text, those of log-probabilities."
    )
    top_k: int | None = Field(None, ge=1, description="Tell this many most probable classes (or tokens) alone.")
    perturb: float = Field(
        0.0, ge=0, lt=1, description="Share of noise in the probabilities of classes; the likeliest class stays."
    )

    @property
    def tells_less(self) -> bool:
        """Whether it does anything at all."""
        return self != Defence()


def defended(model: Model, defence: Defence, secret: str = "") -> Model:
    """Return a handle on a model that tells probabilities through a defence, and nothing above probabilities.

    Raises RequestError for noise in what a language model tells, which is not done.
    """
    from lfm.models.handle import Model

    if defence.perturb and not model.task.endswith("classification"):
        raise RequestError(f"{model.label}: perturb is for classifiers, and this writes text; leave it out")
    backend = Defended(model, defence, secret)
    return Model(backend, backend.offers, model.task, model.encoder, model.label)


class Defended:
    """A backend that asks another handle, and tells what its defence leaves of the answer."""

    def __init__(self, model: Model, defence: Defence, secret: str) -> None:
        self.offers = min(model.access, Access.PROBS)
        self._model = model
        self._defence = defence
        self._secret = secret

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return log-probabilities, minus infinity for what is not told."""
        probs = self._model.probs(batch)
        keys = keys_of(batch, len(probs), self._secret) if self._defence.perturb else ()
        return told(probs, self._defence, keys).log()

    def labels(self, batch: Batch) -> torch.Tensor:
        return self._model.labels(batch)

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        """Return texts, whose log-probabilities are rounded and hold no more tokens than `top_k`."""
        made = self._model.write(prompts, how, tell)
        return [replace(one, tokens=tuple(map(self._told, one.tokens))) for one in made]

    def _told(self, token: Any) -> Any:
        top = sorted(token.top.items(), key=lambda item: -item[1])[: self._defence.top_k]
        decimals = self._defence.round
        if decimals is None:
            return replace(token, top=dict(top))
        rounded = {text: round(value, decimals) for text, value in top}
        return replace(token, logprob=round(token.logprob, decimals), top=rounded)


def told(probs: torch.Tensor, defence: Defence, keys: Sequence[bytes] = ()) -> torch.Tensor:
    """Return what is told of probabilities (..., classes); `keys`, one for each row (n, classes), are for noise."""
    found = probs.double()
    if defence.perturb:
        found = _mixed(found, defence.perturb, keys)
    if defence.top_k is not None:
        found = _largest(found, defence.top_k)
    if defence.round is not None:
        found = _rounded(found, defence.round)
    given = found.to(probs.dtype)
    return _ahead(given, probs) if defence.perturb and defence.round is None else given


def _ahead(given: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Return the same with the likeliest class ahead: where few digits make two classes equal, by one bit."""
    import torch

    best = probs.argmax(-1, keepdim=True)
    others = given.scatter(-1, best, 0.0).amax(-1, keepdim=True)
    least = torch.nextafter(others, torch.ones_like(others))
    return given.scatter(-1, best, torch.maximum(given.gather(-1, best), least))


def _mixed(probs: torch.Tensor, share: float, keys: Sequence[bytes]) -> torch.Tensor:
    import numpy as np
    import torch

    seeds = (int.from_bytes(key[:16], "big") for key in keys)
    drawn = [np.random.Generator(np.random.Philox(key=seed)).exponential(size=probs.shape[-1]) for seed in seeds]
    noise = torch.from_numpy(np.stack(drawn)).to(probs)
    noise = noise / noise.sum(-1, keepdim=True)
    best = probs.argmax(-1, keepdim=True)
    ahead = probs.gather(-1, best) - probs
    gained = noise - noise.gather(-1, best)
    bound = torch.where(gained > 0, ahead / (ahead + gained).clamp(min=1e-300), 1.0).scatter(-1, best, 1.0)
    most = (bound.amin(-1, keepdim=True) * KEPT).clamp(max=share)
    mixed: torch.Tensor = (1 - most) * probs + most * noise
    return mixed


def _largest(probs: torch.Tensor, k: int) -> torch.Tensor:
    import torch

    best = probs.argmax(-1, keepdim=True)
    first = probs.scatter(-1, best, 2.0)  # also among equals
    kept = first.topk(min(k, probs.shape[-1]), -1).indices
    values = probs.gather(-1, kept)
    return torch.zeros_like(probs).scatter(-1, kept, values / values.sum(-1, keepdim=True))


def _rounded(probs: torch.Tensor, decimals: int) -> torch.Tensor:
    import torch

    whole = float(10**decimals)
    units = probs * whole
    counts = units.floor()
    best = probs.argmax(-1, keepdim=True)
    remainders = (units - counts).scatter_add(-1, best, torch.ones_like(best, dtype=units.dtype))
    lacking = (whole - counts.sum(-1, keepdim=True)).round()
    counts += remainders.argsort(stable=True, dim=-1, descending=True).argsort(-1) < lacking
    level = (counts >= counts.gather(-1, best)).scatter(-1, best, False)  # what caught up gives its unit to the best
    counts = (counts - level.to(counts)).scatter_add(-1, best, level.sum(-1, keepdim=True).to(counts))
    return counts / whole


def keys_of(batch: Batch, count: int, secret: str) -> list[bytes]:
    """Return a digest of each row of a batch: of what is asked, not of how it was padded or what came with it."""
    return [hashlib.sha256(secret.encode() + b"\0" + _content(batch, row)).digest() for row in range(count)]


def _content(batch: Batch, row: int) -> bytes:
    if "members" in batch:  # of an ensemble: all members are asked the same
        return _content(batch["members"][0], row)
    mask = batch.get("attention_mask")
    parts = []
    for name in sorted(set(batch) - {"labels", "attention_mask"}):
        value = batch[name][row]
        if hasattr(value, "cpu"):
            value = value[mask[row].bool()] if mask is not None and value.shape == mask[row].shape else value
            value = value.cpu().numpy()
        parts += [name.encode(), value.encode() if isinstance(value, str) else _bytes(value)]
    return b"\0".join(parts)


def _bytes(array: Any) -> bytes:
    about = repr((array.shape, str(array.dtype))).encode()
    return about + bytes(array.tobytes())
