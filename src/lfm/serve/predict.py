"""Texts and pictures for classifiers: from what a client sends to classes, labels and probabilities."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lfm.data import Rows
from lfm.data._images import PILLOW_FORMATS, image_array, stacked
from lfm.errors import RequestError
from lfm.evaluate.measure import batches
from lfm.method import Access
from lfm.models.handle import Model

TOGETHER = 32
MOST = 1024  # texts or pictures of one request
PIXELS = 2**24  # of one picture: a small file can hold a very large one


class AskedClasses(BaseModel):
    """`POST /predict` in JSON: texts, or pictures (PNG, JPEG, BMP, WebP) in base64."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    texts: list[str] | None = Field(None, min_length=1, max_length=MOST)
    images: list[str] | None = Field(None, min_length=1, max_length=MOST)
    length: int | None = Field(None, ge=1, description="Tokens after which texts are cut; refused if longer without.")

    @model_validator(mode="after")
    def _one_of_both(self) -> AskedClasses:
        if (self.texts is None) == (self.images is None):
            raise ValueError("send `texts` or `images`, one of them")
        if self.images is not None and self.length is not None:
            raise ValueError("`length` is for texts; leave it out")
        return self


def decoded(images: Sequence[str]) -> list[bytes]:
    """Return the bytes of base64 texts; a data URL's head is taken off. Raises RequestError for all that are none."""
    found, problems = [], []
    for index, text in enumerate(images):
        try:
            plain = text.partition(",")[2] if text.startswith("data:") else text
            found.append(base64.b64decode(plain, validate=True))
        except (binascii.Error, ValueError):
            problems.append(f"images[{index}]: not base64")
    if problems:
        raise RequestError(*problems)
    return found


def pictures(files: Sequence[bytes]) -> Rows:
    """Return pictures as rows. Raises RequestError for all that cannot be read."""
    from PIL import Image

    images, problems = [], []
    for index, content in enumerate(files):
        try:
            with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as picture:
                if picture.width * picture.height > PIXELS:
                    problems.append(f"images[{index}]: {picture.width} x {picture.height} pixels; send a smaller one")
                else:
                    images.append(image_array(picture))
        except Exception as error:  # Pillow raises what its decoders raise
            problems.append(f"images[{index}]: not a picture that can be read: {type(error).__name__}")
    if problems:
        raise RequestError(*problems)
    return Rows({"image": stacked(images)}, "images")


def look(model: Model, rows: Rows, length: int | None) -> dict[str, Any]:
    """Return the classes, the most probable one of each row, and the probabilities where the handle gives them."""
    examples = model.encoder.encode(rows, length or 2**30, labelled=False)
    names = _names(model)
    labels, probs = [], []
    for batch in batches(examples, TOGETHER):
        if model.access >= Access.PROBS:
            probs.append(model.probs(batch).cpu())
            labels.append(probs[-1].argmax(-1))
        else:
            labels.append(model.labels(batch).cpu())
    found = {"classes": names, "labels": [names[index] for index in torch.cat(labels).tolist()]}
    return found | ({"probabilities": torch.cat(probs).tolist()} if probs else {})


def _names(model: Model) -> list[str]:
    classes = model.encoder.classes or {}
    return sorted(classes, key=lambda name: classes[name])
