"""What examples look like, whoever is asked about them: pooled pixels, or counts of hashed words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lfm.errors import RequestError
from lfm.models.encode import Batch

SIDE = 8  # images are pooled to so many pixels squared
BUCKETS = 2048  # words and pairs of words are hashed into so many
WORD = re.compile(r"\w+|[^\w\s]")


def looks(batch: Batch) -> torch.Tensor:
    """Return features (n, width), float32, of a batch as one member reads it. Raises RequestError."""
    if "pixel_values" in batch:
        return _pooled(batch["pixel_values"])
    if "images" in batch:
        return torch.cat([_pooled(_pixels(image)) for image in batch["images"]])
    if "input_ids" in batch:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        rows = zip(batch["input_ids"].tolist(), mask.tolist(), strict=True)
        return _counted([[str(token) for token, kept in zip(*row, strict=True) if kept] for row in rows])
    if "texts" in batch:
        return _counted([WORD.findall(str(text).lower()) for text in batch["texts"]])
    raise RequestError(f"examples of {', '.join(batch)} cannot be compared with each other")


def _pooled(pixels: torch.Tensor) -> torch.Tensor:
    return functional.adaptive_avg_pool2d(pixels.float().cpu(), SIDE).flatten(1)


def _pixels(image: Any) -> torch.Tensor:
    """Return (1, 3, height, width) in [0, 1] from a grey or coloured image of 8 bits."""
    found = torch.from_numpy(np.array(image)).float().div(255)
    return (found.expand(3, -1, -1) if found.ndim == 2 else found.permute(2, 0, 1)[:3])[None]


def _counted(texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return log(1 + count) of every word and every two neighbours; crc32 is the same in every process."""
    found = torch.zeros(len(texts), BUCKETS)
    for row, words in enumerate(texts):
        terms = [*words, *(f"{one} {two}" for one, two in pairwise(words))]
        places = torch.tensor([zlib.crc32(term.encode()) % BUCKETS for term in terms], dtype=torch.long)
        found[row].index_add_(0, places, torch.ones(len(places)))
    return found.log1p()


def rarity(features: torch.Tensor) -> torch.Tensor:
    """Return 1 + log((1 + n) / (1 + n_f)) for each feature f (width,): the more, the fewer examples have it."""
    having = (features != 0).sum(0)
    return 1 + ((1 + len(features)) / (1 + having)).log()
