"""Merging real fine-tunes: the benchmark of quality, made small. Whatever is merged has to be good for something."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lfm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUIET = lfm.Settings(threads=1, quiet=True)


@pytest.fixture(scope="module")
def benchmark_module():
    """What imports a module of the benchmark, which is a folder of scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def language(assets, benchmark_module, tmp_path_factory):
    """The language family, with fine-tunes of a few steps on two of its tasks."""
    sizes = {"steps": 20, "batch_size": 4, "test": 12}
    family = benchmark_module("_language").Language(assets, tmp_path_factory.mktemp("language"), **sizes)
    for task in ("Shakespeare", "instructions"):
        family.make(task)
    return family


@pytest.fixture(scope="module")
def vision(assets, benchmark_module, tmp_path_factory):
    """The vision family, with fine-tunes of a few steps on the two tasks that are new to its base."""
    sizes = {"steps": 30, "batch_size": 32, "probe": 400, "test": 150, "unlabelled": 100}
    family = benchmark_module("_vision").Vision(assets, tmp_path_factory.mktemp("vision"), **sizes)
    for task in ("MNIST", "Fashion"):
        family.make(task)
    return family


def merge(family, tasks, out, name, **settings):
    method = lfm.cards()["merge", name].load()(**settings)
    lfm.merge(method, [family.source(task) for task in tasks], base=family.base, out=out, settings=QUIET)
    return out


@pytest.mark.parametrize(("name", "settings"), [("linear", {}), ("task_arithmetic", {"scale": 0.6}), ("ties", {})])
def test_a_merge_of_language_models_is_better_on_the_mean_than_each_of_them(language, tmp_path, name, settings):
    tasks = ("Shakespeare", "instructions")

    def nats(weights: Path) -> float:
        samples = [language.recall(weights, task, "test", "as merged") for task in tasks]
        return float(np.mean([sample.sums.sum() / sample.counts.sum() for sample in samples]))

    merged = merge(language, tasks, tmp_path / "merged", name, **settings)
    assert nats(merged) < min(nats(model) for model in (language.base, *map(language.source, tasks)))


def test_what_is_measured_is_what_lfm_measures(language):
    source = language.source("instructions")
    rows = {"path": language.path("instructions-1100.json"), "part": "held_out", "held_out": 0.1}
    found = lfm.evaluate([source], {"perplexity": {"instructions": rows}}, settings=QUIET)
    [theirs] = [one.estimates[source.name].value for one in found if one.unit == "per token"]
    whole = replace(language, test=10_000).measure(source, "instructions", "test", "as merged")
    assert np.exp(whole.sums.sum() / whole.counts.sum()) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("name", "settings"), [("task_arithmetic", {"scale": 0.7}), ("ties", {"density": 0.5})])
def test_a_merge_of_backbones_is_better_than_the_base_on_tasks_that_are_new_to_it(vision, tmp_path, name, settings):
    tasks = ("MNIST", "Fashion")
    as_is, recomputed = vision.variants

    def right(weights: Path, variant: str) -> float:
        return float(np.mean([vision.recall(weights, task, "test", variant).sums for task in tasks]))

    merged = merge(vision, tasks, tmp_path / "merged", name, **settings)
    assert right(merged, recomputed) > right(vision.base, as_is) + 0.02  # which is a linear probe


def test_measurements_are_recalled_for_equal_weights_alone(language):
    def files():
        language.recall(language.base, "instructions", "test", "as merged")
        return {file.name: file.stat().st_mtime_ns for file in (language.work / "scores").iterdir()}

    before = files()
    assert files() == before
    language.recall(language.source("Shakespeare"), "instructions", "validation", "as merged")
    assert len(files()) == len(before) + 1
