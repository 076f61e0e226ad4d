"""Merges by masks and by balances of weights: slow references from the papers, FusionBench, and properties."""

import math

import numpy as np
import pytest
import torch
import yaml
from tests.golden.fusionbench import inputs as fusionbench
from tests.merging import load, merge, near, save, tensors

import lfm
from lfm.errors import RequestError
from lfm.reuse.merge.consensus import Consensus
from lfm.reuse.merge.emr import Emr
from lfm.reuse.merge.pcb import Pcb
from lfm.reuse.merge.task_arithmetic import TaskArithmetic

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "embed.weight": (16, 5),
    "layers.0.bias": (7,),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.1.weight": (6, 6),
    "none": (0, 4),
    "scale": (),
}
LAYERS = [["embed.weight"], ["layers.0.bias", "layers.0.conv"], ["layers.1.weight"], ["none"], ["scale"]]
BASE = tensors(0, shapes=SHAPES)
SOURCES = [near(BASE, seed, size) for seed, size in ((1, 0.1), (2, 0.2), (3, 0.05))]
WEIGHTS = [0.5, 2.0, -0.75]
ALL = [Consensus(), Consensus(task=1), Emr(), Emr(task=2), Pcb(), Pcb(ratio=0.5, scope="tensor")]


def cast(model, dtype):
    return {name: tensor.to(dtype) for name, tensor in model.items()}


def flat(model, names=SHAPES):
    return np.concatenate([model[name].double().numpy().ravel() for name in names])


def changes(base, sources, names=SHAPES):
    """The task vectors of some tensors, rounded to float32 as the arithmetic of merging is."""
    return [(flat(source, names).astype("f4") - flat(base, names).astype("f4")).astype("f8") for source in sources]


