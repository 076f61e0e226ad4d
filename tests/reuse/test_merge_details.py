"""What a merge must not lose or let pass: signs of zero, denormals, types of counters, configs, the order of files."""

import json

import pytest
import torch
from tests.merging import merge, save, tensors
from tests.tiny import LLAMA, write_llama

import lfm
from lfm.errors import LfmError
from lfm.reuse.merge.dare_linear import DareLinear
from lfm.reuse.merge.linear import Linear
from lfm.reuse.merge.slerp import Slerp
from lfm.reuse.merge.task_arithmetic import TaskArithmetic
from lfm.reuse.merge.ties import Ties
from lfm.reuse.merge.wise_ft import WiseFt

BASE = tensors(0)
ODD = torch.tensor([-0.0, 0.0, 1e-40, -1e-45, 3.4e38, -1.0])


def bits(tensor):
    return tensor.view(torch.int32).tolist()


@pytest.mark.parametrize("scale", [0, 0.7, -0.7, 1])
@pytest.mark.parametrize("method", [TaskArithmetic, DareLinear, Ties])
def test_where_nothing_changed_the_base_stays_to_the_bit(method, scale, tmp_path):
    base, still, moved = {"w": ODD}, {"w": ODD.clone()}, {"w": torch.cat([ODD[:5], torch.tensor([5.0])])}
    found = merge(method(scale=scale), [still, moved], base, at=tmp_path)["w"]
    assert bits(found[:5]) == bits(ODD[:5])


@pytest.mark.parametrize("method", [Linear(), TaskArithmetic(scale=1), Ties(density=1), Slerp(t=0.3)], ids=str)
def test_denormals_are_numbers_like_others(method, tmp_path):
    base = {"w": torch.tensor([0.0, 0.0])}
    sources = [{"w": torch.tensor([4e-40, -8e-42])}, {"w": torch.tensor([4e-40, -8e-42])}]
    found = merge(method, sources, base if method.needs.base else None, at=tmp_path)["w"].double()
    factor = 2 if isinstance(method, TaskArithmetic) else 1
    torch.testing.assert_close(found, factor * sources[0]["w"].double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("share", "kept"), [(0.29, 28), (0.3, 30), (0.999, 99), (0.001, 1)])
def test_the_share_that_ties_keeps_is_rounded_down_to_one_at_least(share, kept, tmp_path):
    changes = {"w": torch.randperm(100, generator=torch.Generator().manual_seed(0)).float() + 1}
    found = merge(Ties(density=share), [changes, changes], {"w": torch.zeros(100)}, at=tmp_path)["w"]
    assert sorted(found[found != 0].tolist()) == list(range(101 - kept, 101))


@pytest.mark.parametrize("method", [WiseFt(alpha=0), WiseFt(alpha=1), Slerp(t=0), Slerp(t=1), Linear()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_broken_numbers_are_named_also_where_they_would_not_count(dtype, method, tmp_path):
    good = save(tmp_path / "good", {"w": torch.ones(9, dtype=dtype)})
    bad = save(tmp_path / "bad", {"w": torch.tensor([1.0] * 8 + [float("nan")], dtype=dtype)})
    for first, second in ((good, bad), (bad, good)):
        models, base = ([second], first) if method.needs.base else ([first, second], None)
        with pytest.raises(LfmError, match=rf"'w' holds NaN or Inf in {bad}: that checkpoint is broken"):
            lfm.merge(method, models, base=base, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_counters_of_another_type_are_a_difference(tmp_path):
    one, two = (save(tmp_path / str(kind), {"n": torch.ones(2, dtype=kind)}) for kind in (torch.int32, torch.uint8))
    out = lfm.merge("linear", [one, two], out=tmp_path / "out")
    assert out.tensor("n").dtype == torch.int32
    assert out.lineage["notes"] == [f"tensor 'n' (I32 [2]) differs between the models; taken from {one}"]


def test_configs_that_differ_are_noted_key_by_key(tmp_path):
    paths = [write_llama(tmp_path / f"m{seed}", seed) for seed in (0, 1, 2)]
    changed = {**LLAMA, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
    (paths[2] / "config.json").write_text(json.dumps(changed))
    out = lfm.merge("ties", paths[1:], base=paths[0], out=tmp_path / "out")
    (note,) = out.lineage["notes"]
    assert note == f"{paths[2]}: config differs from that of {paths[0]}, which is taken: rms_norm_eps, rope_theta"


def test_the_file_does_not_follow_the_layout_of_the_inputs(tmp_path):
    written = set()
    for number, content in enumerate((BASE, dict(reversed(BASE.items())))):
        for sharded in (False, True):
            model = save(tmp_path / f"{number}{sharded}", content, sharded=sharded)
            out = lfm.merge("linear", [model, model], out=tmp_path / f"{number}{sharded}-out")
            written.add((out.folder / "model.safetensors").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("threads", [1, 4])
def test_torch_threads_do_not_change_the_angle_of_slerp(threads, tmp_path):
    models = [{"w": torch.randn(700, 1000, generator=torch.Generator().manual_seed(seed))} for seed in (1, 2)]
    expected = merge(Slerp(), models, at=tmp_path)["w"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(merge(Slerp(), models, at=tmp_path)["w"], expected)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
