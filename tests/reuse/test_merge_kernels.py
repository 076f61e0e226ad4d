"""The machine that merges run on: compiled, in numpy and in torch, to the same bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.reuse.merge._machine import kernels as kernels
from lfm.reuse.merge._machine.array import Array, equal, maximum, minimum, once, sign, sqrt, total, where
from lfm.reuse.merge._machine.devices import runner
from lfm.reuse.merge._machine.devices import uniform as torch_uniform
from lfm.reuse.merge._machine.program import OPS, Kept, Wanted, compile_program

A, B, C = (Array("INPUT", index=index) for index in range(3))
KEYS = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
R = Array("RANDOM", index=0), Array("RANDOM", index=1)
OUTPUTS = {
    "add": A + B + 0.1,
    "subtract": 0.1 - (A - B),
    "multiply": A * B * -3.0,
    "divide": A / where(B, B, 1.0),
    "abs": abs(A) - abs(-A) + abs(B),
    "roots": sqrt(abs(A * B)),
    "signs": sign(A - B) * sign(C),
    "smaller and larger": minimum(A, B) * 2.0 + maximum(B, C),
    "comparisons": (A < B) + 2.0 * (A <= B) + 4.0 * (A > 0.01) + 8.0 * (C >= B) + 16.0 * equal(A, B),
    "random": where(R[0] < 0.3, A / 0.3, 0.0) + R[1],
    "many": total([A * float(n) + B for n in range(30)]),
}
TOTALS = Wanted(
    products=[(A, A), (A, B), (abs(B), sign(C))],
    largest=[A, -B, abs(C)],
    high=[A, B - C],
    low=[(A, 0x3C01), (B - C, 0x3BFF)],
)


def part(dtype, size, seed=0):
    generator = np.random.default_rng(seed)
    values = [(generator.standard_normal(size) * 0.02).astype(np.float32) for _ in range(3)]
    if size > 5:
        for value in values:
            value[:6] = [0.0, -0.0, 1e-41, -1e-39, 3.0, 1.0]
    return kernels.Part([stored(value, dtype) for value in values], [dtype] * 3, 96, KEYS)


def stored(values, dtype):
    if dtype == "BF16":
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return values.astype(kernels.DTYPES[dtype])


def outcome(run, program, of, dtype="F32", wide=False):
    """Everything that a run gives, as bytes."""
    totals, output = kernels.Totals.of(program), kernels.Output(np.zeros(of.size, kernels.DTYPES[dtype]), dtype)
    broken = run(program, of, totals, output, wide=wide)
    flags = (broken.inputs, broken.output) if isinstance(broken, kernels.Broken) else broken
    return [values.tobytes() for values in (output.values, totals.lanes, totals.largest, totals.counts)], flags


def compiled(wide=False):
    if kernels.native(wide) is None:
        pytest.skip("no C compiler here, so that there is nothing to compare: numpy is what runs")
    return kernels.run


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_compiled_and_numpy_give_the_same_bits(name, dtype, wide):
    run = compiled(wide)
    for size in (1, 1023, 1024, 2500):
        for noise in (None, R[1]):
            program, of = compile_program(Wanted(OUTPUTS[name], noise)), part(dtype, size)
            one, _ = outcome(run, program, of, dtype, wide)
            two, _ = outcome(kernels.run_numpy, program, of, dtype, wide)
            assert one == two


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_compiled_and_numpy_find_out_the_same(dtype, wide):
    run, program = compiled(wide), compile_program(TOTALS)
    for size in (1, 31, 33, 5000):
        assert (
            outcome(run, program, part(dtype, size), wide=wide)[0]
            == outcome(kernels.run_numpy, program, part(dtype, size), wide=wide)[0]
        )


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_torch_gives_the_same_numbers(name, dtype):
    for noise in (None, R[1]):
        program, of = compile_program(Wanted(OUTPUTS[name], noise)), part(dtype, 2500)
        (one, *_), (two, *_) = (
            outcome(runner("cpu"), program, of, dtype)[0],
            outcome(kernels.run, program, of, dtype)[0],
        )
        if name == "roots":  # torch's square root of denormals is off by a bit
            one, two = (np.frombuffer(found, kernels.DTYPES[dtype]) for found in (one, two))
            np.testing.assert_allclose(kernels.widened(one, dtype), kernels.widened(two, dtype), rtol=1e-2)
        else:
            assert one == two


def test_torch_finds_out_the_same():
    program, of = compile_program(TOTALS), part("BF16", 5000)
    totals = [kernels.Totals.of(program) for _ in range(2)]
    for run, found in zip((runner("cpu"), kernels.run), totals, strict=True):
        run(program, of, found)
    np.testing.assert_allclose(totals[0].products, totals[1].products, rtol=1e-12)
    assert (totals[0].counts == totals[1].counts).all()
    assert (totals[0].largest == totals[1].largest).all()


def test_what_is_found_out_does_not_depend_on_where_a_tensor_is_cut():
    program, whole = compile_program(TOTALS), part("F32", 5000)
    expected, pieces = kernels.Totals.of(program), kernels.Totals.of(program)
    kernels.run(program, whole, expected)
    for start in range(0, 5000, 160):
        inputs = [values[start : start + 160].copy() for values in whole.inputs]
        kernels.run(program, kernels.Part(inputs, whole.dtypes, 96 + start, KEYS), pieces)
    for name in ("lanes", "largest", "counts"):
        assert (getattr(expected, name) == getattr(pieces, name)).all()
    a, b = (values.astype(np.float64) for values in whole.inputs[:2])
    np.testing.assert_allclose(expected.products[:2], [a @ a, a @ b], rtol=1e-12)


# --- random numbers


def test_random_numbers_are_philox_4x32_7():
    """Known answer of the authors' test vectors (Random123, kat_vectors): key and counter 0."""
    words = np.array([0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48], dtype=np.uint32)
    expected = (words >> 8).astype(np.float32) * np.float32(2**-24)
    assert kernels.uniform(0, 0, 4).tolist() == expected.tolist()
    assert torch_uniform(0, 0, 4, "cpu").tolist() == expected.tolist()