def agrees(found, expected, dtype=torch.float32, names=SHAPES):
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    np.testing.assert_allclose(flat(found, names), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# --- the papers, element by element


def tall_mask(tau, multitask, sparsity):
    return [abs(t) >= abs(m - t) * sparsity for t, m in zip(tau, multitask, strict=True)]


def multitask(taus, weights):
    return sum(np.float64(np.float32(tau * weight)) for tau, weight in zip(taus, weights, strict=True))


def consensus(taus, weights, sparsities, least):
    summed = multitask(taus, weights)
    masks = [tall_mask(tau, summed, sparsity) for tau, sparsity in zip(taus, sparsities, strict=True)]
    return np.array([value if sum(mask[i] for mask in masks) >= least else 0.0 for i, value in enumerate(summed)])


def unified(taus):
    merged = np.zeros(len(taus[0]))
    for i in range(len(merged)):
        elected = np.sign(sum(tau[i] for tau in taus))
        merged[i] = elected * max([abs(tau[i]) for tau in taus if np.sign(tau[i]) == elected], default=0.0)
    return merged


def emr_of_task(taus, task):
    merged, tau = unified(taus), taus[task]
    masked = [m if t * m > 0 else 0.0 for t, m in zip(tau, merged, strict=True)]
    return sum(abs(tau)) / sum(np.abs(masked)) * np.array(masked)


def norm(values):
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


def clipped(values, low, high):
    """Each value between the two that come at these places from the smallest."""
    ordered = sorted(values)
    return [min(max(value, ordered[low]), ordered[high]) for value in values]


def pcb(taus, weights, ratio, clip):
    size, tasks = len(taus[0]), len(taus)
    top, least = np.zeros(size), np.zeros(size)
    for tau, weight in zip(taus, weights, strict=True):
        sizes = clipped(abs(tau), int(size * clip), int(size * (1 - clip) - 1))
        intra = [math.exp(tasks * share**2) for share in norm(sizes)]
        inter = [math.tanh(t * sum(other[i] for other in taus)) for i, t in enumerate(tau)]
        balance = [a * b for a, b in zip(intra, inter, strict=True)]
        share = np.array(norm(clipped(balance, int(size * (1 - ratio)), size - 1)))
        top += weight * share * np.sign(tau) * sizes
        least += share
    return top / np.maximum(least, 1e-12)


# --- against them


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("least", "sparsity"), [(0, 0.4), (1, 1.2), (2, 0.9), (3, 0.4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_consensus(tmp_path, dtype, least, sparsity, weights):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(Consensus(min_tasks=least, sparsity=sparsity, scale=0.7), sources, base, at=tmp_path, weights=weights)
    merged = consensus(changes(base, sources), weights or [1] * 3, [sparsity] * 3, least)
    agrees(found, flat(base) + 0.7 * merged, dtype)
    assert least == 0 or 0.05 < np.mean(merged == 0) < 0.95


@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_rebuilt_from_its_mask(tmp_path, dtype, task):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(Consensus(task=task, sparsity=0.6), sources, base, at=tmp_path, weights=WEIGHTS)
    taus = changes(base, sources)
    summed = multitask(taus, WEIGHTS)
    mask = tall_mask(taus[task], summed, 0.6)
    agrees(found, flat(base) + np.where(mask, summed, 0), dtype)
    assert 0.05 < np.mean(mask) < 0.95


def test_masks_may_be_stricter_for_some_models(tmp_path):
    paths = {f"s{index}": str(save(tmp_path / f"s{index}", source)) for index, source in enumerate(SOURCES)}
    step = {"merge": "consensus", "models": list(paths), "base": "base", "scale": 1.0}
    step["vary"] = {"sparsity": {"per_model": [0.2, 0.9, 1.5]}}
    models = {"base": str(save(tmp_path / "base", BASE)), **paths}
    recipe = {"lfm": 1, "models": models, "steps": {"merged": step}, "out": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run,) = lfm.run(tmp_path / "recipe.yaml", settings=lfm.Settings(threads=1, quiet=True))
    agrees(load(run.folder), flat(BASE) + consensus(changes(BASE, SOURCES), [1] * 3, [0.2, 0.9, 1.5], 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_emr(tmp_path, dtype):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    taus = changes(base, sources)
    agrees(merge(Emr(), sources, base, at=tmp_path), flat(base) + unified(taus), dtype)
    for task in range(3):
        found = merge(Emr(task=task), sources, base, at=tmp_path)
        agrees(found, flat(base) + emr_of_task(taus, task), dtype)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 1e-4), (0.05, 0.01), (0.5, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pcb(tmp_path, dtype, ratio, clip, weights):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(Pcb(ratio=ratio, clip=clip, scale=0.9), sources, base, at=tmp_path, weights=weights)
    merged = pcb(changes(base, sources), weights or [1] * 3, ratio, clip)
    agrees(found, flat(base) + 0.9 * merged, dtype)
    assert np.abs(merged).max() > 0.05


@pytest.mark.parametrize("scope", ["tensor", "layer"])
def test_pcb_of_parts_of_a_model(tmp_path, scope):
    found = merge(Pcb(ratio=0.3, scope=scope), SOURCES, BASE, at=tmp_path)
    for names in LAYERS if scope == "layer" else [[name] for name in SHAPES]:
        taus = changes(BASE, SOURCES, names)
        merged = pcb(taus, [1] * 3, 0.3, 1e-4) if len(taus[0]) > 1 else np.zeros(len(taus[0]))
        agrees(found, flat(BASE, names) + merged, names=names)


def test_pcb_where_all_balances_are_negative(tmp_path):
    """Then the quantile is looked for among the small ones: the reference sorts, and does not mind."""
    base = {"a": torch.zeros(40)}
    generator = torch.Generator().manual_seed(0)
    ones, noise = torch.rand(40, generator=generator) + 1, torch.rand(40, generator=generator) / 10
    sources = [{"a": -ones}, {"a": 2 + noise}]
    taus = [source["a"].double().numpy() for source in sources]
    assert (taus[0] * sum(taus) < 0).any()
    for ratio in (0.02, 0.3, 0.9, 1.0):
        found = merge(Pcb(ratio=ratio), sources, base, at=tmp_path)["a"]
        if ratio == 0.02:  # the quantile is the largest itself: nothing is above it
            assert not found.any()
        else:
            np.testing.assert_allclose(found, pcb(taus, [1, 1], ratio, 1e-4), rtol=1e-5, atol=1e-6)


# --- against FusionBench

GOLDEN = {
    "consensus 1": Consensus(min_tasks=1, scale=1),
    "consensus 2": Consensus(min_tasks=2, scale=1),
    "consensus 3": Consensus(min_tasks=3, scale=1),
    **{f"consensus task {task}": Consensus(task=task) for task in range(3)},
    "emr": Emr(),
    **{f"emr task {task}": Emr(task=task) for task in range(3)},
}


@pytest.mark.parametrize("case", GOLDEN)
def test_fusionbench_makes_the_same(tmp_path, case):
    base, sources = fusionbench.models("even" if case.startswith("emr") else "mixed")
    as_tensors = [{name: torch.from_numpy(value) for name, value in model.items()} for model in (base, *sources)]
    found = merge(GOLDEN[case], as_tensors[1:], as_tensors[0], at=tmp_path)
    for name, change in fusionbench.expected()[case].items():
        np.testing.assert_allclose(found[name].numpy() - base[name], change, rtol=1e-4, atol=2e-8)


# --- properties


def test_consensus_of_no_tasks_is_task_arithmetic(tmp_path):
    one = merge(Consensus(min_tasks=0), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    two = merge(TaskArithmetic(), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    none = merge(Consensus(min_tasks=4), SOURCES, BASE, at=tmp_path)
    for name in BASE:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(none[name], BASE[name])


def test_masks_of_tasks_that_share_no_weight_give_back_their_models(tmp_path):
    sources = []
    for task in range(3):
        source = {name: tensor.clone() for name, tensor in BASE.items()}
        source["layers.1.weight"][2 * task : 2 * task + 2] += 0.1
        sources.append(source)
    for method in (Consensus, Emr):
        for task, source in enumerate(sources):
            found = merge(method(task=task), sources, BASE, at=tmp_path)
            for name in BASE:
                torch.testing.assert_close(found[name], source[name], rtol=1e-6, atol=1e-7)


def test_emr_keeps_the_length_of_a_task_vector(tmp_path):
    for task, source in enumerate(SOURCES):
        found = merge(Emr(task=task), SOURCES, BASE, at=tmp_path)
        expected = np.abs(flat(source) - flat(BASE)).sum()
        np.testing.assert_allclose(np.abs(flat(found) - flat(BASE)).sum(), expected, rtol=1e-5)


def test_where_changes_cancel_the_base_stays(tmp_path):
    base, other = {"a": torch.tensor([-0.0, 1.0, 2.0])}, {"a": torch.tensor([-0.0, 1.5, 2.25])}
    sources = [other, {"a": 2 * base["a"] - other["a"]}]
    for method in (Emr(), Emr(task=0), Consensus(), Pcb(ratio=1)):
        assert merge(method, sources, base, at=tmp_path)["a"].numpy().tobytes() == base["a"].numpy().tobytes()


@pytest.mark.parametrize("method", [Consensus(task=3), Emr(task=3)])
def test_a_task_that_is_not_there(tmp_path, method):
    with pytest.raises(RequestError, match="task: got 3, with 3 models to merge: they count from 0, so 2 is the last"):
        merge(method, SOURCES, BASE, at=tmp_path)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_where_nothing_changed_the_base_stays_bit_for_bit(tmp_path, method):
    base = {**BASE, "odd": torch.tensor([-0.0, 0.0, 1e-40, -1e-44, 3e38, 1.0])}
    found = merge(method, [base] * 3, base, at=tmp_path)
    assert all(found[name].numpy().tobytes() == base[name].numpy().tobytes() for name in base)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_equal_models_give_finite_numbers(tmp_path, method):
    found = merge(method, [SOURCES[0]] * 3, BASE, at=tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    shifted = [{name: tensor + 0.25 for name, tensor in BASE.items()}] * 3
    assert all(torch.isfinite(tensor).all() for tensor in merge(method, shifted, BASE, at=tmp_path).values())


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_threads_make_no_difference(tmp_path, method):
    shapes = {f"layers.{index}.weight": (300 + index, 350) for index in range(3)}
    base = tensors(0, shapes=shapes)
    sources = [near(base, seed) for seed in (1, 2, 3)]
    one, two = (merge(method, sources, base, at=tmp_path, threads=threads) for threads in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in base)


def test_pcb_of_many_weights(tmp_path):
    """Enough of them that quantiles are found by counting; by sorting, in float64, come out the same."""
    shapes = {"a": (300, 200), "b": (200, 150)}
    base = tensors(0, shapes=shapes)
    sources = [near(base, seed, 2e-3) for seed in (1, 2)]
    found = merge(Pcb(clip=0.01), sources, base, at=tmp_path)
    expected = flat(base, shapes) + pcb_by_sorting(changes(base, sources, shapes), 0.1, 0.01)
    np.testing.assert_allclose(flat(found, shapes), expected, rtol=1e-7, atol=1e-6)


def pcb_by_sorting(taus, ratio, clip):
    size, tasks, together = len(taus[0]), len(taus), sum(taus)
    top, least = np.zeros(size), np.zeros(size)
    for tau in taus:
        ordered = np.sort(abs(tau))
        sizes = abs(tau).clip(ordered[int(size * clip)], ordered[int(size * (1 - clip) - 1)])
        balance = np.exp(tasks * ((sizes - sizes.min()) / np.ptp(sizes)) ** 2) * np.tanh(tau * together)
        balance = np.maximum(balance, np.sort(balance)[int(size * (1 - ratio))])
        share = (balance - balance.min()) / np.ptp(balance)
        top += share * np.sign(tau) * sizes
        least += share
    return top / np.maximum(least, 1e-12)
