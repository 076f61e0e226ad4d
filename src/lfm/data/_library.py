"""Data that comes with a Python package, and Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lfm.data._check import choose_split, listed, require
from lfm.data._images import image_array, stacked
from lfm.data._rows import Column, Rows
from lfm.errors import RequestError, did_you_mean

HUB = "hf:"


def read_builtin(name: str) -> Rows:
    """Return `sklearn:digits` (image (1797, 8, 8), label) or `pydoc:topics` (text, topic)."""
    if name not in BUILTINS:
        raise RequestError(f"{name}: no such built-in data, there is {listed(BUILTINS)}{did_you_mean(name, BUILTINS)}")
    return BUILTINS[name](name)


def read_datasets(path: str, split: str | None) -> Rows:
    """Return a data set of the hub, `hf:org/name` or `hf:org/name:config`, or a folder written by `save_to_disk`.

    Pictures become uint8 arrays. Raises RequestError where the library is missing, the data set cannot be loaded, or
    the split is not there or not chosen.
    """
    library = require("datasets", "datasets", path)
    name, _, config = path.removeprefix(HUB).partition(":")
    try:
        found = library.load_dataset(name, config or None) if path.startswith(HUB) else library.load_from_disk(path)
    except Exception as error:  # the library raises its own kinds, the hub's, and those of the file formats
        raise RequestError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        found = found[choose_split(path, split, found)]
    elif split is not None:
        raise RequestError(f"{path}: has no splits, got split: {split}; leave it out")
    return Rows({name: _column(list(found[name])) for name in found.column_names}, path)


def _column(values: list[Any]) -> Column:
    pictures = bool(values) and all(hasattr(value, "convert") for value in values)
    return stacked([image_array(value) for value in values]) if pictures else values


def _digits(name: str) -> Rows:
    digits = require("sklearn.datasets", "scikit-learn", name).load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Rows({"image": images, "label": digits.target.astype(np.int64)}, name)


def _topics(name: str) -> Rows:
    topics: dict[str, str] = require("pydoc_data.topics", "a complete Python", name).topics
    return Rows({"text": list(topics.values()), "topic": list(topics)}, name)


BUILTINS: dict[str, Callable[[str], Rows]] = {"sklearn:digits": _digits, "pydoc:topics": _topics}
