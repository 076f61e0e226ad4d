"""Merges of matrices by their singular values, and by optimisation: slow references, FusionBench, and properties."""

import numpy as np
import pytest
import torch
from tests.golden.fusionbench import inputs as fusionbench
from tests.merging import merge, near, tensors

from lfm.reuse.merge._spectral import polar, svd
from lfm.reuse.merge.iso_c import IsoC
from lfm.reuse.merge.iso_cts import IsoCts, specific_directions
from lfm.reuse.merge.tsv_m import TsvM
from lfm.reuse.merge.wudi import Wudi

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "embed_tokens.weight": (24, 10),
    "layers.0.bias": (7,),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.0.row": (1, 6),
    "layers.0.square": (12, 12),
    "layers.0.tall": (15, 8),
    "layers.0.wide": (9, 20),
    "none": (0, 4),
    "scale": (),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and min(shape) > 1]
BASE = tensors(0, shapes=SHAPES)
SOURCES = [near(BASE, seed) for seed in (1, 2, 3)]
WEIGHTS = [0.5, 2.0, 1.5]
ALL = [IsoC(), IsoCts(common=0.5), TsvM(), Wudi(steps=5, others="average")]


def cast(model, dtype):
    return {name: tensor.to(dtype) for name, tensor in model.items()}


def double(model):
    return {name: tensor.double().numpy() for name, tensor in model.items()}


