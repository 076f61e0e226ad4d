"""Merges that are combinations of models: slow float64 references, written from the papers, and their properties."""

import numpy as np
import pytest
import torch
from tests.merging import merge, near, tensors

from lfm.errors import LfmError, RequestError
from lfm.reuse.merge import _engine
from lfm.reuse.merge.karcher import Karcher
from lfm.reuse.merge.linear import Linear
from lfm.reuse.merge.lines import Lines
from lfm.reuse.merge.model_stock import ModelStock
from lfm.reuse.merge.multislerp import Multislerp
from lfm.reuse.merge.nearswap import Nearswap
from lfm.reuse.merge.nuslerp import Nuslerp
from lfm.reuse.merge.passthrough import Passthrough
from lfm.reuse.merge.slerp import Slerp
from lfm.reuse.merge.task_arithmetic import TaskArithmetic
from lfm.reuse.merge.wise_ft import WiseFt

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "embed.weight": (16, 5),
    "layers.0.bias": (7,),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.1.weight": (6, 6),
    "layers.2.weight": (5, 9),
    "none": (0, 4),
    "scale": (),
}
BASE = tensors(0, shapes=SHAPES)
SOURCES = [near(BASE, seed, size) for seed, size in ((1, 0.1), (2, 0.2), (3, 0.05))]
STRANGERS = [tensors(seed, shapes=SHAPES) for seed in (4, 5, 6)]
WEIGHTS = [0.5, 2.0, -0.75]
SHARES = [0.5, 2.0, 0.75]


def cast(model, dtype):
    return {name: tensor.to(dtype) for name, tensor in model.items()}


def double(model):
    """The tensors of a model in float64."""
    return {name: model[name].double().numpy() for name in SHAPES}


def flat(model):
    return np.concatenate([np.ravel(model[name]) for name in SHAPES])


def each_tensor(method, *models):
    """Apply a method of arrays to each tensor by itself."""
    models = [double(model) for model in models]
    return {name: method(*(model[name] for model in models)) if 0 not in SHAPES[name] else models[0][name]
            for name in SHAPES}  # fmt: skip


def agrees(found, expected, dtype=torch.float32, atol=2e-6):
    """Whether a merged model is `expected`, to within the rounding of its type and of sums in float32."""
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    np.testing.assert_allclose(flat(double(found)), flat(expected), rtol=torch.finfo(dtype).eps, atol=atol)
    return True


def same_bits(found, expected):
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return all(
        torch.equal(found[name].view(kinds[tensor.dtype]), tensor.view(kinds[tensor.dtype]))
        for name, tensor in expected.items()
    )


# --- linear


