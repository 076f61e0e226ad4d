"""Merges by angles: slow float64 references, written from the papers, and their properties."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from tests.merging import merge, near, tensors
from tests.reuse.test_merge_golden_linear import (
    BASE,
    DTYPES,
    SHAPES,
    SHARES,
    SOURCES,
    STRANGERS,
    agrees,
    cast,
    double,
    each_tensor,
    same_bits,
)

from lfm.errors import RequestError
from lfm.reuse.merge.karcher import Karcher
from lfm.reuse.merge.model_stock import ModelStock
from lfm.reuse.merge.multislerp import Multislerp
from lfm.reuse.merge.nuslerp import Nuslerp
from lfm.reuse.merge.slerp import Slerp

# --- slerp and nuslerp


def arc(a, b, t, straight_from=1.0):
    """Shoemake's formula for two vectors; where it does not hold, what the methods' pages say."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = min(1.0, max(-1.0, a @ b / lengths)) if lengths else 0.0
    phi = math.acos(cosine)
    if math.sin(phi) < 1e-6 or abs(cosine) > straight_from:
        return (1 - t) * a + t * b
    return math.sin((1 - t) * phi) / math.sin(phi) * a + math.sin(t * phi) / math.sin(phi) * b


def whole_arc(a, b, t, straight_from=1.0):
    return arc(a.ravel(), b.ravel(), t, straight_from).reshape(a.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0, 0.3, 1, -0.5, 1.5])
@pytest.mark.parametrize("models", [STRANGERS[:2], SOURCES[:2]], ids=["strangers", "siblings"])
def test_slerp_follows_the_arc_of_each_tensor(models, t, dtype, tmp_path):
    models = [cast(model, dtype) for model in models]
    found = merge(Slerp(t=t), models, at=tmp_path)
    assert agrees(found, each_tensor(lambda a, b: whole_arc(a, b, t), *models), dtype)


def test_slerp_returns_its_ends_to_the_bit(tmp_path):
    for t in (0, 1):
        assert same_bits(merge(Slerp(t=t), STRANGERS[:2], at=tmp_path), STRANGERS[t])


def test_slerp_keeps_the_norm_of_equally_long_vectors(tmp_path):
    a = {"w": torch.tensor([3.0, 4.0, 0.0])}
    b = {"w": torch.tensor([0.0, 0.0, 5.0])}
    for t in (0.25, 0.5, 1.75):
        assert merge(Slerp(t=t), [a, b], at=tmp_path)["w"].norm().item() == pytest.approx(5)


@pytest.mark.parametrize("factor", [1, 2, -1])
def test_slerp_is_straight_where_there_is_no_arc(factor, tmp_path):
    a = STRANGERS[0]
    b = {name: tensor * factor for name, tensor in a.items()}
    assert agrees(merge(Slerp(t=0.3), [a, b], at=tmp_path), each_tensor(lambda a, b: 0.7 * a + 0.3 * b, a, b))


def test_slerp_takes_zeros_as_at_right_angles(tmp_path):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in BASE.items()}
    found = merge(Slerp(t=0.3), [zeros, BASE], at=tmp_path)
    assert agrees(found, each_tensor(lambda a: math.sin(0.3 * math.pi / 2) * a, BASE))
    assert same_bits(merge(Slerp(t=0.3), [zeros, zeros], at=tmp_path), zeros)


def test_slerp_goes_straight_from_the_cosine_that_is_asked_for(tmp_path):
    a = {"w": torch.tensor([1.0, 0.0])}
    b = {"w": torch.tensor([math.cos(0.5), math.sin(0.5)])}
    chord = merge(Slerp(straight_from=0.8), [a, b], at=tmp_path)["w"].norm().item()
    on_arc = merge(Slerp(straight_from=0.9), [a, b], at=tmp_path)["w"].norm().item()
    assert (chord, on_arc) == (pytest.approx(math.cos(0.25)), pytest.approx(1))


@pytest.mark.parametrize("size", [1e-120, 1e120])
def test_slerp_of_very_small_and_very_large_float64_has_an_angle(size, tmp_path):
    a, b = (torch.tensor(values, dtype=torch.float64) * size for values in ([3.0, 4.0, 0.0], [0.0, 0.0, 5.0]))
    found = merge(Slerp(), [{"w": a}, {"w": b}], at=tmp_path)["w"]
    assert found.norm().item() == pytest.approx(5 * size)


