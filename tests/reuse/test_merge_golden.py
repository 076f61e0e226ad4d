"""Merging methods against slow float64 references, written element by element from the papers."""

import math

import numpy as np
import pytest
import torch
from tests.merging import SHAPES, merge, near, tensors

from lfm.reuse.merge.dare import Dare
from lfm.reuse.merge.linear import Linear
from lfm.reuse.merge.slerp import Slerp
from lfm.reuse.merge.task_arithmetic import TaskArithmetic
from lfm.reuse.merge.ties import Ties
from lfm.reuse.merge.wise_ft import WiseFt

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASE = tensors(0)
SOURCES = [near(BASE, seed) for seed in (1, 2, 3)]
WEIGHTS = [0.5, 2.0, -0.75]


def double(model):
    """All of a model as one float64 vector, in the order of the names."""
    return np.concatenate([model[name].double().numpy().ravel() for name in SHAPES])


def cast(model, dtype):
    return {name: tensor.to(dtype) for name, tensor in model.items()}


def each_tensor(method, *models):
    """Apply a method of float64 vectors to each tensor by itself."""
    vectors = [method(*(model[name].double().numpy().ravel() for model in models)) for name in SHAPES]
    return np.concatenate(vectors)


def agrees(found, expected, dtype=torch.float32):
    """Whether a merged model is `expected`, to within the rounding of its type and of sums in float32."""
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    np.testing.assert_allclose(double(found), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)
    return True


# --- the papers


def linear(sources, weights, normalize):
    total = sum(weights) if normalize else 1
    return sum(weight * source for weight, source in zip(weights, sources, strict=True)) / total


def task_arithmetic(base, sources, weights, scale):
    return base + scale * sum(weight * (source - base) for weight, source in zip(weights, sources, strict=True))


def slerp(a, b, t):
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    phi = math.acos(min(1, max(-1, cosine)))
    if math.sin(phi) < 1e-6:
        return (1 - t) * a + t * b
    return math.sin((1 - t) * phi) / math.sin(phi) * a + math.sin(t * phi) / math.sin(phi) * b


def trim(tau, density):
    """Keep the largest of a task vector, and all that are as large as the smallest one kept."""
    least = sorted(abs(tau), reverse=True)[max(int(density * len(tau)), 1) - 1]
    return np.where(abs(tau) >= least, tau, 0)


def elect_and_average(taus, weights):
    merged = np.zeros_like(taus[0])
    for i in range(len(merged)):
        weighted = [weight * tau[i] for weight, tau in zip(weights, taus, strict=True)]
        sign = np.sign(sum(weighted))
        agreeing = [j for j, value in enumerate(weighted) if value != 0 and np.sign(value) == sign]
        if agreeing:
            merged[i] = sum(weighted[j] for j in agreeing) / sum(abs(weights[j]) for j in agreeing)
    return merged


def ties(base, sources, weights, density, scale):
    taus = [trim(source - base, density) for source in sources]
    return base + scale * elect_and_average(taus, weights)


# --- each against its paper


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_average(normalize, dtype, tmp_path):
    sources = [cast(source, dtype) for source in SOURCES]
    found = merge(Linear(normalize=normalize), sources, at=tmp_path, weights=WEIGHTS)
    assert agrees(found, linear([double(source) for source in sources], WEIGHTS, normalize), dtype)