def average(sources, weights, normalize):
    return sum(w * x for w, x in zip(weights, sources, strict=True)) / (sum(weights) if normalize else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_average(normalize, dtype, tmp_path):
    sources = [cast(source, dtype) for source in SOURCES]
    found = merge(Linear(normalize=normalize), sources, at=tmp_path, weights=WEIGHTS)
    assert agrees(found, each_tensor(lambda *x: average(x, WEIGHTS, normalize), *sources), dtype)


def test_linear_without_weights_is_the_mean(tmp_path):
    found = merge(Linear(), SOURCES, at=tmp_path)
    assert agrees(found, each_tensor(lambda *x: np.mean(x, axis=0), *SOURCES))


def test_linear_of_one_model_is_that_model_to_the_bit(tmp_path):
    assert same_bits(merge(Linear(), SOURCES[:1], at=tmp_path, weights=[0.3]), SOURCES[0])


@pytest.mark.parametrize("decay", [0.9, 0.5, 1])
def test_decay_is_the_exponential_moving_average_over_the_checkpoints(decay, tmp_path):
    def moving_average(*checkpoints):
        mean, steps = np.zeros_like(checkpoints[0]), 0
        for number, checkpoint in enumerate(checkpoints, 1):
            mean = decay * mean + (1 - decay) * checkpoint if decay < 1 else mean + (checkpoint - mean) / number
            steps = number
        return mean / (1 - decay**steps) if decay < 1 else mean

    assert agrees(merge(Linear(decay=decay), SOURCES, at=tmp_path), each_tensor(moving_average, *SOURCES))


def test_decay_goes_with_weights_and_without_dividing(tmp_path):
    found = merge(Linear(decay=0.5, normalize=False), SOURCES, at=tmp_path, weights=WEIGHTS)
    assert agrees(found, each_tensor(lambda *x: average(x, [0.125, 1.0, -0.75], False), *SOURCES))


def test_sample_counts_as_weights_give_the_mean_over_all_samples(tmp_path):
    """FedAvg: clients whose weights are means over their samples."""
    samples = [tensors(seed, shapes=SHAPES) for seed in range(10)]
    mean = {name: torch.stack([sample[name] for sample in samples]).mean(0) for name in SHAPES}
    clients = [
        {name: torch.stack([sample[name] for sample in samples[part]]).mean(0) for name in SHAPES}
        for part in (slice(0, 1), slice(1, 4), slice(4, 10))
    ]
    found = merge(Linear(), clients, at=tmp_path, weights=[1, 3, 6])
    assert agrees(found, double(mean))


@pytest.mark.parametrize(
    ("method", "weights"),
    [(Linear(), [1.0, -1.0]), (Linear(decay=0.5), [2.0, -1.0]), (Multislerp(), [0.0, 0.0]), (Karcher(), [0.0, 0.0])],
)
def test_weights_that_cancel_out_cannot_be_normalised(method, weights, tmp_path):
    with pytest.raises(RequestError, match="weights that sum to 0 cannot be normalised"):
        merge(method, SOURCES[:2], at=tmp_path, weights=weights)


def test_weights_that_cancel_out_in_one_layer_alone_stop_the_merge(tmp_path):
    with pytest.raises(LfmError, match=r"weights that sum to 0 cannot be normalised, got \[1.0, -1.0\]"):
        merge(Linear(), SOURCES[:2], at=tmp_path, weights=[1.0, [1.0, -1.0]])


@pytest.mark.parametrize("output", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merge_is_rounded_once_to_the_type_asked_for(dtype, output, tmp_path):
    sources = [cast(source, dtype) for source in SOURCES[:2]]
    found = merge(Linear(), sources, at=tmp_path, dtype=output)
    for name in SHAPES:
        exact = (sources[0][name].float() + sources[1][name].float()) / 2
        assert torch.equal(found[name], exact.to(getattr(torch, output)))


# --- task arithmetic, LiNeS, WiSE-FT, nearswap, passthrough


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_adds_weighted_task_vectors(normalize, dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(TaskArithmetic(scale=0.4, normalize=normalize), sources, base, at=tmp_path, weights=WEIGHTS)

    def reference(base, *sources):
        return base + 0.4 * average([source - base for source in sources], WEIGHTS, normalize)

    assert agrees(found, each_tensor(reference, base, *sources), dtype)


def test_task_arithmetic_divides_by_nothing_where_weights_cancel_out(tmp_path):
    found = merge(TaskArithmetic(scale=1, normalize=True), SOURCES[:2], BASE, at=tmp_path, weights=[1, -1])
    assert agrees(found, each_tensor(lambda base, a, b: base + a - b, BASE, *SOURCES[:2]))


def test_a_negative_task_vector_takes_back_what_was_added(tmp_path):
    there = merge(TaskArithmetic(scale=1), SOURCES[:1], BASE, at=tmp_path)
    further = {name: there[name] + SOURCES[0][name] - BASE[name] for name in SHAPES}
    assert agrees(merge(TaskArithmetic(scale=-1), [further], there, at=tmp_path), double(BASE))


def test_an_analogy_gives_the_fourth_model(tmp_path):
    """A is to B as C is to what comes out."""
    a, b, c = SOURCES
    found = merge(TaskArithmetic(scale=1), [c, b, a], BASE, at=tmp_path, weights=[1, 1, -1])
    assert agrees(found, each_tensor(lambda a, b, c: c + b - a, a, b, c))


def test_task_arithmetic_of_scale_0_is_the_base_to_the_bit(tmp_path):
    assert same_bits(merge(TaskArithmetic(scale=0), SOURCES, BASE, at=tmp_path), BASE)


LAMBDAS = {"layers.0.bias": 0, "layers.0.conv": 0, "layers.1.weight": 0.5, "layers.2.weight": 1}


def lines(alpha, beta, weights):
    base, sources = double(BASE), [double(source) for source in SOURCES]
    return {
        name: base[name]
        + (alpha + beta * LAMBDAS.get(name, 0))
        * sum(w * (source[name] - base[name]) for w, source in zip(weights, sources, strict=True))
        for name in SHAPES
    }


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.6), (0.0, 1.0), (0.5, 0.0)])
def test_lines_scales_with_the_layer(alpha, beta, tmp_path):
    found = merge(Lines(alpha=alpha, beta=beta), SOURCES, BASE, at=tmp_path, weights=WEIGHTS)
    assert agrees(found, lines(alpha, beta, WEIGHTS))


