"""What is read to tell who is related to whom: little, evenly spread, and enough to estimate the rest."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.checkpoint import Checkpoint, Spec, Weights
from lfm.checkpoint._sample import BLOCK, sample
from lfm.checkpoint.kinship import BLOCKS, FEW_BLOCKS, Verdict, kinship, strangers


class Made(Weights):
    """Weights that are computed where they are read, and count what is read."""

    def __init__(self, shapes, seed=0):
        self._specs = {name: Spec("F32", shape) for name, shape in shapes.items()}
        self.seed, self.count, self.reads = seed, 0, 0

    @property
    def specs(self):
        return self._specs

    def read(self, name, start=0, stop=None):
        raise AssertionError("torch is not needed")

    def read_into(self, name, start, out):
        self.count += len(out)
        self.reads += 1
        place = np.arange(start, start + len(out), dtype=np.uint64) + np.uint64(len(name) << 40)
        mixed = (place * np.uint64(0x9E3779B97F4A7C15)) ^ (place >> np.uint64(7)) * np.uint64(0xD1B54A32D192ED03)
        moved = np.sin((mixed >> np.uint64(40)).astype(np.float32) * np.float32(1 + self.seed))
        out[:] = ((mixed >> np.uint64(33)).astype(np.float32) / 2**30 - 1) + np.float32(0.01) * moved


@pytest.mark.parametrize(
    "shapes",
    [
        {f"layers.{layer}.{part}.weight": (4096, 4096) for layer in range(64) for part in "qkvogud"},
        {f"experts.{expert}.{part}": (512, 512) for expert in range(6000) for part in ("gate", "up", "down")},
        {"one": (1 << 17, 1 << 17)},
    ],
)
def test_however_large_the_model_only_a_sample_is_read(shapes):
    models = [Checkpoint(str(seed), Made(shapes, seed), Path()) for seed in range(2)]
    found = kinship(models)
    assert found.pairs[0].verdict is Verdict.SIBLINGS
    assert found.pairs[0].shared == len(shapes)
    assert 0 < found.compared < 0.01
    assert models[0].weights.count <= BLOCKS * BLOCK
    before = models[0].weights.count
    assert strangers(models) == []
    assert models[0].weights.count - before <= FEW_BLOCKS * BLOCK


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3 * BLOCK), max_size=12), st.integers(1, 40))
def test_a_sample_lies_within_its_tensors_and_touches_nothing_twice(sizes, blocks):
    shapes = {f"t{index}": (size,) for index, size in enumerate(sizes)}
    units, part = sample([Made(shapes), Made(shapes)], blocks)
    assert len(units) <= min(len(sizes), blocks)
    assert len(units) == len(sizes) or len(sizes) > blocks
    for unit in units:
        ends = [0, *itertools.chain.from_iterable(unit.parts), unit.spec.size]
        assert ends == sorted(ends)
        assert all(start < stop for start, stop in unit.parts)
    assert sum(unit.read for unit in units) <= BLOCK * blocks
    assert part == pytest.approx(sum(unit.read for unit in units) / max(1, sum(sizes)))
    everything, part = sample([Made(shapes), Made(shapes)], None)
    assert [unit.read for unit in everything] == [shapes[unit.name][0] for unit in everything]
    assert part == (1 if sizes else 0)


def test_blocks_are_spread_over_tensors_and_layers():
    shapes = {f"layers.{layer:03}.{part}": (4096, 64) for layer in range(200) for part in "abcdefg"}
    units, _ = sample([Made(shapes), Made(shapes)], 128)
    assert len(units) > 120
    count = {part: sum(unit.name.endswith(part) for unit in units) for part in "abcdefg"}
    assert min(count.values()) > 10
    [unit], _ = sample([Made({"w": (1 << 24,)}), Made({"w": (1 << 24,)})], 64)
    starts = [start / (1 << 24) for start, _ in unit.parts]
    assert [int(start * 64) for start in starts] == list(range(64))
    assert len({round(start * 64 % 1, 3) for start in starts}) > 50


def test_a_sample_estimates_what_everything_gives():
    shapes = {f"layers.{layer}.weight": (1024, 2048) for layer in range(4)}
    models = [Checkpoint(str(seed), Made(shapes, seed), Path()) for seed in range(3)]
    some, everything = kinship(models, models[0]), kinship(models, models[0], everything=True)
    assert some.compared < 0.3 < everything.compared == 1
    for one, two in zip(some.pairs, everything.pairs, strict=True):
        assert one.distance == pytest.approx(two.distance, rel=0.02)
        assert one.cosine == pytest.approx(two.cosine, abs=1e-4)
    for one, two in zip(some.task_pairs, everything.task_pairs, strict=True):
        assert one.cosine == pytest.approx(two.cosine, abs=0.01)
        assert one.sign_conflict == pytest.approx(two.sign_conflict, abs=0.01)


def test_types_that_numpy_cannot_read_are_left_out():
    weights, bytes_ = Made({"w": (64, 64)}), Made({"w": (64, 64)})
    weights._specs["codes"], bytes_._specs["codes"] = Spec("F4", (64, 64)), Spec("U8", (64, 64))
    for models in itertools.product((weights, bytes_), (weights, bytes_)):
        if models != (bytes_, bytes_):
            [found] = kinship([Checkpoint("x", each, Path()) for each in models]).pairs
            assert (found.shared, found.equal, found.verdict) == (2, 1, Verdict.SIBLINGS)
