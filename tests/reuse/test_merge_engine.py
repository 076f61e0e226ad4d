"""The engine of merging: the same bytes however it runs, every objection at once, nothing half done, little memory."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tests.merging import load, merge, near, save, tensors
from tests.tiny import LLAMA, llama_tensors, write_llama

import lfm
from lfm.errors import LfmError, RequestError
from lfm.reuse.merge import _engine as engine
from lfm.reuse.merge.dare_linear import DareLinear
from lfm.reuse.merge.linear import Linear
from lfm.reuse.merge.model_stock import ModelStock
from lfm.reuse.merge.slerp import Slerp
from lfm.reuse.merge.task_arithmetic import TaskArithmetic
from lfm.reuse.merge.ties import Ties
from lfm.reuse.merge.wise_ft import WiseFt

SHAPES = {"a": (40, 11), "b": (7,), "c": (3, 2, 5), "none": (0, 4), "scalar": ()}
BASE = tensors(0, shapes=SHAPES)
SOURCES = [near(BASE, 1), near(BASE, 2)]
METHODS = [
    Linear(),
    TaskArithmetic(),
    Ties(density=0.3),
    Ties(density=0.3, scope="tensor"),
    DareLinear(),
    Slerp(t=0.3),
    WiseFt(alpha=0.3),
]
by_name = pytest.mark.parametrize("method", METHODS, ids=str)


def inputs(method):
    """Return what a method takes of two sources and a base."""
    return SOURCES[: method.needs.sources[1]], BASE if method.needs.base else None


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def problems(method, sources, out, **options):
    """Return every line of the one RequestError, raised before anything is written."""
    with pytest.raises(RequestError) as caught:
        lfm.merge(method, sources, out=out, **options)
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()
    return caught.value.problems


def nothing_loads(out):
    """Whether a failed merge left no folder, and nothing that any loader would take."""
    assert not out.exists()
    with pytest.raises(RequestError):
        lfm.open_checkpoint(out.with_name(f"{out.name}.partial"))
    return not list(out.parent.glob(f"{out.name}*/*.safetensors"))


# --- the same bytes, however it runs


@by_name
def test_threads_do_not_change_a_bit(method, tmp_path):
    sources, base = inputs(method)
    one, many = (merge(method, sources, base, at=tmp_path, threads=threads) for threads in (1, 4))
    assert same(one, many)


@by_name
@pytest.mark.parametrize("chunk", [8, 64, 160])
def test_the_size_of_a_chunk_does_not_change_a_bit(chunk, method, tmp_path, monkeypatch):
    sources, base = inputs(method)
    whole = merge(method, sources, base, at=tmp_path)
    monkeypatch.setattr(engine, "CHUNK", chunk)
    monkeypatch.setattr(engine, "KEEP", 0)
    assert same(merge(method, sources, base, at=tmp_path), whole)


@by_name
def test_how_a_checkpoint_is_split_into_files_does_not_change_a_bit(method, tmp_path):
    outputs = []
    for sharded in (False, True):
        sources, base = inputs(method)
        paths = [save(tmp_path / f"{sharded}{i}", source, sharded=sharded) for i, source in enumerate(sources)]
        base_path = base and save(tmp_path / f"{sharded}base", base, sharded=sharded)
        outputs.append(lfm.merge(method, paths, base=base_path, out=tmp_path / f"out{sharded}"))
    assert outputs[0].digest == outputs[1].digest


def test_the_order_of_hashes_does_not_change_a_bit(tmp_path):
    paths = [str(save(tmp_path / f"m{i}", model)) for i, model in enumerate((BASE, *SOURCES))]
    digests = set()
    for seed in ("0", "1"):
        out = tmp_path / f"out{seed}"
        command = ["-m", "lfm", "merge", "dare_linear", *paths[1:], "--base", paths[0], "-o", str(out), "--seed", "3"]
        subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        digests.add((out / "model.safetensors").read_bytes())
    assert len(digests) == 1


# --- what is merged and what is not


def test_counters_are_taken_from_the_base_and_a_difference_is_noted(tmp_path):
    models = [
        save(
            tmp_path / f"m{count}", {"w": torch.ones(3), "count": torch.tensor([7, count]), "flag": torch.tensor(True)}
        )
        for count in (1, 2, 3)
    ]
    out = lfm.merge("task_arithmetic", models[1:], base=models[0], out=tmp_path / "out")
    assert out.tensor("count").tolist() == [7, 1]
    (note,) = out.lineage["notes"]
    assert note == f"tensor 'count' (I64 [2]) differs between the models; taken from {models[0]}"


def test_a_base_that_a_method_does_not_use_gives_the_config_and_is_not_read(tmp_path):
    base = save(tmp_path / "base", {"w": torch.tensor([float("nan")])})
    (base / "config.json").write_text('{"model_type": "of the base"}')
    source = save(tmp_path / "source", {"w": torch.ones(1)})
    out = lfm.merge("linear", [source, source], base=base, out=tmp_path / "out")
    assert out.config == {"model_type": "of the base"}
    assert out.tensor("w").item() == 1


@by_name
def test_models_without_a_single_number_are_merged(method, tmp_path):
    counters = {"count": torch.tensor([1, 2]), "none": torch.zeros(0)}
    low, _ = method.needs.sources
    assert same(merge(method, [counters] * low, counters if method.needs.base else None, at=tmp_path), counters)


@by_name
@pytest.mark.parametrize("wide", [1, 3])
def test_float64_is_merged_in_float64(wide, method, tmp_path):
    models = [{name: tensor.double() / 3 for name, tensor in model.items()} for model in (*SOURCES, BASE)]
    stored = [models[i] if i < wide else {n: t.float() for n, t in models[i].items()} for i in range(3)]
    exact = [{name: tensor.double() for name, tensor in model.items()} for model in stored]
    kept = torch.float32 if method.needs.base and wide == 1 else torch.float64
    high = method.needs.sources[1]
    found, expected = (
        merge(method, sources[:high], base if method.needs.base else None, at=tmp_path)
        for *sources, base in (stored, exact)
    )
    assert {tensor.dtype for tensor in found.values()} == {kept}
    if not (isinstance(method, DareLinear) and wide == 1):  # its masks follow the bytes of the source
        assert same(found, {name: tensor.to(kept) for name, tensor in expected.items()})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_codes_and_complex_numbers_are_refused(dtype, tmp_path):
    path = save(tmp_path / "codes", {"w": torch.ones(4).to(dtype), "scale": torch.ones(1)})
    (line,) = problems("linear", [path, path], tmp_path / "out")
    assert re.search(r"codes: tensor 'w' is (F8_E4M3|F8_E5M2|C64) \[4\]: .* cannot be merged", line)


def test_an_adapter_is_merged_as_the_model_that_it_makes(tmp_path):
    base = write_llama(tmp_path / "base")
    factors = {"A": torch.ones(2, 16), "B": torch.full((16, 2), 0.5)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{module}.lora_{name}.weight": tensor for name, tensor in factors.items()},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    out = lfm.merge("task_arithmetic", [f"{base}+{tmp_path / 'lora'}"], base=base, out=tmp_path / "out")
    change = {name: out.tensor(name) - tensor for name, tensor in load(base).items()}
    moved = change.pop("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(moved, 0.3 * 3 * factors["B"] @ factors["A"])
    assert not any(tensor.any() for tensor in change.values())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_output_loads_in_transformers_and_generates(dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    paths = [write_llama(tmp_path / f"m{seed}", seed) for seed in (0, 1, 2)]
    out = lfm.merge("ties", paths[1:], base=paths[0], out=tmp_path / "out", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == getattr(torch, dtype or "float32")
    assert text.shape == (1, 8)
    assert torch.equal(model.get_input_embeddings().weight, out.tensor("model.embed_tokens.weight"))


# --- every objection at once, before anything is written


def test_models_that_do_not_fit_are_named_with_every_difference(tmp_path):
    base = save(tmp_path / "base", BASE, vocabulary={"x": 0, "y": 1})
    broken = {**BASE, "a": torch.zeros(2, 2), "extra": torch.zeros(1), "scalar": torch.tensor(1)}
    del broken["b"]
    other = save(tmp_path / "other", broken, vocabulary={"x": 0, "z": 1, "y": 2})
    found = problems(Ties(), [base, other], tmp_path / "out", base=base, weights=[1.0])
    assert found == (
        "2 models and 1 weight: give one weight for each model",
        f"{other}: tensor 'b' is missing; {base} has it",
        f"{other}: tensor 'extra' is not in {base}",
        *(
            f"{other}: tensor {name!r} is {got}, in {base} it is {wanted}"
            for name, got, wanted in (("a", "F32 [2, 2]", "F32 [40, 11]"), ("scalar", "I64 []", "F32 []"))
        ),
        f"{other}: its tokenizer differs from that of {base}, and no tensor of theirs is known to have a row "
        "for each token, so that they could be matched; if no tensor has, take the tokenizer files out of a copy",
    )


def test_a_tokenizer_with_one_more_token_differs(tmp_path):
    table = {"model.embed_tokens.weight": torch.ones(2, 3)}
    one = save(tmp_path / "one", table, vocabulary={"x": 0})
    two = save(tmp_path / "two", table, vocabulary={"x": 0, "y": 1})
    (line,) = problems(Linear(), [one, two], tmp_path / "out")
    assert "its tokenizer is not that of" in line
    assert "say whose tokens the output has: `tokenizer: base`, `union` or one of the models" in line


def test_many_differences_are_counted(tmp_path):
    one = save(tmp_path / "one", {f"t{i:02}": torch.zeros(1) for i in range(20)})
    two = save(tmp_path / "two", {"t00": torch.zeros(1)})
    *named, rest = problems(Linear(), [one, two], tmp_path / "out")
    assert len(named) == 3
    assert rest == "... and 16 more like it"


def test_a_wrong_request_and_models_that_are_not_there_are_told_together(tmp_path):
    found = problems(Ties(), ["no-model", "none-either"], tmp_path / "out", weights=[1.0, 2.0, 3.0])
    assert found[:2] == (
        "Ties needs a base (--base), the model that the sources were tuned from",
        "2 models and 3 weights: give one weight for each model",
    )
    assert ["no-model" in found[2], "none-either" in found[3], len(found)] == [True, True, 4]


@pytest.mark.parametrize(
    ("method", "count", "options", "message"),
    [
        (ModelStock(), 1, {}, "ModelStock takes 2 or more models, got 1"),
        (Slerp(), 3, {}, "Slerp takes 2 models, got 3"),
        (WiseFt(), 2, {}, "WiseFt takes 1 model, got 2"),
        (Slerp(), 2, {"weights": [1, 1]}, "Slerp takes no weights"),
        (
            Linear(),
            2,
            {"weights": [1, float("nan")]},
            "merge linear: weights.1: Input should be a finite number (got nan)",
        ),
        (
            Linear(),
            2,
            {"weights": [float("inf"), 1]},
            "merge linear: weights.0: Input should be a finite number (got inf)",
        ),
        (Linear(), 2, {"weights": [1, -1]}, "weights that sum to 0 cannot be normalised, got [1.0, -1.0]"),
        (Linear(), 3, {"weights": [0.1, 0.2, -0.3]}, "weights that sum to"),
        (Linear(), 1, {"weights": [0]}, "weights that sum to 0 cannot be normalised"),
    ],
)
def test_a_request_that_makes_no_sense_is_told(method, count, options, message, tmp_path):
    model = save(tmp_path / "model", BASE)
    base = {"base": model} if method.needs.base else {}
    (line,) = problems(method, [model] * count, tmp_path / "out", **base, **options)
    assert line.startswith(message)


def test_weights_that_sum_to_0_are_fine_where_nothing_is_divided_by_the_sum(tmp_path):
    found = merge(Linear(normalize=False), SOURCES, at=tmp_path, weights=[1, -1])
    torch.testing.assert_close(found["a"], SOURCES[0]["a"] - SOURCES[1]["a"])


# --- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("guilty", ["base", "source0", "source1"])
@pytest.mark.parametrize("method", [TaskArithmetic(), Ties(), Ties(scope="tensor"), DareLinear(density=0.01)], ids=str)
def test_a_checkpoint_with_broken_numbers_is_named(method, guilty, value, tmp_path):
    models = {"source0": SOURCES[0], "source1": SOURCES[1], "base": BASE}
    broken = models[guilty]["a"].clone()
    broken[5, 5] = value
    models[guilty] = {**models[guilty], "a": broken}
    paths = {name: save(tmp_path / name, model) for name, model in models.items()}
    sources = [paths["source0"], paths["source1"]]
    with pytest.raises(LfmError) as caught:
        lfm.merge(method, sources, base=paths["base"], out=tmp_path / "out")
    assert str(caught.value) == f"tensor 'a' holds NaN or Inf in {paths[guilty]}: that checkpoint is broken"
    assert caught.value.exit_code == 1
    assert nothing_loads(tmp_path / "out")


def test_an_overflow_is_named_and_told_from_a_broken_input(tmp_path):
    large = save(tmp_path / "large", {"w": torch.full((9,), 40_000.0)})
    with pytest.raises(LfmError, match=r"tensor 'w': the merge overflows the range of F16"):
        lfm.merge(Linear(normalize=False), [large, large], out=tmp_path / "out", dtype="float16")
    assert nothing_loads(tmp_path / "out")


def test_a_float64_beyond_float32_is_no_broken_checkpoint(tmp_path):
    large = save(tmp_path / "large", {"w": torch.full((2,), 1e300, dtype=torch.float64)})
    assert lfm.merge("linear", [large, large], out=tmp_path / "out").tensor("w").tolist() == [1e300, 1e300]
    with pytest.raises(LfmError, match="overflows the range of F32"):
        lfm.merge("linear", [large, large], out=tmp_path / "narrow", dtype="float32")


def test_a_merge_after_one_that_failed_is_as_if_nothing_had_been(tmp_path):
    good, bad = save(tmp_path / "good", BASE), save(tmp_path / "bad", {**BASE, "a": BASE["a"] / 0})
    with pytest.raises(LfmError):
        lfm.merge("linear", [good, bad], out=tmp_path / "out")
    assert same(load(lfm.merge("linear", [good, good], out=tmp_path / "out").folder), BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]


# --- a disk that fills up


def test_a_disk_that_fills_up_at_any_byte_is_told_and_a_rerun_works(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"m{i}", model) for i, model in enumerate((BASE, *SOURCES))]
    call = {"base": paths[0], "settings": lfm.Settings(threads=2, quiet=True)}
    expected = lfm.merge("ties", paths[1:], out=tmp_path / "expected", **call).digest
    pwrite, rng = os.pwrite, random.Random(5)
    for _ in range(20):
        left = rng.randrange(1, 2000)

        def until_full(descriptor, data, offset):
            nonlocal left
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = pwrite(descriptor, data[:left], offset)
            left -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", until_full)
            if rng.random() < 0.9:  # nine in ten file systems cannot take the space beforehand
                patch.setattr(os, "posix_fallocate", lambda *_: None)
            with pytest.raises(LfmError, match="No space left on device; nothing was changed"):
                lfm.merge("ties", paths[1:], out=tmp_path / "out", **call)
            assert nothing_loads(tmp_path / "out")
    assert lfm.merge("ties", paths[1:], out=tmp_path / "out", **call).digest == expected


# --- many tensors


def test_cost_is_linear_in_the_number_of_tensors(tmp_path):
    """Counted in calls of the machine and not in seconds: one for each tensor, and three for what is trimmed."""
    from lfm.reuse.merge._machine import kernels

    calls, run = {}, kernels.run
    for count in (50, 400):
        content = {f"t{i}": torch.full((8, 4), float(i)) for i in range(count)}
        paths = [str(save(tmp_path / f"{count}-{i}", near(content, i) if i else content)) for i in range(3)]
        made = []

        def counting(*given, made=made, **options):
            made.append(1)
            return run(*given, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "run", counting)
            lfm.merge("ties", paths[1:], base=paths[0], out=tmp_path / f"out{count}")
        calls[count] = len(made)
    assert calls[400] == 8 * calls[50]


# --- a process of its own

MEASURED = """
import re, sys
import lfm, numpy, torch
from lfm.reuse.merge import _engine
from lfm.recipe import execute, summary
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) << 10
before = peak()
lfm.merge(sys.argv[1], sys.argv[4:], base=sys.argv[3], out=sys.argv[2], settings=lfm.Settings(threads=2))
print(peak() - before, *sorted({"transformers", "accelerate", "peft"} & set(sys.modules)))
"""


def test_memory_is_bounded_by_the_chunk_and_nothing_large_is_imported(tmp_path):
    values = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = str(save(tmp_path / "model", {f"t{i}": values.clone() for i in range(10)}))  # 400 MB
    command = [sys.executable, "-c", MEASURED, "ties", str(tmp_path / "out"), model, model, model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path)
    peak, *imported = done.stdout.split()
    assert imported == []
    assert int(peak) < 150_000_000  # chunks of two threads, what the allocator keeps of them, and the report


KILLED = """
import os, sys, time
import lfm
from lfm.checkpoint import TensorWriter
from lfm.recipe import execute, summary
from lfm.reuse.merge import _engine, dare_linear
_engine.CHUNK = 64
append = TensorWriter.append
def slowly(self, name, part):
    append(self, name, part)
    time.sleep(pause)