def lines_of(tensor, unit):
    """Views of the rows (all axes but the first; a vector is one), or the columns, of a tensor."""
    if tensor.ndim < 2:
        return [tensor.reshape(-1)]
    matrix = tensor.reshape(len(tensor), -1)
    return list(matrix) if unit == "row" else list(matrix.T)


def nuslerp(a, b, t, unit):
    if unit == "tensor":
        return whole_arc(a, b, t)
    found = np.array(a)
    for line, one, two in zip(*(lines_of(x, unit) for x in (found, np.array(a), np.array(b))), strict=True):
        line[:] = arc(one.copy(), two, t)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", ["tensor", "row", "column"])
@pytest.mark.parametrize("based", [False, True])
def test_nuslerp_follows_arcs_of_tensors_rows_or_columns(based, unit, dtype, tmp_path):
    base, *models = (cast(model, dtype) for model in (BASE, *SOURCES[:2]))
    found = merge(Nuslerp(unit=unit), models, base if based else None, at=tmp_path, weights=[1, 3])

    def reference(base, a, b):
        return base + nuslerp(a - base, b - base, 0.75, unit) if based else nuslerp(a, b, 0.75, unit)

    assert agrees(found, each_tensor(reference, base, *models), dtype)


@pytest.mark.parametrize("unit", ["tensor", "row", "column"])
def test_nuslerp_keeps_the_size_of_changes_at_right_angles(unit, tmp_path):
    base = {"w": torch.ones(4, 4)}
    sources = [{"w": base["w"] + torch.diag(torch.tensor(d))} for d in ([1.0, 0, 0, 0], [0, 1.0, 0, 0])]
    change = merge(Nuslerp(unit=unit), sources, base, at=tmp_path)["w"] - 1
    # a row or column that one model left alone has no direction there; it counts as at right angles too
    assert change.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("unit", ["tensor", "row", "column"])
def test_nuslerp_takes_the_middle_where_weights_cancel_out(unit, tmp_path):
    odd = merge(Nuslerp(unit=unit), STRANGERS[:2], at=tmp_path, weights=[1, -1])
    assert same_bits(odd, merge(Nuslerp(unit=unit), STRANGERS[:2], at=tmp_path))


@pytest.mark.parametrize("unit", ["row", "column"])
def test_nuslerp_of_many_lines_is_that_of_each(unit, tmp_path):
    """More than one block of lines is looked at, and more than one chunk of the file."""
    shape = (700, 900)
    models = [tensors(seed, shapes={"w": shape}) for seed in (1, 2)]
    found = merge(Nuslerp(unit=unit), models, at=tmp_path)["w"].double().numpy()
    expected = nuslerp(*(model["w"].double().numpy() for model in models), 0.5, unit)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


# --- multislerp and karcher


