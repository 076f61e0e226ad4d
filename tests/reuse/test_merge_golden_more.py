"""More merging methods against slow float64 references, written element by element from the papers."""

from itertools import combinations

import numpy as np
import pytest
from tests.merging import SHAPES, merge, near, tensors
from tests.reuse.test_merge_golden import WEIGHTS, agrees, double, each_tensor

from lfm.reuse.merge.breadcrumbs import Breadcrumbs
from lfm.reuse.merge.dare import Dare
from lfm.reuse.merge.dare_ties import DareTies
from lfm.reuse.merge.magmax import Magmax
from lfm.reuse.merge.model_stock import ModelStock
from lfm.reuse.merge.ties import Ties

BASE = tensors(0)
SOURCES = [near(BASE, seed) for seed in (1, 2, 3)]


def test_magmax_takes_the_largest_change_of_each_weight(tmp_path):
    found = merge(Magmax(scale=0.7), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    base = double(BASE)
    taus = [weight * (double(source) - base) for weight, source in zip(WEIGHTS, SOURCES, strict=True)]
    chosen = np.array([max((tau[i] for tau in taus), key=abs) for i in range(len(base))])
    assert agrees(found, base + 0.7 * chosen)


def model_stock(base, *sources):
    taus = [source - base for source in sources]
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in combinations(taus, 2)]
    cosine, n = max(0, float(np.mean(cosines))), len(sources)
    t = n * cosine / (1 + (n - 1) * cosine)
    return (1 - t) * base + t * np.mean(sources, axis=0)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_goes_as_far_as_the_angle_says(tmp_path, count):
    common = near(BASE, 9, 0.2)
    sources = [near(common, seed) for seed in range(1, count + 1)]
    found = merge(ModelStock(), sources, BASE, at=tmp_path)
    assert agrees(found, each_tensor(model_stock, BASE, *sources))


def test_model_stock_of_equal_models_is_that_model(tmp_path):
    assert agrees(merge(ModelStock(), [SOURCES[0], SOURCES[0]], BASE, at=tmp_path), double(SOURCES[0]))


def breadcrumbs(density, outliers, scale, weights):
    def of_tensor(base, *sources):
        total = np.zeros_like(base)
        for weight, source in zip(weights, sources, strict=True):
            tau = (source.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
            top = int(outliers * len(tau))
            last = min(len(tau), top + int(density * len(tau)))
            order = sorted(abs(tau), reverse=True)
            most, least = (order[top - 1] if top else np.inf), order[max(last, 1) - 1]
            total += weight * np.where((abs(tau) >= least) & (abs(tau) < most), tau, 0)
        return base + scale * total

    return of_tensor


@pytest.mark.parametrize(("density", "outliers"), [(0.5, 0.1), (0.9, 0.2), (0.3, 0.0), (1.0, 0.0)])
def test_breadcrumbs_keeps_the_middle(tmp_path, density, outliers):
    method = Breadcrumbs(density=density, outliers=outliers, scale=0.8)
    found = merge(method, SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    assert agrees(found, each_tensor(breadcrumbs(density, outliers, 0.8, WEIGHTS), BASE, *SOURCES))


def test_dare_ties_elects_among_what_dare_leaves(tmp_path):
    """The masks are those of `dare`: merging each source alone by it gives what is elected from."""
    base = double(BASE)
    left = [
        double(merge(Dare(density=0.5), [source], BASE, at=tmp_path / str(i))) - base
        for i, source in enumerate(SOURCES)
    ]
    found = merge(DareTies(density=0.5), SOURCES, BASE, at=tmp_path / "all")
    expected = np.zeros_like(base)
    for i in range(len(base)):
        values = [tau[i] for tau in left]
        agreeing = [value for value in values if abs(value) > 1e-6 and np.sign(value) == np.sign(sum(values))]
        expected[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    assert agrees(found, base + expected)


def test_dare_ties_of_density_one_is_ties_of_density_one(tmp_path):
    ours = merge(DareTies(density=1), SOURCES, BASE, at=tmp_path / "a")
    theirs = merge(Ties(density=1), SOURCES, BASE, at=tmp_path / "b")
    assert agrees(ours, double(theirs))
    assert set(ours) == set(SHAPES)