def test_lines_begins_with_the_average_of_the_task_vectors(tmp_path):
    assert agrees(merge(Lines(beta=0.4), SOURCES, BASE, at=tmp_path), lines(1 / 3, 0.4, [1, 1, 1]))


def test_lines_of_one_layer_scales_by_alpha(tmp_path):
    base, source = {"layers.0.weight": torch.zeros(3)}, {"layers.0.weight": torch.ones(3)}
    assert merge(Lines(alpha=0.25), [source], base, at=tmp_path)["layers.0.weight"].tolist() == [0.25] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_wise_ft_interpolates(dtype, tmp_path):
    base, tuned = cast(BASE, dtype), cast(SOURCES[0], dtype)
    found = merge(WiseFt(alpha=0.3), [tuned], base, at=tmp_path)
    assert agrees(found, each_tensor(lambda base, tuned: 0.7 * base + 0.3 * tuned, base, tuned), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wise_ft_returns_its_ends_bit_for_bit(dtype, tmp_path):
    base, tuned = cast(BASE, dtype), cast(SOURCES[0], dtype)
    for alpha, end in ((0, base), (1, tuned)):
        assert same_bits(merge(WiseFt(alpha=alpha), [tuned], base, at=tmp_path), end)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_wise_ft_leaves_weights_alone_that_tuning_left_alone(alpha, tmp_path):
    odd = {"w": torch.tensor([-0.0, 0.0, 1e-40, -1e-45, 3.4e38, -1.0])}
    assert same_bits(merge(WiseFt(alpha=alpha), [odd], odd, at=tmp_path), odd)


def test_statistics_of_batch_normalisation_follow_the_weights_where_models_are_interpolated(tmp_path):
    base, tuned = {"bn.running_var": torch.tensor([1.0, 4.0])}, {"bn.running_var": torch.tensor([3.0, 8.0])}
    found = merge(WiseFt(alpha=0.25), [tuned], base, at=tmp_path)["bn.running_var"]
    assert found.tolist() == [1.5, 5.0]


def nearswap(base, source, t):
    found = base.copy()
    for place in np.ndindex(base.shape):
        change = abs(source[place] - base[place])
        weight = min(t / change, 1) if change else 1
        found[place] = weight * source[place] + (1 - weight) * base[place]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.05, 10.0])
def test_nearswap_moves_each_weight_by_t_at_most(t, dtype, tmp_path):
    base, source = cast(BASE, dtype), cast(SOURCES[0], dtype)
    found = merge(Nearswap(t=t), [source], base, at=tmp_path)
    assert agrees(found, each_tensor(lambda base, source: nearswap(base, source, t), base, source), dtype)
    if t in (0.0, 10.0):
        assert same_bits(found, source if t else base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passthrough_gives_a_model_back_or_scales_it(dtype, tmp_path):
    source = cast(SOURCES[0], dtype)
    assert same_bits(merge(Passthrough(), [source], at=tmp_path), source)
    found = merge(Passthrough(scale=-0.3), [source], at=tmp_path)
    assert agrees(found, each_tensor(lambda x: -0.3 * x, source), dtype)


# --- all of them

PAIRS = [Linear(), Slerp(), Karcher(), Multislerp(), *(Nuslerp(unit=unit) for unit in ("tensor", "row", "column"))]
BASED = [TaskArithmetic(), Lines(), ModelStock(), ModelStock(filter_wise=True), Multislerp(), *PAIRS[-3:]]
ODD = {"odd": torch.tensor([[-0.0, 0.0, 1e-40], [-1e-44, 3e38, 1.0]])}


@pytest.mark.parametrize("method", BASED, ids=str)
def test_models_that_are_the_base_give_the_base_to_the_bit(method, tmp_path):
    model = {**BASE, **ODD}
    assert same_bits(merge(method, [model, model], model, at=tmp_path), model)


@pytest.mark.parametrize("method", [*PAIRS, TaskArithmetic(), ModelStock(filter_wise=True)], ids=str)
def test_threads_and_chunks_do_not_show(method, tmp_path, monkeypatch):
    shapes = {"w": (301, 333), "layers.0.v": (40_000,)}
    models = [tensors(seed, shapes=shapes) for seed in (1, 2, 3)]
    base = models.pop() if method.needs.base or isinstance(method, (Slerp, Nuslerp)) else None
    one, two = (merge(method, models, base, at=tmp_path, threads=threads) for threads in (1, 2))
    assert same_bits(one, two)
    monkeypatch.setattr(_engine, "CHUNK", 4096)
    assert same_bits(merge(method, models, base, at=tmp_path), one)