def multislerp(points, weights):
    """Onto the tangent space at the mean direction, average there, and back to the sphere."""
    norms = [np.linalg.norm(x) for x in points]
    units = [x / n for x, n in zip(points, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    size = np.linalg.norm(tangent) + 1e-300
    direction = mean * math.cos(size) + tangent * (math.sin(size) / size)
    return direction * sum(w * n for w, n in zip(weights, norms, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("based", [False, True])
def test_multislerp_averages_directions_and_lengths(based, normalize, dtype, tmp_path):
    base, *models = (cast(model, dtype) for model in (BASE, *SOURCES))
    method = Multislerp(normalize=normalize)
    found = merge(method, models, base if based else None, at=tmp_path, weights=SHARES)
    weights = np.array(SHARES) / (sum(SHARES) if normalize else 1)

    def reference(base, *sources):
        points = [(source - base * based).ravel() for source in sources]
        return base * based + multislerp(points, weights).reshape(base.shape)

    assert agrees(found, each_tensor(reference, base, *models), dtype)


def test_multislerp_of_two_models_with_equal_weights_is_slerp_to_the_middle_for_equal_lengths(tmp_path):
    models = [{name: t / t.norm() for name, t in model.items() if t.numel()} for model in STRANGERS[:2]]
    one, two = merge(Multislerp(), models, at=tmp_path), merge(Slerp(), models, at=tmp_path)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


@pytest.mark.parametrize("method", [Multislerp(), Karcher()], ids=["multislerp", "karcher"])
def test_where_directions_balance_out_the_weighted_average_is_left(method, tmp_path):
    third = 2 * math.pi / 3
    star = [{"w": size * torch.tensor([math.cos(third * i), math.sin(third * i)])} for i, size in enumerate((1, 2, 3))]
    found = merge(method, star, at=tmp_path)["w"]
    torch.testing.assert_close(found, sum(model["w"] for model in star) / 3)
    found = merge(method, [STRANGERS[0], {n: -2 * t for n, t in STRANGERS[0].items()}], at=tmp_path)
    assert agrees(found, each_tensor(lambda x: -0.5 * x, STRANGERS[0]))
    sizes = torch.linspace(0.3, 3, 40).tolist()  # of opposite models: what is left of the directions is rounding
    single = {f"w{number}": STRANGERS[0]["layers.1.weight"].clone() for number in range(len(sizes))}
    opposite = {name: -size * single[name] for name, size in zip(single, sizes, strict=True)}
    found = merge(method, [single, opposite], at=tmp_path)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (single[name] + opposite[name]) / 2)


def test_multislerp_keeps_tensors_that_no_source_changed(tmp_path):
    sources = [{**source, "embed.weight": BASE["embed.weight"]} for source in SOURCES]
    found = merge(Multislerp(), sources, BASE, at=tmp_path)
    assert torch.equal(found["embed.weight"], BASE["embed.weight"])


def mean_direction(units, weights):
    """The Karcher mean by small steps down the gradient, far past convergence."""
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(2000):
        gradient = sum(w * logarithm(mean, u) for w, u in zip(weights, units, strict=True))
        mean = mean + 0.2 * gradient
        mean = mean / np.linalg.norm(mean)
    return mean


def logarithm(mean, unit):
    """The vector at `mean` that leads to `unit` along the sphere."""
    cosine = min(1.0, max(-1.0, mean @ unit))
    across = unit - cosine * mean
    size = np.linalg.norm(across)
    return math.atan2(size, cosine) * across / size if size > 1e-15 else 0 * mean


@pytest.mark.parametrize("models", [STRANGERS, SOURCES], ids=["strangers", "siblings"])
@pytest.mark.parametrize("weights", [None, SHARES])
def test_karcher_is_the_mean_direction_on_the_sphere(weights, models, tmp_path):
    shares = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    names = [name for name in SHAPES if len(SHAPES[name]) > 0 and 0 not in SHAPES[name]]  # one number has no angle
    models = [{name: model[name] for name in names} for model in models]
    found = merge(Karcher(max_iter=200, tol=1e-7), models, at=tmp_path, weights=weights)
    for name in names:
        vectors = [model[name].double().numpy().ravel() for model in models]
        norms = [np.linalg.norm(vector) for vector in vectors]
        units = [vector / norm for vector, norm in zip(vectors, norms, strict=True)]
        expected = shares @ norms * mean_direction(units, shares)
        np.testing.assert_allclose(found[name].double().numpy().ravel(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.5, 0.2])
def test_karcher_of_two_equally_long_models_is_slerp(t, dtype, tmp_path):
    ends = [{name: v / v.norm() for name, v in model.items() if v.numel() > 1} for model in STRANGERS[:2]]
    models = [cast(model, dtype) for model in ends]
    found = merge(Karcher(max_iter=100, tol=1e-9), models, at=tmp_path, weights=[1 - t, t], dtype="float32")
    expected = merge(Slerp(t=t), models, at=tmp_path, dtype="float32")
    # rounding to the type leaves the lengths only nearly equal
    tolerance = 1e-6 + torch.finfo(dtype).eps
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def test_karcher_counts_a_model_twice_like_a_weight_of_two(tmp_path):
    twice = merge(Karcher(), [STRANGERS[0], STRANGERS[1], STRANGERS[1]], at=tmp_path)
    weighed = merge(Karcher(), STRANGERS[:2], at=tmp_path, weights=[1, 2])
    assert agrees(twice, double(weighed))


def test_karcher_takes_the_steps_that_it_is_given(tmp_path):
    names = [name for name in SHAPES if SHAPES[name] not in [(), (0, 4)]]
    models = [{name: model[name] for name in names} for model in STRANGERS]
    none, one, many = (merge(Karcher(max_iter=n), models, at=tmp_path, weights=[3, 1, 1]) for n in (0, 1, 100))
    start = merge(Multislerp(), models, at=tmp_path, weights=[3, 1, 1])
    for name in names:
        torch.testing.assert_close(none[name], start[name])
        assert (one[name] - many[name]).norm() < 0.5 * (none[name] - many[name]).norm()


def test_karcher_shortens_by_tensors_of_zeros_and_takes_no_direction_from_them(tmp_path):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in BASE.items()}
    assert agrees(merge(Karcher(), [BASE, zeros], at=tmp_path), each_tensor(lambda x: x / 2, BASE))
    assert same_bits(merge(Karcher(), [zeros, zeros], at=tmp_path), zeros)


def test_karcher_takes_no_negative_weights(tmp_path):
    with pytest.raises(RequestError, match=r"weights of a mean direction are not negative, got \[1.0, -0.5\]"):
        merge(Karcher(), SOURCES[:2], at=tmp_path, weights=[1.0, -0.5])


# --- model_stock


def model_stock(base, sources, extrapolate=False, least_product=0.0):
    taus = [source - base for source in sources]
    cosines = []
    for a, b in combinations(taus, 2):
        lengths = max(np.linalg.norm(a) * np.linalg.norm(b), least_product)
        cosines.append(a @ b / lengths if lengths else 0.0)
    cosine, n = float(np.mean(cosines)), len(sources)
    cosine = cosine if extrapolate else max(cosine, 0)
    t = n * cosine / (1 + (n - 1) * cosine)
    return (1 - t) * base + t * np.mean(sources, axis=0)


def model_stock_of(unit, **options):
    def reference(base, *sources):
        if unit == "tensor":
            return model_stock(base.ravel(), [source.ravel() for source in sources], **options).reshape(base.shape)
        found = np.array(base)
        for line, row, *rows in zip(*(lines_of(x, "row") for x in (found, base, *sources)), strict=True):
            line[:] = model_stock(row, rows, **options)
        return found

    return reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_goes_as_far_as_the_angle_says(count, extrapolate, filter_wise, dtype, tmp_path):
    base, common = cast(BASE, dtype), near(BASE, 9, 0.1)
    sources = [cast(near(common, seed), dtype) for seed in range(1, count + 1)]
    found = merge(ModelStock(filter_wise=filter_wise, extrapolate=extrapolate), sources, base, at=tmp_path)
    reference = model_stock_of("row" if filter_wise else "tensor", extrapolate=extrapolate)
    assert agrees(found, each_tensor(reference, base, *sources), dtype, atol=1e-5)


def test_model_stock_is_the_point_towards_the_average_that_is_nearest_to_the_centre(tmp_path):
    """Fine-tunes around a centre, all offsets at right angles: what the paper derives its formula from."""
    centre = torch.tensor([2.0, 0, 0, 0])
    offsets = 3 * torch.eye(4)[1:]
    sources = [{"w": centre + offset} for offset in offsets]
    found = merge(ModelStock(), sources, {"w": torch.zeros(4)}, at=tmp_path)["w"]
    mean = centre + offsets.mean(0)
    torch.testing.assert_close(found, mean * (centre @ mean) / (mean @ mean))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_equal_models_is_that_model(filter_wise, tmp_path):
    found = merge(ModelStock(filter_wise=filter_wise), [SOURCES[0], SOURCES[0]], BASE, at=tmp_path)
    assert agrees(found, double(SOURCES[0]))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_stays_with_the_base_where_its_fine_tunes_point_apart(filter_wise, tmp_path):
    other = {name: 2 * BASE[name] - SOURCES[0][name] for name in SHAPES}
    found = merge(ModelStock(filter_wise=filter_wise), [SOURCES[0], other], BASE, at=tmp_path)
    assert same_bits(found, BASE)
    singular = ModelStock(filter_wise=filter_wise, extrapolate=True)  # 1 + c = 0: no finite way to the centre
    assert agrees(merge(singular, [SOURCES[0], other], BASE, at=tmp_path), double(BASE))


def test_model_stock_with_a_least_product_takes_small_changes_for_wide_angles(tmp_path):
    base = {"w": torch.zeros(4)}
    sources = [{"w": torch.full((4,), 2e-4)}] * 2
    assert merge(ModelStock(), sources, base, at=tmp_path)["w"].tolist() == sources[0]["w"].tolist()
    found = merge(ModelStock(least_product=1e-6), sources, base, at=tmp_path)["w"]
    assert found[0].item() == pytest.approx(2e-4 * 2 * 0.16 / 1.16)
