"""What mergekit made of each configuration of cases.yaml, for tests to compare with: see `cases`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors.numpy import load_file
from tests.golden.mergekit import inputs

HERE = Path(__file__).parent
LISTING = HERE / "cases.yaml"
EXACT = HERE / "exact.safetensors"
SAMPLED = HERE / "sampled.safetensors"
STATISTICS = HERE / "statistics.json"
REFUSALS = HERE / "refusals.json"


class Golden(NamedTuple):
    """A configuration and what mergekit made of it.

    `expected` is, by kind: exact, {tensor: all its values}; sampled, {tensor: what inputs.sample takes of it};
    statistics, {quantity: number}; refused, what mergekit said. Values are float32, those of bfloat16 outputs too.
    """

    name: str
    config: str
    expected: Any
    kind: str
    inputs: str


def cases(kind: str | None = None) -> Iterator[Golden]:
    """Yield the golden merges, all or those of a kind: exact, sampled, statistics or refused."""
    results = {
        "exact": lambda: {name: unpack(value) for name, value in load_file(EXACT).items()},
        "sampled": lambda: {name: rows(value) for name, value in load_file(SAMPLED).items()},
        "statistics": lambda: json.loads(STATISTICS.read_text())["cases"],
        "refused": lambda: json.loads(REFUSALS.read_text()),
    }
    for wanted in [kind] if kind else results:
        expected = results[wanted]()
        for case in listing():
            if case["kind"] == wanted:
                yield Golden(case["name"], case["config"], expected[case["name"]], wanted, case["inputs"])


def listing() -> list[dict[str, Any]]:
    """The entries of cases.yaml, with what they leave out."""
    return [{"inputs": "tiny", "seed": None} | case for case in yaml.safe_load(LISTING.read_text())]


def fingerprints() -> dict[str, str]:
    """The fingerprint that each set of inputs had when mergekit read it."""
    return json.loads(STATISTICS.read_text())["inputs"]


def pack(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """All values of a tiny model as one vector, tensors in the order of their names."""
    expected = inputs.shapes(1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name))
    found = {name: tensors[name].shape for name in sorted(tensors)}
    if found != expected:
        raise ValueError(f"not a Llama: {found}")
    return np.concatenate([tensors[name].ravel() for name in expected]).astype(np.float32)


def unpack(values: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a vector that `pack` made."""
    size = {layers: sum(map(np.prod, inputs.shapes(layers).values())) for layers in (0, 1)}
    layers = (values.size - size[0]) // (size[1] - size[0])
    found, start = {}, 0
    for name, shape in inputs.shapes(int(layers)).items():
        stop = start + int(np.prod(shape))
        found[name] = values[start:stop].reshape(shape)
        start = stop
    return found


def rows(samples: np.ndarray) -> dict[str, np.ndarray]:
    """The samples of each tensor of the real model, one row each. Its head is tied to the embeddings: not there."""
    names = [name for name in inputs.shapes((len(samples) - 2) // 9) if name != "lm_head.weight"]
    return dict(zip(names, samples, strict=True))