def test_random_numbers_depend_on_place_and_key_alone():
    whole = kernels.uniform(77, 0, 4096)
    assert (kernels.uniform(77, 1000, 512) == whole[1000:1512]).all()
    assert (torch_uniform(77, 1000, 512, "cpu").numpy() == whole[1000:1512]).all()
    far = 1 << 40
    assert (kernels.uniform(77, far, 64) != whole[:64]).any()
    assert abs(whole.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(whole, kernels.uniform(78, 0, 4096))[0, 1]) < 0.05


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_is_unbiased_and_leaves_alone_what_needs_none(dtype):
    program = compile_program(Wanted(A, R[0]))
    value = np.float32(1.0 + 0.3 * (2**-7 if dtype == "BF16" else 2**-10))
    of = kernels.Part([np.full(200_000, value)], ["F32"], 0, KEYS)
    output = kernels.Output(np.zeros(of.size, kernels.DTYPES[dtype]), dtype)
    kernels.run(program, of, kernels.Totals.of(program), output)
    found = kernels.widened(output.values, dtype).astype(np.float64)
    assert len(np.unique(found)) == 2
    np.testing.assert_allclose(found.mean(), value, rtol=3e-5)  # four standard deviations
    exact = kernels.Part([np.array([1.0, -0.5, 0.0, 96.0, 2**-24, -(2**-20)], np.float32)], ["F32"], 0, KEYS)
    output = kernels.Output(np.zeros(6, kernels.DTYPES[dtype]), dtype)
    kernels.run(program, exact, kernels.Totals.of(program), output)
    assert kernels.widened(output.values, dtype).tolist() == exact.inputs[0].tolist()


# --- numbers that are none


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_broken_inputs_and_overflow_are_told_apart(dtype, value):
    program = compile_program(Wanted(A + B * 0.0))
    for run in (kernels.run, kernels.run_numpy, runner("cpu")):
        for guilty in (0, 1):
            values = [np.ones(1500, np.float32), np.ones(1500, np.float32)]
            values[guilty][1400] = value
            of = kernels.Part([stored(one, dtype) for one in values], [dtype] * 2)
            _, flags = outcome(run, program, of, "F32")
            assert (flags[0] == [guilty]) if isinstance(flags[0], list) else flags[:2] == [guilty == 0, guilty == 1]
    large = kernels.Part([np.full(3, 60_000.0, np.float32)], ["F32"])
    for run in (kernels.run, runner("cpu")):
        _, (inputs, overflow) = outcome(run, compile_program(Wanted(A * 2.0)), large, "F16")
        assert (inputs, overflow) == ([], True)


