"""Two real networks joined: the small version of benchmarks/ensemble.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lfm
from lfm.recipe.step import Settings
from lfm.reuse.ensemble.average import Average
from lfm.reuse.ensemble.cascade import Cascade

NETS = Path(__file__).parents[1] / "nets.py"
QUIET = Settings(quiet=True)
IMAGE = {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def networks(assets):
    return {
        name: {"ref": str(assets / "checkpoints" / f"cifar10-{name}"), "module": f"{NETS}:{name}", "image": IMAGE}
        for name in ("resnet20", "resnet56")
    }


def every(step, path, to):
    """Write a file with every so-maniest image of another one, which is sorted by class."""
    found, content = dict(np.load(path)), {}
    for split in ("train", "test"):
        offsets, raw = found[f"offsets_{split}"], found[f"jpeg_{split}"]
        kept = range(0, len(offsets) - 1, step)
        parts = [raw[offsets[i] : offsets[i + 1]] for i in kept]
        content[f"jpeg_{split}"] = np.concatenate(parts)
        content[f"offsets_{split}"] = np.cumsum([0, *map(len, parts)]).astype(offsets.dtype)
        content[f"y_{split}"] = found[f"y_{split}"][list(kept)]
    np.savez(to, **content)
    return {"path": str(to)}


def test_two_networks_are_likelier_than_either_and_a_cascade_asks_the_large_one_seldom(assets, networks, tmp_path):
    data = every(40, assets / "data" / "cifar10-jpeg.npz", tmp_path / "cifar10-jpeg.npz")
    held = {**data, "split": "train"}
    models = list(networks.values())
    both = {"out": tmp_path / "both", "data": held, "calibrate": "members", "settings": QUIET}
    lfm.ensemble(Average(), models, **both)
    lfm.ensemble(Cascade(quality=0.99), models, out=tmp_path / "cascade", data=held, settings=QUIET)
    named = [*models, str(tmp_path / "both"), str(tmp_path / "cascade")]
    found = lfm.evaluate(named, {"accuracy": {**data, "split": "test"}}, settings=QUIET)
    accuracy, nll = (
        {name.rpartition("-")[2]: estimate.value for name, estimate in item.estimates.items()} for item in found[:2]
    )
    assert nll["both"] < 0.8 * min(nll["resnet20"], nll["resnet56"])
    assert accuracy["both"] > (accuracy["resnet20"] + accuracy["resnet56"]) / 2  # 250 images cannot tell much more
    assert accuracy["cascade"] > min(accuracy["resnet20"], accuracy["resnet56"]) - 1
    metrics = json.loads((tmp_path / "cascade" / "lineage.json").read_text())["metrics"]
    assert 0 < metrics["threshold"] < 1
    assert metrics[f"share asked of {networks['resnet56']['ref']} at threshold 0.9"] < 0.5
