"""The training loop: a run that was killed ends in the bits of one that was not, and what must stay fixed does."""

from __future__ import annotations

import copy
import hashlib
import math
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.killing import start
from torch import nn
from torch.nn import functional

from lfm.errors import LfmError, RequestError
from lfm.models.anatomy import anatomy
from lfm.train import Log, Trained, _rate, fit
from lfm.tune.weights.full import Full

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Dropout, batch norm, a tied pair of weights: all that makes a resumed run hard to get right."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.hidden.weight
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(functional.relu(self.norm(self.into(x))))
        return self.head(self.again(functional.relu(self.hidden(x))))


class Plain(nn.Module):
    """No randomness and no statistics over the batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Numbered:
    """Batches drawn from their number; `fail_at` raises once that batch is asked for."""

    def __init__(self, size=8, fail_at=None):
        self.size, self.fail_at = size, fail_at

    def batch(self, number):
        if number == self.fail_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(self.size, 6, generator=generator)
        return {"x": x, "labels": (x[:, :3].sum(1) > 0).long() + (x[:, 3] > 1).long()}


class Counting(Numbered):
    """A source that learns as it goes: batches shift with how many were drawn, which only a saved state knows."""

    def __init__(self, fail_at=None):
        super().__init__(fail_at=fail_at)
        self.drawn = torch.zeros(())

    def batch(self, number):
        made = super().batch(number)
        self.drawn += 1
        return {**made, "x": made["x"] + 0.01 * self.drawn}

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"].clone()


def task_loss(module, batch):
    return {"task": functional.cross_entropy(module(batch["x"]).float(), batch["labels"])}


def new(kind=Net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def groups(module, rate=0.05):
    return [{"params": [parameter], "lr": rate, "weight_decay": 0.01} for parameter in module.parameters()]


def train(module, resume, method=None, source=None, **options):
    options = {"steps": 12, "seed": 3, "device": "cpu", "save_seconds": 0.0, "quiet": True, **options}
    method = method or Trained(learning_rate=0.05)
    chosen = options.pop("groups", None) or groups(module)
    return fit(module, source or Numbered(), options.pop("loss", task_loss), chosen, method, resume=resume, **options)


def bits(module):
    content = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        content.update(name.encode() + tensor.detach().numpy().tobytes())
    return content.hexdigest()


def held_out_loss(module):
    batch = Numbered(64).batch(10_000)

    def validate():
        assert not module.training
        with torch.no_grad():
            return float(task_loss(module, batch)["task"])

    return validate


# --- going on from a saved state ------------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "bfloat16": {"precision": "bfloat16"},
    "early-stopping": {"patience": 2, "validate_every": 2, "learning_rate": 0.5, "schedule": "constant"},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_a_run_that_failed_goes_on_to_the_same_bits_and_the_same_log(tmp_path, settings, stop):
    method = Trained(**{"learning_rate": 0.05, **settings})
    whole, broken, resumed = new(), new(), new()
    watched = method.patience is not None
    chosen = {"groups": groups(whole, method.learning_rate)}
    expected = train(whole, tmp_path / "a", method, validate=held_out_loss(whole) if watched else None, **chosen)
    stop = min(stop, len(expected.steps) - 1)
    with pytest.raises(KeyboardInterrupt):
        train(
            broken,
            tmp_path / "b",
            method,
            Numbered(fail_at=stop * method.accumulate),
            validate=held_out_loss(broken) if watched else None,
            groups=groups(broken, method.learning_rate),
        )
    log = train(
        resumed,
        tmp_path / "b",
        method,
        validate=held_out_loss(resumed) if watched else None,
        groups=groups(resumed, method.learning_rate),
    )
    assert bits(resumed) == bits(whole)
    assert log == expected
    assert [record["step"] for record in log.steps] == list(range(1, len(log.steps) + 1))


def test_steps_that_are_done_are_not_done_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(new(), tmp_path, source=Numbered(fail_at=7))
    seen = []

    class Watched(Numbered):
        def batch(self, number):
            seen.append(number)
            return super().batch(number)

    train(new(), tmp_path, source=Watched())
    assert seen == list(range(7, 12))


def test_a_source_that_learns_is_taken_up_where_it_was(tmp_path):
    whole, resumed = new(), new()
    train(whole, tmp_path / "a", source=Counting())
    with pytest.raises(KeyboardInterrupt):
        train(new(), tmp_path / "b", source=Counting(fail_at=6))
    train(resumed, tmp_path / "b", source=Counting())
    assert bits(resumed) == bits(whole)


def drive(resume):
    """What the killed process does: train, save after every step, and tell the digest of what came out."""
    torch.set_num_threads(1)
    module = new()
    method = Trained(learning_rate=0.05, accumulate=2, patience=50, validate_every=10)
    train(module, resume, method, steps=200, save_seconds=1e-6, validate=held_out_loss(module))
    resume.with_name("digest").write_text(bits(module))


def test_a_process_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    def saved_step():
        return max((int(place.name[5:]) for place in (tmp_path / "killed").glob("step-*")), default=0)

    chance = random.Random(0)
    for least in (1, 40, 80, 120, 160):
        process = start(drive, tmp_path / "killed")
        while saved_step() < least:
            assert process.exitcode is None
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert saved_step() < 200
    process = start(drive, tmp_path / "killed")
    process.join()
    assert process.exitcode == 0

    module = new()
    method = Trained(learning_rate=0.05, accumulate=2, patience=50, validate_every=10)
    train(module, tmp_path / "whole", method, steps=200, save_seconds=600, validate=held_out_loss(module))
    assert (tmp_path / "digest").read_text() == bits(module)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink], ids=["truncated", "empty", "missing"])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_state_is_started_over(tmp_path, harm, name):
    whole, resumed = new(), new()
    train(whole, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(new(), tmp_path / "b", source=Numbered(fail_at=6))
    harm(tmp_path / "b" / "step-000000006" / name)
    log = train(resumed, tmp_path / "b")
    assert len(log.steps) == 12
    assert bits(resumed) == bits(whole)


def test_a_damaged_state_falls_back_to_an_older_one_that_is_whole(tmp_path):
    whole, resumed = new(), new()
    train(whole, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(new(), tmp_path / "b", source=Numbered(fail_at=4))
    (tmp_path / "b" / "step-000000009").mkdir()
    (tmp_path / "b" / "draft").mkdir()
    train(resumed, tmp_path / "b")
    assert bits(resumed) == bits(whole)
    assert [place.name for place in (tmp_path / "b").iterdir()] == ["step-000000012"]


# --- what the settings mean -----------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    class Joined(Numbered):
        def batch(self, number):
            parts = [Numbered.batch(self, 4 * number + place) for place in range(4)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    many, one = new(Plain), new(Plain)
    method = Trained(learning_rate=0.01, clip=1e9)
    first = train(many, tmp_path / "a", method.model_copy(update={"accumulate": 4}), groups=groups(many, 0.01))
    second = train(one, tmp_path / "b", method, Joined(), groups=groups(one, 0.01))
    for name, tensor in many.state_dict().items():
        torch.testing.assert_close(tensor, one.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert first.steps[0]["loss"] == pytest.approx(second.steps[0]["loss"], rel=1e-6)
    assert first.steps[0]["gradient_norm"] == pytest.approx(second.steps[0]["gradient_norm"], rel=1e-5)


def test_a_step_is_that_of_adamw_on_the_clipped_gradient(tmp_path):
    ours, reference = new(Plain), new(Plain)
    method = Trained(learning_rate=0.05, warmup=0, schedule="linear", clip=0.1)
    train(ours, tmp_path, method, steps=4)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.05, weight_decay=0.01)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 4)
        optimizer.zero_grad()
        task_loss(reference, Numbered().batch(step))["task"].backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name])


def test_a_learning_rate_of_zero_changes_no_bit_of_the_parameters(tmp_path):
    module = new()
    before = copy.deepcopy(dict(module.named_parameters()))
    train(module, tmp_path, Trained(learning_rate=0), groups=groups(module, 0.0))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_what_is_in_no_group_keeps_every_bit_statistics_included(tmp_path):
    module = new()
    before = copy.deepcopy(module.state_dict())
    train(module, tmp_path, groups=[{"params": list(module.head.parameters()), "lr": 0.1, "weight_decay": 0.0}])
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.into.weight.grad is None


def test_nothing_to_train_is_refused(tmp_path):
    module = new()
    with pytest.raises(RequestError, match="nothing is left to train"):
        fit(module, Numbered(), task_loss, [], Trained(), steps=1, seed=0, device="cpu", resume=tmp_path)


def test_the_best_weights_are_returned_when_patience_ends(tmp_path):
    module = new()
    kept = {}
    measured = held_out_loss(module)

    def validate():
        loss = measured()
        kept[loss] = copy.deepcopy(module.state_dict())
        return loss

    method = Trained(learning_rate=1.0, schedule="constant", patience=2, validate_every=2)
    log = train(module, tmp_path, method, steps=100, validate=validate, groups=groups(module, 1.0))
    losses = [record["validation"] for record in log.validations]
    assert len(log.steps) < 100
    assert losses.index(min(losses)) == len(losses) - 3
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, kept[min(losses)][name]), name


def test_without_patience_validation_only_watches(tmp_path):
    watched, alone = new(), new()
    method = Trained(learning_rate=0.05, validate_every=5)
    log = train(watched, tmp_path / "a", method, validate=held_out_loss(watched))
    train(alone, tmp_path / "b", method)
    assert [record["step"] for record in log.validations] == [5, 10, 12]
    assert bits(watched) == bits(alone)


def test_bfloat16_computes_coarsely_and_keeps_weights_in_float32(tmp_path):
    fine, coarse = new(Plain), new(Plain)
    forward = coarse.forward
    train(fine, tmp_path / "a")
    train(coarse, tmp_path / "b", Trained(learning_rate=0.05, precision="bfloat16"))
    assert {parameter.dtype for parameter in coarse.parameters()} == {torch.float32}
    assert bits(fine) != bits(coarse)
    for name, tensor in fine.state_dict().items():
        torch.testing.assert_close(coarse.state_dict()[name], tensor, rtol=0.2, atol=0.05)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert coarse.forward.__func__ is forward.__func__
    assert torch.equal(coarse(x), coarse.head(torch.tanh(coarse.body(x))))


def test_schedules_rise_and_fall_as_they_say():
    def rates(schedule, warmup=0.2):
        return [_rate(step, 10, Trained(schedule=schedule, warmup=warmup)) for step in range(10)]

    assert rates("constant") == [0.5] + [1.0] * 9
    assert rates("linear") == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [0.5, 1, *(0.5 * (1 + math.cos(math.pi * place / 8)) for place in range(8))]
    assert rates("cosine") == pytest.approx(cosine)
    assert rates("linear", warmup=1.0) == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates("constant", warmup=0) == [1.0] * 10


def test_the_loss_falls_and_every_term_is_logged(tmp_path):
    module = new(Plain)

    def loss(net, batch):
        return {**task_loss(net, batch), "size": 1e-3 * net.body.weight.square().sum()}

    log = train(module, tmp_path, steps=60, loss=loss)
    first, last = log.steps[:5], log.steps[-5:]
    assert sum(record["task"] for record in last) < 0.5 * sum(record["task"] for record in first)
    for record in log.steps:
        assert record["loss"] == pytest.approx(record["task"] + record["size"], rel=1e-5)
    assert log.steps[0].keys() == {"step", "task", "size", "loss", "learning_rate", "gradient_norm"}
    log.write(tmp_path / "log.jsonl")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 60


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    def loss(net, batch):
        found = task_loss(net, batch)["task"]
        return {"task": found * math.nan if batch["x"][0, 0] == Numbered().batch(4)["x"][0, 0] else found}

    with pytest.raises(LfmError, match=r"the loss became nan at step 5 of 12; lower the learning rate"):
        train(new(), tmp_path, loss=loss)


def test_the_global_generator_is_left_alone_and_the_seed_decides(tmp_path):
    before = torch.random.get_rng_state()
    one, same, other = new(), new(), new()
    train(one, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    train(same, tmp_path / "b")
    train(other, tmp_path / "c", seed=4)
    assert bits(one) == bits(same) != bits(other)


def test_nothing_is_saved_before_its_time(tmp_path):
    train(new(), tmp_path / "resume", save_seconds=600)
    assert not (tmp_path / "resume").exists()


def test_a_log_reads_back_as_json_lines(tmp_path):
    import json

    log = Log([{"step": 1, "loss": 0.1}], [{"step": 1, "validation": 0.2}])
    log.write(tmp_path / "log.jsonl")
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [*log.steps, *log.validations]


# --- the groups of `tune full` --------------------------------------------------------------------------------------


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return new(lambda: LlamaForCausalLM(config))


@pytest.mark.parametrize(("share", "frozen"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4), (0.1, 0)])
def test_freeze_fixes_the_embeddings_and_the_lower_share_of_the_blocks(tmp_path, share, frozen):
    module = tiny_llama()
    before = copy.deepcopy(module.state_dict())
    method = Full(freeze=share, learning_rate=0.1)

    def loss(net, batch):
        return {"task": net(input_ids=batch["ids"], labels=batch["ids"]).loss}

    class Ids:
        def batch(self, number):
            return {"ids": torch.arange(12).view(2, 6) + number}

    fit(
        module,
        Ids(),
        loss,
        method.groups(module, anatomy(module)),
        method,
        steps=2,
        seed=0,
        device="cpu",
        resume=tmp_path,
        quiet=True,
    )
    same = {name for name, tensor in module.state_dict().items() if torch.equal(tensor, before[name])}
    lower = tuple(f"model.layers.{index}." for index in range(frozen))
    assert same == {name for name in before if name.startswith(("model.embed_tokens", *lower))}


def test_layer_decay_slows_each_block_once_more_towards_the_input():
    module = tiny_llama()
    found = Full(learning_rate=1.0, layer_decay=0.5, weight_decay=0.3).groups(module, anatomy(module))
    rates = {id(group["params"][0]): group for group in found}
    by_name = {name: rates[id(parameter)] for name, parameter in module.named_parameters()}
    assert by_name["lm_head.weight"]["lr"] == 1.0
    assert by_name["model.norm.weight"]["lr"] == 1.0
    for index in range(4):
        assert by_name[f"model.layers.{index}.mlp.up_proj.weight"]["lr"] == 0.5 ** (4 - index)
    assert by_name["model.embed_tokens.weight"]["lr"] == 0.5**5
    assert by_name["model.layers.0.input_layernorm.weight"]["weight_decay"] == 0.0
    assert by_name["model.layers.0.mlp.up_proj.weight"]["weight_decay"] == 0.3
