"""Run mergekit on every case of cases.yaml and store what it made. Only for making the golden numbers anew.

    python -m venv ../mergekit && ../mergekit/bin/pip install mergekit==0.1.5 torch==2.13.0
    LFM_ASSETS=../shared/assets ../mergekit/bin/python -m tests.golden.mergekit.make

Runs in the folder of the repository, in mergekit's own environment, on one CPU thread; two runs write the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tests.golden.mergekit import golden, inputs

FILE = "model.safetensors"


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    assets = Path(os.environ.get("LFM_ASSETS", "../shared/assets")).resolve()
    with tempfile.TemporaryDirectory() as folder:
        for name in inputs.SETS:
            inputs.write(name, Path(folder) / name, assets)
        made = {case["name"]: _run(case, Path(folder)) for case in golden.listing()}
    kinds = {case["name"]: case["kind"] for case in golden.listing()}
    _store(made, kinds, {name: inputs.fingerprint(name, assets) for name in inputs.SETS})


def _run(case: dict[str, Any], folder: Path) -> Any:
    """What is to be stored of a case."""
    output = folder / "out" / case["name"]
    with contextlib.chdir(folder / case["inputs"]):
        try:
            _merge(case, output)
        except Exception as error:
            if case["kind"] != "refused":
                raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if case["kind"] == "refused":
        raise AssertionError(f"mergekit does not refuse {case['name']}")
    found = {name: tensor.float().numpy() for name, tensor in load_file(output / FILE).items()}
    if case["kind"] == "exact":
        return golden.pack(found)
    if case["kind"] == "sampled":
        return _samples(found)
    return _statistics(found, inputs.models(case["inputs"]))


def _merge(case: dict[str, Any], output: Path) -> None:
    LoaderCache.loaders.clear()  # it goes by relative path, and ./base is another model in the next folder
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=case["seed"], device="cpu"
    )
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(case["config"])), str(output), options)


def _samples(found: dict[str, np.ndarray]) -> np.ndarray:
    samples = np.stack([inputs.sample(name, found[name]) for name in sorted(found)])
    if list(golden.rows(samples)) != sorted(found):
        raise ValueError(f"not the tensors of the real model: {sorted(found)}")
    return samples


def _statistics(found: dict[str, np.ndarray], models: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Of a merge of one source into its base: how much is left of the change, and how it was scaled."""
    base, source = models["base"], models["a"]
    change = {name: source[name].astype(np.float64) - base[name] for name in sorted(base)}
    left = {name: found[name].astype(np.float64) - base[name] for name in change}
    pairs = [(change[name], left[name]) for name in change]
    before, after = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    kept = after != 0
    large = (np.abs(before) > 0.02) & kept
    factors = [np.median(y[y != 0] / x[y != 0]) for x, y in pairs]
    return {
        "elements": int(before.size),
        "kept": float(kept.mean()),
        "kept_by_rank": _kept_by_rank(pairs),
        "l1_ratio": float(np.abs(after).sum() / np.abs(before).sum()),
        "l1_ratio_of_tensor": [float(f(np.abs(y).sum() / np.abs(x).sum() for x, y in pairs)) for f in (min, max)],
        "factor": float(np.mean(after[large] / before[large])),
        "factor_of_tensor": [float(min(factors)), float(max(factors))],
        "mean": float(after.mean()),
        "mean_of_change": float(before.mean()),
        "second_moment": float(np.square(after).mean()),
        "second_moment_of_change": float(np.square(before).mean()),
    }


def _kept_by_rank(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """The share kept of each fifth of the magnitudes of a row, the smallest first; a vector is one row."""
    counts = np.zeros((2, 5))
    for change, left in pairs:
        size = np.abs(np.atleast_2d(change))
        rank = np.argsort(np.argsort(size, axis=1), axis=1)
        fifth = rank * 5 // size.shape[1]
        for part in range(5):
            counts[:, part] += (np.atleast_2d(left)[fifth == part] != 0).sum(), (fifth == part).sum()
    return list(counts[0] / counts[1])


def _store(made: dict[str, Any], kinds: dict[str, str], fingerprints: dict[str, str]) -> None:
    of_kind = {kind: {name: made[name] for name in made if kinds[name] == kind} for kind in sorted(set(kinds.values()))}
    save_file(of_kind["exact"], golden.EXACT)
    save_file(of_kind["sampled"], golden.SAMPLED)
    _write(golden.STATISTICS, {"inputs": fingerprints, "cases": of_kind["statistics"]})
    _write(golden.REFUSALS, of_kind["refused"])


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