# --- programs


def test_what_arrays_share_is_computed_once():
    difference = A - B
    program = compile_program(Wanted(difference * difference + (A - B), products=[(A - B, difference)]))
    assert [OPS[step[0]] for step in program.steps].count("SUB") == 1
    assert program.registers <= 5


def test_registers_are_used_again():
    assert compile_program(Wanted(total([abs(A * float(n)) for n in range(200)]))).registers < 210
    chain = A
    for _ in range(5000):
        chain = chain + B
    assert compile_program(Wanted(chain)).registers <= 4


def test_an_array_has_no_truth():
    with pytest.raises(TypeError, match="where"):
        bool(A < B)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200), st.integers(1, 50)
)
@settings(deadline=None, max_examples=60)
def test_ranks_are_those_of_a_stable_sort(values, row):
    rows = len(values) // row
    if rows == 0:
        return
    flat = np.abs(np.array(values[: rows * row], dtype=np.float32))
    one, two = flat.copy(), flat.copy()
    kernels.rank_rows(one, row)
    kernels.rank_rows_numpy(two, row)
    assert one.tobytes() == two.tobytes()
    for found, given_row in zip(one.reshape(rows, row), flat.reshape(rows, row), strict=True):
        order = sorted(range(row), key=lambda i: (given_row[i], i))
        expected = [order.index(i) / (row - 1) if row > 1 else 0.5 for i in range(row)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("row", [1, 2, 7, 1024, 4096])
@pytest.mark.parametrize(
    "values",
    [
        lambda random, count: random.normal(0, 0.002, count),
        lambda random, count: np.round(random.normal(0, 2, count)) / 512,  # many that are equal
        lambda random, count: np.exp(random.normal(-20, 12, count)),  # nearly all in the lowest bucket
        lambda random, count: np.where(random.random(count) < 1e-3, 3e38, random.normal(0, 1e-3, count)),
        lambda random, count: random.random(count) * 1e-42,  # subnormal
        lambda random, count: np.sort(random.random(count))[::-1],
        lambda random, count: np.zeros(count),
        lambda random, count: np.full(count, np.inf),
    ],
)
def test_ranks_of_rows_that_are_hard_to_sort(values, row):
    flat = np.abs(values(np.random.default_rng(0), 8 * row)).astype(np.float32)
    one, two = flat.copy(), flat.copy()
    kernels.rank_rows(one, row)
    kernels.rank_rows_numpy(two, row)
    assert one.tobytes() == two.tobytes()


# --- what is kept from one pass for the next


def on_torch(program, of, totals, output, wide=False):
    return runner("cpu")(program, of, totals, output, wide=wide)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("run", [kernels.run, kernels.run_numpy, on_torch])
def test_a_condition_is_found_again_as_it_was(run, wide):
    """In parts of a tensor, the last of which is no whole number of bytes."""
    size = 1024 + 32 + 5
    condition = [once(R[0] < 0.3, 0), once(A > B, 1)]
    result = where(condition[0], A, 0.0) + where(condition[1], B, C)
    models = part("F32", size).inputs
    kept = Kept.empty(2, size)

    def merged(wanted):
        program, out = compile_program(wanted), np.zeros(size, np.float32)
        for start, stop in ((0, 1024), (1024, 1056), (1056, size)):
            inputs = [model[start:stop] for model in models]
            bits = None if wanted.kept is None else wanted.kept.bits
            piece = kernels.Part(inputs, ["F32"] * 3, start, KEYS, bits)
            run(program, piece, kernels.Totals.of(program), kernels.Output(out[start:stop], "F32"), wide=wide)
        return out, program

    plain, program = merged(Wanted(result))
    assert (program.draws, program.keeps) == (True, frozenset())
    found, program = merged(Wanted(result, kept=kept))
    assert (program.draws, program.keeps) == (True, {0, 1})
    assert found.tobytes() == plain.tobytes()
    kept.filled.update(program.keeps)
    found, program = merged(Wanted(result, kept=kept))
    assert (program.draws, program.keeps) == (False, frozenset())
    assert found.tobytes() == plain.tobytes()
