"""The models that the golden merges start from, made from seeds by numpy alone; and how their results are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

RESULTS = Path(__file__).parent / "results.safetensors"
TASKS = 3
# `mixed` has matrices of all proportions and tensors that are none; those of `even` are of one size.
SETS = {
    "mixed": {
        "bias": (16,),
        "conv.weight": (6, 4, 3, 3),
        "square.weight": (20, 20),
        "tall.weight": (26, 16),
        "wide.weight": (14, 26),
    },
    "even": {"bias": (240,), "square.weight": (15, 16), "wide.weight": (6, 40)},
}
Model = dict[str, np.ndarray]


def models(name: str) -> tuple[Model, list[Model]]:
    """The base and the fine-tunes of a set, float32; changes have a part that all share, and sizes of their own."""
    generator = np.random.default_rng(list(SETS).index(name))
    shared = _noise(name, generator, 2e-3)
    base = _noise(name, generator, 0.05)
    sources = []
    for task in range(TASKS):
        own = _noise(name, generator, 2e-3 * (task + 1))
        sources.append({key: base[key] + shared[key] + own[key] for key in base})
    return base, sources


def _noise(name: str, generator: np.random.Generator, size: float) -> Model:
    return {key: (generator.standard_normal(shape) * size).astype(np.float32) for key, shape in SETS[name].items()}


def expected() -> dict[str, Model]:
    """What FusionBench made of each case: the merged task vector, as {tensor: values}."""
    found: dict[str, Model] = {}
    for key, values in load_file(RESULTS).items():
        case, _, tensor = key.partition("/")
        found.setdefault(case, {})[tensor] = values
    return found
