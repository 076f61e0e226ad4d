"""exp and tanh of the merge machine: the same bits however they are computed, and those of the mathematics."""

import numpy as np
import pytest

from lfm.reuse.merge._machine import kernels as kernels
from lfm.reuse.merge._machine.array import Array, exp, tanh
from lfm.reuse.merge._machine.devices import runner
from lfm.reuse.merge._machine.program import Wanted, compile_program

X = Array("INPUT")
DTYPES = {"F32": np.float32, "F64": np.float64}
FUNCTIONS = {"exp": (exp, np.exp, 700), "tanh": (tanh, np.tanh, 20)}


def numbers(dtype):
    generator = np.random.default_rng(0)
    sizes = (1e-30, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 10.0, 60.0)
    edges = [0.0, -0.0, np.log(2) / 2, -np.log(2) / 2, 1.5 * np.log(2), 20.0, 700.0, -700.0, 1e30, -1e30]
    return np.concatenate([*(generator.normal(0, size, 1000) for size in sizes), edges]).astype(DTYPES[dtype])


def computed(run, name, dtype):
    x, program = numbers(dtype), compile_program(Wanted(FUNCTIONS[name][0](X)))
    output = kernels.Output(np.empty_like(x), dtype)
    run(program, kernels.Part([x], [dtype]), kernels.Totals.of(program), output, wide=dtype == "F64")
    return output.values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_machines_give_the_same_bits(name, dtype):
    expected = computed(kernels.run_numpy, name, dtype).tobytes()
    assert computed(runner("cpu"), name, dtype).tobytes() == expected
    if kernels.native(dtype == "F64") is None:
        pytest.skip("no C compiler here")
    assert computed(kernels.run, name, dtype).tobytes() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_are_exact_to_the_last_bits(name, dtype):
    _, function, most = FUNCTIONS[name]
    with np.errstate(over="ignore", under="ignore"):
        expected = function(np.clip(numbers(dtype).astype(np.float64), -most, most)).astype(DTYPES[dtype])
    found = computed(kernels.run, name, dtype)
    normal = np.abs(expected) > np.finfo(DTYPES[dtype]).tiny
    ulps = 1 if dtype == "F32" else 4
    np.testing.assert_allclose(found[normal], expected[normal], rtol=ulps * np.finfo(DTYPES[dtype]).eps)
    assert (np.abs(found[~normal]) <= np.finfo(DTYPES[dtype]).tiny).all()