def test_linear_without_weights_is_the_mean(tmp_path):
    assert agrees(merge(Linear(), SOURCES, at=tmp_path), np.mean([double(source) for source in SOURCES], axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_arithmetic_adds_weighted_task_vectors(dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(TaskArithmetic(scale=0.4), sources, base, at=tmp_path, weights=WEIGHTS)
    expected = task_arithmetic(double(base), [double(source) for source in sources], WEIGHTS, 0.4)
    assert agrees(found, expected, dtype)


def test_a_negative_task_vector_takes_back_what_was_added(tmp_path):
    there = merge(TaskArithmetic(scale=1), SOURCES[:1], BASE, at=tmp_path)
    back = merge(TaskArithmetic(scale=-1), SOURCES[:1], there, at=tmp_path)
    expected = double(there) - (double(SOURCES[0]) - double(there))
    assert agrees(back, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0, 0.3, 1])
def test_slerp_follows_the_arc_of_each_tensor(t, dtype, tmp_path):
    models = [cast(tensors(seed), dtype) for seed in (1, 2)]
    found = merge(Slerp(t=t), models, at=tmp_path)
    assert agrees(found, each_tensor(lambda a, b: slerp(a, b, t), *models), dtype)


def test_slerp_keeps_the_norm_of_equally_long_vectors(tmp_path):
    a = {"w": torch.tensor([3.0, 4.0, 0.0])}
    b = {"w": torch.tensor([0.0, 0.0, 5.0])}
    for t in (0.25, 0.5):
        assert merge(Slerp(t=t), [a, b], at=tmp_path)["w"].norm().item() == pytest.approx(5)


@pytest.mark.parametrize("factor", [0, 1, 2, -1])
def test_slerp_is_linear_where_there_is_no_arc(factor, tmp_path):
    a = tensors(1)
    b = {name: tensor * factor for name, tensor in a.items()}
    assert agrees(merge(Slerp(t=0.3), [a, b], at=tmp_path), 0.7 * double(a) + 0.3 * double(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.77, 1])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_trims_elects_and_averages(scope, density, weights, dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(Ties(density=density, scale=1.5, scope=scope), sources, base, at=tmp_path, weights=weights)

    def reference(base, *sources):
        return ties(base, sources, weights, density, 1.5)

    if scope == "model":
        expected = reference(*(double(model) for model in (base, *sources)))
    else:
        expected = each_tensor(reference, base, *sources)
    assert agrees(found, expected, dtype)


def test_ties_trims_a_model_as_a_whole(tmp_path):
    """A tensor whose changes are all small loses them all, unless every tensor is trimmed by itself."""
    base = {"small": torch.zeros(50), "large": torch.zeros(50)}
    source = {"small": torch.full((50,), 1e-3), "large": torch.ones(50)}
    whole = merge(Ties(density=0.5), [source, source], base, at=tmp_path)
    each = merge(Ties(density=0.5, scope="tensor"), [source, source], base, at=tmp_path)
    assert not whole["small"].any()
    assert whole["large"].all()
    assert each["small"].all()


def test_ties_keeps_all_that_are_as_large_as_the_smallest_kept(tmp_path):
    base = {"w": torch.zeros(6)}
    source = {"w": torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])}
    found = merge(Ties(density=0.34), [source, source], base, at=tmp_path)
    assert found["w"].tolist() == [3, -2, 2, 2, 0, 0]


def test_ties_elects_nothing_where_signs_balance(tmp_path):
    base = {"w": torch.tensor([7.0, 7.0, 7.0])}
    sources = [{"w": torch.tensor([8.0, 9.0, 7.0])}, {"w": torch.tensor([6.0, 6.0, 7.0])}]
    found = merge(Ties(density=1), sources, base, at=tmp_path)
    assert found["w"].tolist() == [7, 9, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_wise_ft_interpolates(dtype, tmp_path):
    base, tuned = cast(BASE, dtype), cast(SOURCES[0], dtype)
    found = merge(WiseFt(alpha=0.3), [tuned], base, at=tmp_path)
    assert agrees(found, 0.7 * double(base) + 0.3 * double(tuned), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wise_ft_returns_its_ends_bit_for_bit(dtype, tmp_path):
    base, tuned = cast(BASE, dtype), cast(SOURCES[0], dtype)
    for alpha, end in ((0, base), (1, tuned)):
        found = merge(WiseFt(alpha=alpha), [tuned], base, at=tmp_path)
        assert all(torch.equal(found[name], end[name]) for name in SHAPES)


@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_is_rounded_once_to_the_type_asked_for(dtype, output, tmp_path):
    sources = [cast(source, dtype) for source in SOURCES[:2]]
    found = merge(Linear(), sources, at=tmp_path, dtype=output)
    for name in SHAPES:
        exact = (sources[0][name].float() + sources[1][name].float()) / 2
        assert torch.equal(found[name], exact.to(getattr(torch, output)))


# --- DARE: masks are random, their laws are not

ZEROS = {"one": torch.zeros(20_000), "two": torch.zeros(20_000)}
ONES = {name: torch.ones(20_000) for name in ZEROS}
TENS = {name: torch.full((20_000,), 10.0) for name in ZEROS}


def masks(at, sources, density=0.3, seed=0):
    """Return which elements of each source are kept: sources are powers of ten times one."""
    found = merge(Dare(density=density), sources, ZEROS, at=at, seed=seed)
    kept = {name: (tensor * density).round() for name, tensor in found.items()}
    return [{name: (value // 10**digit) % 10 == 1 for name, value in kept.items()} for digit in range(len(sources))]


def correlation(a, b):
    return np.corrcoef(a.numpy(), b.numpy())[0, 1]


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_dare_keeps_its_share_and_rescales_it(density, tmp_path):
    found = merge(Dare(density=density), [ONES], ZEROS, at=tmp_path)
    values = torch.cat(list(found.values()))
    torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], 1 / density))
    sigma = math.sqrt(density * (1 - density) / len(values))
    assert (values != 0).double().mean().item() == pytest.approx(density, abs=4 * sigma)


def test_dare_at_density_one_is_task_arithmetic(tmp_path):
    found = merge(Dare(density=1, scale=0.4), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    expected = task_arithmetic(double(BASE), [double(source) for source in SOURCES], WEIGHTS, 0.4)
    assert agrees(found, expected)


def test_dare_is_task_arithmetic_on_average(tmp_path):
    seeds = 40
    found = [merge(Dare(), SOURCES, BASE, at=tmp_path, seed=seed, weights=WEIGHTS) for seed in range(seeds)]
    vectors = np.stack([double(model) for model in found])
    expected = task_arithmetic(double(BASE), [double(source) for source in SOURCES], WEIGHTS, 1)
    error = (vectors.mean(0) - expected) / (vectors.std(0) / math.sqrt(seeds))
    assert abs(error).max() < 4.5
    assert abs(error.mean()) < 4.5 / math.sqrt(len(expected))


def test_dare_masks_of_sources_tensors_places_and_seeds_are_independent(tmp_path):
    one, ten = masks(tmp_path, [ONES, TENS])
    (other_seed,) = masks(tmp_path, [ONES], seed=1)
    pairs = [
        (one["one"], ten["one"]),
        (one["one"], one["two"]),
        (one["one"], other_seed["one"]),
        *((one["one"][:-lag], one["one"][lag:]) for lag in (1, 2, 3, 4, 8)),
    ]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 4 / math.sqrt(20_000)


def test_dare_masks_follow_the_seed_and_not_the_order_of_the_sources(tmp_path):
    one, ten = masks(tmp_path, [ONES, TENS])
    again, _ = masks(tmp_path, [ONES, TENS])
    (alone,) = masks(tmp_path, [ONES])
    assert all(torch.equal(one[name], again[name]) and torch.equal(one[name], alone[name]) for name in ZEROS)
    forward = merge(Dare(), [ONES, TENS], ZEROS, at=tmp_path)
    backward = merge(Dare(), [TENS, ONES], ZEROS, at=tmp_path)
    assert all(torch.equal(forward[name], backward[name]) for name in ZEROS)
    assert (one["one"] & ~ten["one"]).any()