TensorWriter.append = slowly
base, *models = sys.argv[1:]
for line in sys.stdin:
    pause, out = float(line.split()[0]), line.split()[1]
    child = os.fork()
    if not child:
        print(lfm.merge("dare_linear", models, base=base, out=out, settings=lfm.Settings(threads=2)).digest, flush=True)
        os._exit(0)
    print(child, flush=True)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_killed_merge_leaves_nothing_half_and_a_rerun_gives_the_same(tmp_path):
    """One process has everything imported and forks a merge for each kill, so that kills meet the work itself."""
    from transformers import AutoModelForCausalLM

    paths = [write_llama(tmp_path / f"m{seed}", seed) for seed in (0, 1, 2)]
    undisturbed = lfm.merge("dare_linear", paths[1:], base=paths[0], out=tmp_path / "undisturbed")
    out, partial, rng = tmp_path / "out", tmp_path / "out.partial", random.Random(11)
    command, unfinished = [sys.executable, "-c", KILLED, *map(str, paths)], 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        for _ in range(20):
            server.stdin.write(f"0.03 {out}\n")
            child = int(server.stdout.readline())
            end = time.monotonic() + rng.uniform(0, 0.6)  # its pauses alone take a second
            while time.monotonic() < end:
                assert not out.exists()
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)
            assert server.stdout.readline() == f"exit {-signal.SIGKILL}\n"
            assert not out.exists()
            if partial.exists():
                unfinished += 1
                assert nothing_loads(out)
                with pytest.raises((OSError, ValueError)):
                    AutoModelForCausalLM.from_pretrained(partial)
        server.stdin.write(f"0 {out}\n")
        server.stdin.close()
        assert server.stdout.read().split()[1:] == [undisturbed.digest, "exit", "0"]
    assert unfinished >= 10
    assert lfm.open_checkpoint(out).digest == undisturbed.digest
    assert not partial.exists()
    assert (out / "model.safetensors").read_bytes() == (undisturbed.folder / "model.safetensors").read_bytes()
    assert set(load(out)) == set(llama_tensors(0))
    assert lfm.open_checkpoint(out).config == LLAMA