def low_rank(base, seed, rank=2):
    """What tuning with LoRA makes of the matrices."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensor):
        if tensor.ndim != 2 or not tensor.numel():
            return torch.zeros_like(tensor)
        shapes = (tensor.shape[0], rank), (rank, tensor.shape[1])
        one, two = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return (one @ two).to(tensor.dtype)

    return {name: tensor + change(tensor) for name, tensor in base.items()}


# --- the papers, matrix by matrix


def nearest_orthogonal(matrix):
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def iso_c(taus):
    u, s, vh = np.linalg.svd(sum(taus), full_matrices=False)
    return np.mean(s) * u @ vh


def iso_cts(taus, common):
    """Common and task-specific directions, one after the other, column by column."""
    size, tasks = min(taus[0].shape), len(taus)
    each = round((size - int(size * common)) / tasks)
    count = size - each * tasks
    u, s, vh = np.linalg.svd(sum(taus), full_matrices=False)
    columns, values, rows = [], [], []
    for tau in taus:
        rest = tau - u[:, :count] @ u[:, :count].T @ tau
        own_u, own_s, own_vh = np.linalg.svd(rest, full_matrices=False)
        for direction in range(each):
            columns.append(own_u[:, direction])
            values.append(own_s[direction])
            rows.append(own_vh[direction])
    for direction in range(count):
        columns.append(u[:, direction])
        values.append(s[direction])
        rows.append(vh[direction])
    return np.mean(values) * nearest_orthogonal(np.array(columns).T) @ nearest_orthogonal(np.array(rows))


def tsv_m(taus):
    count = max(min(taus[0].shape) // len(taus), 1)
    columns, values, rows = [], [], []
    for tau in taus:
        u, s, vh = np.linalg.svd(tau, full_matrices=False)
        for direction in range(count):
            columns.append(u[:, direction])
            values.append(s[direction])
            rows.append(vh[direction])
    return nearest_orthogonal(np.array(columns).T) @ np.diag(values) @ nearest_orthogonal(np.array(rows))


def wudi_loss(merged, taus):
    return sum(np.sum(((merged - tau) @ tau.T) ** 2) / np.sum(tau**2) for tau in taus)


def wudi(taus, steps, rate):
    merged = sum(taus)
    mean, square = np.zeros_like(merged), np.zeros_like(merged)
    for step in range(1, steps + 1):
        gradient = sum(2 * (merged - tau) @ tau.T @ tau / np.sum(tau**2) for tau in taus)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        merged = merged - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return merged


def reference(of_matrix, base, sources, weights, scale=1.0, average=True):
    """Apply a method to each matrix; other tensors get the mean of the task vectors, or nothing."""
    expected = {}
    for name, tensor in base.items():
        taus = [weight * (source[name] - tensor) for weight, source in zip(weights, sources, strict=True)]
        if name in MATRICES:
            expected[name] = tensor + scale * of_matrix(taus)
        elif tensor.ndim == 2 and tensor.size and average:  # of one row: all singular vectors are that row
            expected[name] = tensor + scale * ONE_ROW[of_matrix.__name__](taus)
        else:
            expected[name] = tensor + scale * sum(taus) / len(taus) if average else tensor
    return expected


def row_of_tsv(taus):
    """One direction for each task: those nearest to T equal or opposite rows of length 1 are the rows / sqrt(T)."""
    values = [np.linalg.norm(tau) for tau in taus]
    rows = np.array([tau[0] / value for tau, value in zip(taus, values, strict=True)])
    return np.full((1, len(taus)), len(taus) ** -0.5) @ np.diag(values) @ nearest_orthogonal(rows)


ONE_ROW = {"iso_c": sum, "iso_cts": sum, "tsv_m": row_of_tsv}


def agrees(found, expected, dtype=torch.float32, atol=1e-6):
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for name, value in double(found).items():
        rtol = torch.finfo(dtype).eps
        np.testing.assert_allclose(value, expected[name], rtol=rtol, atol=atol, err_msg=name)


# --- against them


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_iso_c(tmp_path, dtype, weights):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(IsoC(scale=1.3), sources, base, at=tmp_path, weights=weights)
    agrees(found, reference(iso_c, double(base), [*map(double, sources)], weights or [1] * 3, 1.3), dtype, 2e-6)


@pytest.mark.parametrize("common", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_iso_cts(tmp_path, dtype, common):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(IsoCts(scale=0.7, common=common), sources, base, at=tmp_path, weights=WEIGHTS)

    def of_matrix(taus):
        return iso_cts(taus, common)

    of_matrix.__name__ = "iso_cts"
    agrees(found, reference(of_matrix, double(base), [*map(double, sources)], WEIGHTS, 0.7), dtype, 2e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tsv_m(tmp_path, dtype, weights):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(TsvM(scale=0.7), sources, base, at=tmp_path, weights=weights)
    agrees(found, reference(tsv_m, double(base), [*map(double, sources)], weights or [1] * 3, 0.7), dtype, 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wudi(tmp_path, dtype):
    base = cast(BASE, dtype)
    sources = [near(base, seed, 0.03) for seed in (1, 2, 3)]
    found = merge(Wudi(steps=20, learning_rate=1e-4, scale=0.9), sources, base, at=tmp_path, weights=WEIGHTS)

    def of_matrix(taus):
        return wudi(taus, 20, 1e-4)

    expected = reference(of_matrix, double(base), [*map(double, sources)], WEIGHTS, 0.9, average=False)
    taus = [
        w * (double(s)["layers.0.row"] - double(base)["layers.0.row"]) for w, s in zip(WEIGHTS, sources, strict=True)
    ]
    expected["layers.0.row"] = double(base)["layers.0.row"] + 0.9 * of_matrix(taus)
    expected["embed_tokens.weight"] = double(base)["embed_tokens.weight"]
    agrees(found, expected, dtype, 1e-5)


@pytest.mark.parametrize("shape", [(2, 40), (40, 2), (10, 41)])
def test_wudi_of_any_proportions(tmp_path, shape):
    base = tensors(0, shapes={"layers.0.weight": shape})
    sources = [near(base, seed, 0.03) for seed in (1, 2)]
    found = merge(Wudi(steps=20, learning_rate=1e-4), sources, base, at=tmp_path)["layers.0.weight"]
    taus = [(source["layers.0.weight"] - base["layers.0.weight"]).double().numpy() for source in sources]
    expected = base["layers.0.weight"].double().numpy() + wudi(taus, 20, 1e-4)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)


# --- against FusionBench

GOLDEN = {
    "iso_c": (IsoC(), 3, {}),
    "iso_c of 2": (IsoC(), 2, {}),
    "iso_cts 0.8": (IsoCts(common=0.8), 3, {}),
    "iso_cts 0.3": (IsoCts(common=0.3), 3, {}),
    "tsv_m": (TsvM(), 3, {}),
    "tsv_m of 2": (TsvM(), 2, {}),
    "wudi": (Wudi(others="average"), 3, {"atol": 1e-6}),
    "wudi of 2": (Wudi(steps=40, others="average"), 2, {"atol": 1e-6}),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_fusionbench_makes_the_same(tmp_path, case):
    method, tasks, tolerance = GOLDEN[case]
    base, sources = fusionbench.models("mixed")
    as_tensors = [
        {name: torch.from_numpy(value) for name, value in model.items()} for model in (base, *sources[:tasks])
    ]
    found = merge(method, as_tensors[1:], as_tensors[0], at=tmp_path)
    for name, change in fusionbench.expected()[case].items():
        np.testing.assert_allclose(found[name].numpy() - base[name], change, **{"rtol": 1e-4, "atol": 1e-7} | tolerance)


# --- properties


def changes(found, base=BASE):
    return {name: found[name].double().numpy() - base[name].double().numpy() for name in base}


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("method", [IsoC(), IsoCts(common=0.0), IsoCts(common=0.5)])
def test_all_singular_values_are_equal(tmp_path, method):
    found = changes(merge(method, SOURCES, BASE, at=tmp_path))
    for name in MATRICES:
        values = spectrum(found[name])
        np.testing.assert_allclose(values, values.mean(), rtol=2e-5)
    total = sum(double(source)["layers.0.wide"] - double(BASE)["layers.0.wide"] for source in SOURCES)
    if isinstance(method, IsoC):
        np.testing.assert_allclose(spectrum(found["layers.0.wide"]), spectrum(total).mean(), rtol=1e-5)


def test_iso_cts_without_directions_of_tasks_is_iso_c(tmp_path):
    one = merge(IsoC(), SOURCES, BASE, at=tmp_path)
    two = merge(IsoCts(common=1.0), SOURCES, BASE, at=tmp_path)
    for name in BASE:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("common", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_directions_are_shared_out(size, tasks, common):
    each = specific_directions(size, tasks, common)
    assert each >= 0
    assert each * tasks <= size
    assert common < 1 or each == 0
    if size >= tasks:
        assert abs(each * tasks - (size - int(size * common))) <= tasks


def test_iso_c_of_low_rank_stays_of_low_rank(tmp_path):
    found = changes(merge(IsoC(), [low_rank(BASE, 1), low_rank(BASE, 2)], BASE, at=tmp_path))
    for name in MATRICES:
        values = spectrum(found[name])
        np.testing.assert_allclose(values[:4], values[0], rtol=1e-4)
        assert (values[4:] < 1e-5).all()


def test_tsv_m_adds_up_tasks_that_are_at_right_angles(tmp_path):
    sources = [{name: tensor.clone() for name, tensor in BASE.items()} for _ in range(2)]
    sources[0]["layers.0.square"][:6, :6] += torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    sources[1]["layers.0.square"][6:, 6:] += torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    found = merge(TsvM(), sources, BASE, at=tmp_path)["layers.0.square"]
    expected = sources[0]["layers.0.square"] + sources[1]["layers.0.square"] - BASE["layers.0.square"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


def test_tsv_m_of_equal_models_is_what_one_keeps(tmp_path):
    found = changes(merge(TsvM(), SOURCES[:1] * 2, BASE, at=tmp_path))
    for name in MATRICES:
        u, s, vh = np.linalg.svd(double(SOURCES[0])[name] - double(BASE)[name], full_matrices=False)
        half = len(s) // 2
        np.testing.assert_allclose(found[name], u[:, :half] * s[:half] @ vh[:half], atol=1e-6)


@pytest.mark.parametrize("method", [IsoC(), IsoCts(), TsvM()])
def test_more_tasks_than_directions(tmp_path, method):
    shapes = {"layers.0.weight": (2, 9), "layers.1.weight": (9, 3)}
    base = tensors(0, shapes=shapes)
    found = merge(method, [near(base, seed) for seed in range(1, 6)], base, at=tmp_path)
    for name, change in changes(found, base).items():
        assert np.isfinite(change).all()
        assert np.linalg.matrix_rank(change) == min(shapes[name])


def test_wudi_disturbs_tasks_less_with_every_step(tmp_path):
    sources = [near(BASE, seed, 2e-3) for seed in (1, 2, 3)]
    losses = []
    for steps in (0, 20, 300):
        found = changes(merge(Wudi(steps=steps), sources, BASE, at=tmp_path))["layers.0.wide"]
        taus = [double(source)["layers.0.wide"] - double(BASE)["layers.0.wide"] for source in sources]
        losses.append(wudi_loss(found, taus))
        if not steps:
            np.testing.assert_allclose(found, sum(taus), atol=2e-7)
    assert losses[0] > losses[1] * 1.02
    assert losses[1] > losses[2] * 1.2


def test_wudi_changes_linear_layers_only_unless_told(tmp_path):
    kept, averaged = (merge(Wudi(steps=2, others=others), SOURCES, BASE, at=tmp_path) for others in ("base", "average"))
    for name in BASE:
        linear = name in ("layers.0.row", "layers.0.square", "layers.0.tall", "layers.0.wide")
        assert torch.equal(kept[name], averaged[name]) == (linear or name == "none")
        if not linear:
            assert torch.equal(kept[name], BASE[name])
            mean = sum(source[name].double() for source in SOURCES) / 3
            torch.testing.assert_close(averaged[name].double(), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_where_nothing_changed_the_base_stays_bit_for_bit(tmp_path, method):
    base = {**BASE, "layers.0.square": BASE["layers.0.square"].clone()}
    base["layers.0.square"][0, :4] = torch.tensor([-0.0, 0.0, 1e-40, 3e38])
    found = merge(method, [base] * 3, base, at=tmp_path)
    assert all(found[name].numpy().tobytes() == base[name].numpy().tobytes() for name in base)


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_a_task_without_changes_does_no_harm(tmp_path, method):
    found = merge(method, [BASE, *SOURCES[:2]], BASE, at=tmp_path)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert all(found[name].sub(BASE[name]).abs().max() > 1e-3 for name in MATRICES if name != "embed_tokens.weight")


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_threads_make_no_difference(tmp_path, method):
    shapes = {f"layers.{index}.weight": (70 + index, 90) for index in range(4)}
    base = tensors(0, shapes=shapes)
    sources = [near(base, seed) for seed in (1, 2)]
    one, *others = (merge(method, sources, base, at=tmp_path, threads=threads) for threads in (1, 2, 2))
    assert all(torch.equal(one[name], other[name]) for other in others for name in base)


@pytest.mark.parametrize("method", ALL, ids=lambda method: type(method).__name__)
def test_double_precision_stays(tmp_path, method):
    base, *sources = (cast(model, torch.float64) for model in (BASE, *SOURCES))
    found = merge(method, sources, base, at=tmp_path)
    narrow = merge(method, SOURCES, BASE, at=tmp_path)
    for name in BASE:
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name].float(), narrow[name], rtol=1e-5, atol=1e-6)


# --- the decomposition


@pytest.mark.parametrize("shape", [(40, 40), (64, 20), (20, 64), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_svd_is_one(shape, decay):
    generator = np.random.default_rng(0)
    u, _, vh = np.linalg.svd(generator.standard_normal(shape), full_matrices=False)
    values = 3.0 * decay ** np.arange(min(shape))  # down to 3e-6 of the largest
    matrix = torch.from_numpy(u * values @ vh).float()
    left, found, right = svd(matrix)
    rank = len(found)
    assert rank >= (values > 2e-6 * values[0]).sum()
    np.testing.assert_allclose(found, values[:rank], rtol=0.02, atol=1e-6)
    torch.testing.assert_close((left * found @ right).float(), matrix, rtol=0, atol=5e-6)
    unit = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(left.T @ left, unit, rtol=0, atol=1e-6)
    torch.testing.assert_close(right @ right.T, unit, rtol=0, atol=1e-6)


def test_svd_finds_the_rank():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 4, generator=generator) @ torch.randn(4, 50, generator=generator)
    assert [len(part) for part in (svd(matrix)[1], svd(torch.zeros(5, 3))[1])] == [4, 0]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_polar_is_the_nearest(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    nearest, values = polar(matrix)
    np.testing.assert_allclose(nearest, nearest_orthogonal(matrix.double().numpy()), atol=1e-9)
    np.testing.assert_allclose(values, np.linalg.svd(matrix.double().numpy(), compute_uv=False), rtol=1e-9)


def test_polar_shares_out_what_vectors_span_that_depend_on_each_other():
    vectors = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    half = 0.5**0.5
    np.testing.assert_allclose(polar(vectors)[0], [[half, half, 0], [0, 0, 1], [0, 0, 0]], atol=1e-9)


def test_svd_of_the_largest_only():
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    for few, all_of_it in zip(svd(matrix, 2), svd(matrix), strict=True):
        torch.testing.assert_close(few, all_of_it[tuple(slice(size) for size in few.shape)])
