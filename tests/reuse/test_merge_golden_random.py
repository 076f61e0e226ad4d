"""Merges of task vectors made sparse at random, DARE and DELLA: masks are random, their laws are not."""

import math

import numpy as np
import pytest
import torch
from tests.merging import merge
from tests.reuse.test_merge_golden_sparse import (
    BASE,
    DTYPES,
    SHAPES,
    SOURCES,
    WEIGHTS,
    added,
    cast,
    changes,
    flat,
)

from lfm.reuse.merge import _engine
from lfm.reuse.merge._machine import kernels
from lfm.reuse.merge.dare_linear import DareLinear
from lfm.reuse.merge.dare_ties import DareTies
from lfm.reuse.merge.della import Della
from lfm.reuse.merge.della_linear import DellaLinear
from lfm.reuse.merge.ties import Ties

ZEROS = {"one": torch.zeros(20_000), "two": torch.zeros(20_000)}
ONES = {name: torch.ones(20_000) for name in ZEROS}
TENS = {name: torch.full((20_000,), 10.0) for name in ZEROS}
LINEAR = [DareLinear, DellaLinear]
PAIRS = [(DareLinear, DareTies), (DellaLinear, Della)]


def kept(method, at, sources, seed=0):
    """Return which elements of each source are kept: sources are powers of ten times one."""
    found = merge(method(density=0.3, rescale="none"), sources, ZEROS, at=at, seed=seed)
    digits = {name: tensor.round() for name, tensor in found.items()}
    return [{name: (value // 10**digit) % 10 == 1 for name, value in digits.items()} for digit in range(len(sources))]


def correlation(a, b):
    return np.corrcoef(a.numpy(), b.numpy())[0, 1]


def near_to(shares, expected, count):
    """Whether shares of `count` trials each are what probabilities of `expected` give."""
    sigma = np.sqrt(np.asarray(expected) * (1 - np.asarray(expected)) / count) + 1e-12
    assert (np.abs(np.asarray(shares) - expected) / sigma).max() < 4.5
    return True


# --- both


@pytest.mark.parametrize("options", [{}, {"density": 0.25}, {"density": 0.8}])
@pytest.mark.parametrize("method", LINEAR)
def test_it_is_task_arithmetic_on_average(method, options, tmp_path):
    """Unbiased: over many seeds and equal tensors the mean of every weight is that of nothing dropped."""
    copies, seeds = 50, 8
    weight = "layers.1.weight"
    base, *sources = ({f"w{i}": model[weight].clone() for i in range(copies)} for model in (BASE, *SOURCES))
    runs = [merge(method(**options), sources, base, at=tmp_path, seed=seed, weights=WEIGHTS) for seed in range(seeds)]
    samples = np.stack([tensor.double().numpy().ravel() for found in runs for tensor in found.values()])
    expected = flat(BASE, [weight]) + added(changes(BASE, SOURCES, [weight]), WEIGHTS)
    error = (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(copies * seeds))
    assert abs(error).max() < 4.5
    assert abs(error.mean()) < 4.5 / math.sqrt(len(expected))


@pytest.mark.parametrize("method", LINEAR)
def test_masks_of_sources_tensors_places_and_seeds_are_independent(method, tmp_path):
    one, ten = kept(method, tmp_path, [ONES, TENS])
    (other_seed,) = kept(method, tmp_path, [ONES], seed=1)
    pairs = [
        (one["one"], ten["one"]),
        (one["one"], one["two"]),
        (one["one"], other_seed["one"]),
        *((one["one"][:-lag], one["one"][lag:]) for lag in (1, 2, 3, 4, 8)),
    ]
    limit = 4 / math.sqrt(20_000)
    if method is DellaLinear:  # equal changes are ranked in their order: what is far back is kept more often
        limit += 0.3**2 / 12 / (0.3 * 0.7)
    assert max(abs(correlation(a, b)) for a, b in pairs) < limit


@pytest.mark.parametrize("method", LINEAR)
def test_masks_follow_the_seed_and_not_the_order_of_the_sources(method, tmp_path):
    one, ten = kept(method, tmp_path, [ONES, TENS])
    again, _ = kept(method, tmp_path, [ONES, TENS])
    (alone,) = kept(method, tmp_path, [ONES])
    assert all(torch.equal(one[name], again[name]) and torch.equal(one[name], alone[name]) for name in ZEROS)
    forward = merge(method(), [ONES, TENS], ZEROS, at=tmp_path)
    backward = merge(method(), [TENS, ONES], ZEROS, at=tmp_path)
    assert all(torch.equal(forward[name], backward[name]) for name in ZEROS)
    assert (one["one"] & ~ten["one"]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("linear", "electing"), PAIRS)
def test_signs_are_elected_among_what_is_left(linear, electing, dtype, tmp_path):
    """The masks are those of the linear method: merging each source alone by it gives what is elected from."""
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    left = [merge(linear(), [source], base, at=tmp_path, dtype="float32") for source in sources]
    found = merge(electing(), sources, base, at=tmp_path, dtype="float32")
    for name, shape in SHAPES.items():
        values = np.stack([flat(model, [name]) - flat(base, [name]) for model in left])
        values[abs(values) < 1e-6] = 0
        agreeing = (np.sign(values) == np.sign(values.sum(0))) & (values != 0)
        expected = (values * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
        assert 0 in shape or agreeing.any() or shape == ()
        np.testing.assert_allclose(flat(found, [name]), flat(base, [name]) + expected, atol=3e-6)


@pytest.mark.parametrize("electing", [DareTies, Della])
def test_at_density_one_it_is_ties_untrimmed(electing, tmp_path):
    ours = merge(electing(density=1), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    theirs = merge(Ties(density=1), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.parametrize("method", [*LINEAR, DareTies, Della])
def test_rescaled_to_the_norm_each_tensor_has_the_one_it_had(method, tmp_path):
    """By a factor on all that is kept, so that signs and ratios stay; a tensor of which nothing is kept has none."""
    plain, found = (
        merge(method(density=0.4, rescale=rescale), SOURCES[:1], BASE, at=tmp_path) for rescale in ("none", "norm")
    )
    for name in SHAPES:
        tau, left, restored = (flat(model, [name]) - flat(BASE, [name]) for model in (SOURCES[0], plain, found))
        if left.any():
            assert abs(restored).sum() == pytest.approx(abs(tau).sum(), rel=1e-5)
            np.testing.assert_allclose(restored, left * (abs(tau).sum() / abs(left).sum()), atol=1e-6)
            np.testing.assert_allclose(left[left != 0], tau[left != 0], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*LINEAR, DareTies, Della])
def test_masks_are_drawn_once_or_twice_and_are_the_same(method, dtype, tmp_path, monkeypatch):
    """Norms take a pass of their own: masks are kept for the next if there is room, else drawn again."""
    sources, base = [cast(source, dtype) for source in SOURCES], cast(BASE, dtype)
    runs: list[list[bool]] = []
    kernel = kernels.run

    def noting(program, *rest, **how):
        runs[-1].append(program.draws)
        return kernel(program, *rest, **how)

    def merged():
        runs.append([])
        return merge(method(density=0.4, rescale="norm"), sources, base, at=tmp_path)

    monkeypatch.setattr(kernels, "run", noting)
    once = merged()
    monkeypatch.setattr(_engine, "KEEP_BITS", 0)
    twice = merged()
    assert sum(runs[1]) == 2 * sum(runs[0]) > 0
    assert all(torch.equal(once[name], twice[name]) for name in SHAPES)


# --- DARE


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_dare_keeps_its_share_and_rescales_it(density, tmp_path):
    found = merge(DareLinear(density=density), [ONES], ZEROS, at=tmp_path)
    values = torch.cat(list(found.values()))
    torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], 1 / density))
    assert near_to((values != 0).double().mean(), density, len(values))


# --- DELLA

ROWS, COLUMNS = 6000, 8


def rows_of_known_rank():
    """Rows that each hold 1 .. 8 in some order and with random signs, so that size - 1 is the rank."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(ROWS, COLUMNS, generator=generator).argsort(1).float() + 1
    return order * torch.where(torch.rand(order.shape, generator=generator) < 0.5, -1, 1)


@pytest.mark.parametrize(
    ("density", "epsilon", "lowest", "highest"),
    [(0.5, 0.15, 0.35, 0.65), (0.3, 0.3, 0.0, 0.6), (0.9, 0.15, 0.8, 1.0), (0.2, 0.5, 0.0, 0.4), (0.4, 0, 0.4, 0.4)],
)
def test_della_keeps_by_the_rank_in_a_row(density, epsilon, lowest, highest, tmp_path):
    """From density - epsilon to density + epsilon in even steps, or as far as probabilities go; divided by them."""
    tau = rows_of_known_rank()
    found = merge(DellaLinear(density=density, epsilon=epsilon), [{"w": tau}], {"w": 0 * tau}, at=tmp_path)["w"]
    expected = np.linspace(lowest, highest, COLUMNS)
    kept = [(found != 0)[abs(tau) == rank + 1].double().mean().item() for rank in range(COLUMNS)]
    assert near_to(kept, expected, ROWS)
    chance = torch.tensor(expected)[tau.abs().long() - 1]
    torch.testing.assert_close(found[found != 0].double(), (tau / chance)[found != 0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(48_000,), (6000, 2, 2, 2), (6000, 8)])
def test_a_row_is_all_but_the_first_axis_and_a_vector_one_row(shape, tmp_path):
    tau = rows_of_known_rank().reshape(shape)
    found = merge(DellaLinear(density=0.5, epsilon=0.5), [{"w": tau}], {"w": 0 * tau}, at=tmp_path)["w"]
    kept = [(found != 0)[abs(tau) == rank + 1].double().mean().item() for rank in range(COLUMNS)]
    if len(shape) == 1:  # 6000 elements are equally large, and ranked in their order
        assert near_to(kept, (np.arange(COLUMNS) + 0.5) / COLUMNS, ROWS)
    else:
        assert near_to(kept, np.arange(COLUMNS) / (COLUMNS - 1), ROWS)


def test_della_keeps_a_lone_element_with_its_density(tmp_path):
    base = {"column": torch.zeros(20_000, 1), "scale": torch.zeros(())}
    found = merge(DellaLinear(density=0.3), [{n: t + 1 for n, t in base.items()}], base, at=tmp_path)
    assert near_to((found["column"] != 0).double().mean(), 0.3, 20_000)
    assert found["scale"].item() in (0, pytest.approx(1 / 0.3))


@pytest.mark.parametrize(("dare", "della"), [(DareLinear, DellaLinear), (DareTies, Della)])
def test_without_epsilon_della_is_dare(dare, della, tmp_path):
    ours, theirs = merge(della(epsilon=0), SOURCES, BASE, at=tmp_path), merge(dare(), SOURCES, BASE, at=tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_della_keeps_the_large_more_often_at_the_same_density(tmp_path):
    tau = {"w": torch.randn(200, 500, generator=torch.Generator().manual_seed(0))}
    base = {"w": torch.zeros(200, 500)}
    sizes = {}
    for method in (DareLinear, DellaLinear):
        found = merge(method(density=0.5, rescale="none"), [tau], base, at=tmp_path)["w"]
        assert near_to((found != 0).double().mean(), 0.5, found.numel())
        sizes[method] = found[found != 0].abs().mean().item()
    assert sizes[DellaLinear] > 1.1 * sizes[DareLinear]
