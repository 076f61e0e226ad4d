"""Ensembles that are trained from one model: the papers' formulas, controls that must agree to the last bit, digits."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
import time

import pytest
import torch
import transformers as tf
from tests.killing import start
from torch import nn
from torch.nn import functional

import lfm
from lfm.data import DataSpec, read
from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.encode import inputs_of
from lfm.models.local import forward
from lfm.recipe.step import Settings
from lfm.reuse.ensemble import _trained
from lfm.reuse.ensemble._contract import Layer
from lfm.reuse.ensemble._rank_one import RankOne, RankOneBackend, layers_of, owners_of, repeated
from lfm.reuse.ensemble.batch_ensemble import BatchEnsemble
from lfm.reuse.ensemble.fast_geometric import FastGeometric
from lfm.reuse.ensemble.snapshot import Snapshot
from lfm.serve.predict import look
from lfm.tune.weights.full import Full

QUIET = Settings(quiet=True)
DIGITS = {"path": "sklearn:digits"}
TRAIN, TEST = ({**DIGITS, "part": part, "held_out": 0.4} for part in ("train", "held_out"))
FEW = {**TRAIN, "limit": 100}
FAST = {"batch_size": 20, "learning_rate": 3e-3, "weight_decay": 0.05}


class Small(nn.Module):
    """A network for digits: two convolutions, the second in groups, and a linear layer; norms if asked for."""

    def __init__(self, norm: bool = False):
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.second = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=2, bias=False)
        self.unused = nn.Linear(3, 3)
        self.last = nn.Linear(24, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.first(x)))
        return self.last(functional.relu(self.second(x)).mean((2, 3)))


def small():
    return Small()


def normed():
    return Small(norm=True)


def new(name="small"):
    """Name a new network to the library."""
    return {"module": f"{__file__}:{name}", "image": {"size": 8, "channels": 1}}


def make(method, model, out, data=FEW, **options):
    return lfm.ensemble(method, [model], data=data, out=out, settings=QUIET, **options)


def told(folder):
    return json.loads((folder / "lfm.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def encoded(model, rows=40):
    return model.encoder.encode(read(DataSpec.model_validate(TEST)), 8).batch(range(rows))


def digest(folder):
    return lfm.open_checkpoint(folder).digest


# --- the learning rate ----------------------------------------------------------------------------------------------


def test_snapshots_follow_the_papers_formula():
    course = Snapshot(cycles=3).course(10)
    total, cycle = 12, 4  # whole cycles
    assert course.steps == total
    assert course.kept == (4, 8, 12)
    expected = [(math.cos(math.pi * ((t - 1) % cycle) / cycle) + 1) / 2 for t in range(1, total + 1)]
    assert [course.rate(step) for step in range(total)] == pytest.approx(expected)


def test_fast_geometric_follows_the_papers_formula_and_keeps_at_the_lowest_points():
    course = FastGeometric(cycles=3, lowest=0.1).course(18)
    half, cycle = 4, 8
    assert course.steps == 20 == half + 2 * cycle
    expected = []
    for i in range(1, course.steps + 1):
        t = ((i - 1) % cycle + 1) / cycle
        expected.append((1 - 2 * t) * 1 + 2 * t * 0.1 if t <= 0.5 else (2 - 2 * t) * 0.1 + (2 * t - 1) * 1)
    rates = [course.rate(step) for step in range(course.steps)]
    assert rates == pytest.approx(expected)
    assert course.kept == (4, 12, 20)
    assert [rates[step - 1] for step in course.kept] == pytest.approx([0.1] * 3)
    assert max(rates) == pytest.approx(1)


def test_batch_ensembles_rise_and_fall_once():
    course = BatchEnsemble(warmup=0.2).course(10)
    falling = [(1 + math.cos(math.pi * place / 8)) / 2 for place in range(8)]
    assert [course.rate(step) for step in range(10)] == pytest.approx([0.5, 1, *falling])
    assert course.kept == (10,)


@pytest.mark.parametrize(
    "method",
    [
        Snapshot(cycles=3, steps=7, **FAST),
        FastGeometric(cycles=2, steps=9, **FAST),
        BatchEnsemble(members=2, steps=6, **FAST),
    ],
)
def test_a_run_goes_as_it_says_from_epochs_too(method, tmp_path):
    make(method, new(), tmp_path / "out")
    course = method.course(method.steps)
    expected = [course.rate(step) * method.learning_rate for step in range(course.steps)]
    assert [record["learning_rate"] for record in log_of(tmp_path / "out")] == pytest.approx(expected)
    assert len(told(tmp_path / "out")["members"]) == len(course.kept)
    per_epoch = math.ceil(100 / 20)
    by_epochs = method.model_copy(update={"steps": None, "epochs": method.steps / per_epoch})
    make(by_epochs, new(), tmp_path / "epochs")
    pairs = zip(told(tmp_path / "out")["members"], told(tmp_path / "epochs")["members"], strict=True)
    assert all(one["digest"] == other["digest"] for one, other in pairs)


# --- controls that must agree to the last bit -----------------------------------------------------------------------


def test_one_cycle_is_ordinary_training_with_a_cosine(tmp_path):
    make(Snapshot(cycles=1, steps=12, **FAST), new("normed"), tmp_path / "one")
    lfm.tune(Full(steps=12, warmup=0, **FAST), new("normed"), FEW, out=tmp_path / "plain", settings=QUIET)
    assert digest(tmp_path / "one" / "members" / "1") == digest(tmp_path / "plain")
    one, plain = lfm.load(tmp_path / "one"), lfm.load({**new("normed"), "ref": str(tmp_path / "plain")})
    assert torch.equal(one.log_probs(encoded(one)), plain.log_probs(encoded(plain)))


@pytest.mark.parametrize("name", ["small", "normed"])
def test_members_that_are_all_the_same_are_one_ordinary_training(name, tmp_path):
    """Vectors of 1 that are not trained, a batch divided: not a bit is another than without them."""
    method = BatchEnsemble(members=3, steps=10, spread=0, factor_rate=0, **FAST)
    make(method, new(name), tmp_path / "out")
    lfm.tune(Full(steps=10, **FAST), new(name), FEW, out=tmp_path / "plain", settings=QUIET)
    assert digest(tmp_path / "out" / "members" / "1") == digest(tmp_path / "plain")


def test_a_batch_that_every_member_sees_is_the_mean_of_their_losses(tmp_path):
    method = BatchEnsemble(members=3, steps=10, spread=0, factor_rate=0, batches="repeated", **FAST)
    make(method, new(), tmp_path / "out")
    lfm.tune(Full(steps=10, **FAST), new(), FEW, out=tmp_path / "plain", settings=QUIET)
    one, other = (lfm.open_checkpoint(folder) for folder in (tmp_path / "out" / "members" / "1", tmp_path / "plain"))
    for name in other.specs:
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-3, atol=1e-4)


# --- members by the vectors on both sides ---------------------------------------------------------------------------


def random_digits(rows=6):
    chance = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=chance), "labels": torch.zeros(rows)}


def words(rows=4):
    chance = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (rows, 7), generator=chance)
    mask = torch.ones_like(ids)
    ids[0, 5:], mask[0, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows)}


def gpt2():
    config = tf.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return tf.GPT2ForSequenceClassification(config)


def vit():
    config = tf.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=10, initializer_range=0.3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


KINDS = {
    "small": (small, random_digits),
    "normed": (normed, random_digits),
    "gpt2": (gpt2, words),
    "vit": (vit, random_digits),
}


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[kind][0]().eval(), KINDS[kind][1]()


def drawn(module, batch, **options):
    method = BatchEnsemble(**{"members": 3, **options})
    vectors = method.draw(layers_of(module, batch), torch.Generator().manual_seed(1))
    chance = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(value.shape, generator=chance) if name.startswith("c.") else value
        for name, value in vectors.items()
    }


def explicit(module, vectors, member):
    """Return the module with W o (s r^T) and b o s + c written out."""
    module = copy.deepcopy(module)
    for key in vectors:
        if key.startswith("r."):
            part, name = module.get_submodule(key[2:]), key[2:]
            r, s = vectors[f"r.{name}"][member], vectors[f"s.{name}"][member]
            weight = part.weight.data
            if hasattr(part, "nf"):  # stored (in, out)
                weight *= r[:, None] * s
            elif weight.ndim == 2:
                weight *= s[:, None] * r
            else:
                groups = part.groups
                outer = [torch.outer(a, b) for a, b in zip(s.chunk(groups), r.chunk(groups), strict=True)]
                weight *= torch.cat(outer)[..., None, None]
            if part.bias is not None:
                part.bias.data = part.bias.data * s + vectors[f"c.{name}"][member]
    return module


@pytest.mark.parametrize("start", ["normal", "signs"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_is_that_of_the_explicit_weights_of_every_member(kind, start):
    module, batch = made(kind)
    vectors = drawn(module, batch, start=start)
    expected = [explicit(module, vectors, member) for member in range(3)]
    with torch.no_grad():
        expected = torch.stack([forward(one, inputs_of(batch)) for one in expected]).log_softmax(-1)
    backend = RankOneBackend(RankOne(module, vectors), 3)
    torch.testing.assert_close(backend.each(batch), expected, rtol=2e-5, atol=2e-5)
    assert float((expected[0] - expected[1]).abs().max()) > 0.05
    mean = expected.exp().mean(0)
    torch.testing.assert_close(backend.logits(batch).exp(), mean, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_1_leave_every_bit_as_it_was(kind):
    module, batch = made(kind)
    inputs = repeated(inputs_of(batch), 3)
    rows = len(batch["labels"])
    with torch.no_grad():
        expected = forward(module, inputs)
        vectors = BatchEnsemble(members=3, spread=0).draw(layers_of(module, batch), torch.Generator())
        owners = owners_of(3, rows, repeated=True, device=torch.device("cpu"))
        assert torch.equal(RankOne(module, vectors)(inputs, owners), expected)


def test_the_layers_are_those_that_are_called_in_their_order():
    module, batch = made("small")
    assert layers_of(module, batch) == [
        Layer("first", 1, 12, True),
        Layer("second", 12, 24, False),
        Layer("last", 24, 10, True),
    ]
    module, batch = made("gpt2")
    found = {layer.name: (layer.reads, layer.writes, layer.shifts) for layer in layers_of(module, batch)}
    assert found["transformer.h.1.mlp.c_fc"] == (16, 64, True)
    assert found["score"] == (16, 3, False)
    assert len(found) == 2 * 4 + 1
    assert not module._forward_hooks


def test_a_member_costs_vectors_and_no_matrix():
    module, batch = made("vit")
    layers = layers_of(module, batch)
    numbers = sum(value.numel() for value in drawn(module, batch).values())
    assert numbers == 3 * sum(layer.reads + layer.writes * (1 + layer.shifts) for layer in layers)


def test_vectors_are_drawn_as_asked_and_by_the_seed():
    layers = [Layer("x", 2000, 3000, True)]

    def draw(seed=0, **options):
        return BatchEnsemble(**options).draw(layers, torch.Generator().manual_seed(seed))

    signs = draw(start="signs")
    assert set(signs["r.x"].unique().tolist()) == {-1, 1} == set(signs["s.x"].unique().tolist())
    assert abs(float(signs["s.x"].mean())) < 0.05
    normal = draw(spread=0.3)
    assert normal["r.x"].shape == (4, 2000)
    assert float(normal["r.x"].mean()) == pytest.approx(1, abs=0.02)
    assert float(normal["s.x"].std()) == pytest.approx(0.3, abs=0.02)
    assert not normal["c.x"].any()
    assert torch.equal(draw(spread=0.3)["r.x"], normal["r.x"])
    assert not torch.equal(draw(seed=1, spread=0.3)["r.x"], normal["r.x"])


def test_whose_a_row_is():
    def owners(members, rows, repeated=False):
        return owners_of(members, rows, repeated=repeated, device=torch.device("cpu")).tolist()

    assert owners(3, 6) == [0, 0, 1, 1, 2, 2]
    assert owners(3, 4) == [0, 0, 1, 2]
    assert owners(4, 2) == [0, 2]  # the end of an epoch
    assert owners(2, 3, repeated=True) == [0, 0, 0, 1, 1, 1]


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A snapshot ensemble and a batch ensemble of a network with norms."""
    root = tmp_path_factory.mktemp("trained")
    make(Snapshot(cycles=3, steps=30, **FAST), new("normed"), root / "snapshot")
    make(BatchEnsemble(members=3, steps=30, spread=0.2, factor_rate=2, **FAST), new("normed"), root / "batch_ensemble")
    return root


def test_snapshots_are_checkpoints_and_their_probabilities_are_averaged(trained):
    folder = trained / "snapshot"
    model = lfm.load(folder)
    batch = encoded(model)
    members = [lfm.load({**new("normed"), "ref": str(folder / "members" / str(number))}) for number in (1, 2, 3)]
    alone = torch.stack([member.probs(encoded(member)) for member in members])
    assert float((alone[0] - alone[2]).abs().max()) > 0.01
    torch.testing.assert_close(model.probs(batch), alone.mean(0), rtol=1e-5, atol=1e-6)
    soup = [{**new("normed"), "ref": str(folder / "members" / str(number))} for number in (1, 2, 3)]
    merged = lfm.merge("linear", soup, out=trained / "soup", settings=QUIET)
    assert merged.specs.keys() == members[0].module.state_dict().keys()


@pytest.mark.parametrize("name", ["snapshot", "batch_ensemble"])
def test_it_is_loaded_asked_measured_served_and_made_a_member(name, trained, tmp_path):
    folder = trained / name
    model, again = lfm.load(folder), lfm.load(folder)
    probs = model.probs(encoded(model))
    torch.testing.assert_close(probs.sum(-1), torch.ones(40))
    assert torch.equal(probs, again.probs(encoded(again)))
    assert model.access is Access.PROBS
    with pytest.raises(AccessError):
        _ = model.module
    rows = read(DataSpec.model_validate({**TEST, "limit": 5}))
    served = look(model, rows, None)
    assert served["classes"] == [str(digit) for digit in range(10)]
    torch.testing.assert_close(torch.tensor(served["probabilities"]), probs[:5], rtol=1e-4, atol=1e-6)
    measured = lfm.evaluate([folder], {"accuracy": TEST}, settings=QUIET)
    assert len(measured[0].estimates) == 1
    calibrated = make("average", folder, tmp_path / "calibrated", data={**TEST, "limit": 60}, calibrate="ensemble")
    assert calibrated.probs(encoded(calibrated)).shape == (40, 10)


@pytest.mark.parametrize("name", ["snapshot", "batch_ensemble"])
def test_the_folder_may_move_and_may_not_be_changed(name, trained, tmp_path):
    shutil.copytree(trained / name, tmp_path / "moved")
    model, there = lfm.load(trained / name), lfm.load(tmp_path / "moved")
    assert torch.equal(model.probs(encoded(model)), there.probs(encoded(there)))
    weights = next((tmp_path / "moved" / "members").rglob("model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RequestError, match="is not what it was"):
        lfm.load(tmp_path / "moved")


def test_what_stands_in_the_folder(trained):
    folder = trained / "batch_ensemble"
    assert [member["ref"] for member in told(folder)["members"]] == ["members/1"]
    assert {member["ref"] for member in told(trained / "snapshot")["members"]} == {f"members/{n}" for n in (1, 2, 3)}
    metrics = json.loads((folder / "lineage.json").read_text())["metrics"]
    assert metrics["members"] == 3
    assert metrics["steps"] == 30
    assert metrics["final_loss"] > 0
    assert not (trained / "snapshot" / "state.safetensors").exists()
    assert (folder / "state.safetensors").stat().st_size < 20_000


def test_the_seed_decides_and_what_is_there_is_not_made_again(tmp_path):
    method = BatchEnsemble(members=2, steps=3, **FAST)
    found = [
        lfm.open_checkpoint(made.label).digest
        for made in (make(method, new(), tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    ]
    assert found[0] == found[1] != found[2]
    written = (tmp_path / "a" / "lfm.json").stat().st_mtime_ns
    make(method, new(), tmp_path / "a")
    assert (tmp_path / "a" / "lfm.json").stat().st_mtime_ns == written
    with pytest.raises(RequestError, match="made with other parameters"):
        make(method, new(), tmp_path / "a", seed=1)


def rehearse(name, out, save_seconds):
    torch.set_num_threads(1)
    method = {
        "snapshot": Snapshot(cycles=3, steps=24, accumulate=2, **FAST),
        "batch_ensemble": BatchEnsemble(members=3, steps=24, factor_rate=2, **FAST),
    }[name]
    settings = Settings(quiet=True, save_seconds=float(save_seconds))
    lfm.ensemble(method, [new("normed")], data=FEW, out=out, settings=settings)


def content(folder):
    """Return every file's bytes by name, but of those that tell the time."""
    timed = ("lineage.json", "README.md", "report.html", "results.json")
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in timed]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


MOMENTS = {
    "snapshot": ("resume/members/1", "resume/members/2"),
    "batch_ensemble": ("resume/training/step-00000000[2-9]", "resume/training/step-00000001*"),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(name, tmp_path):
    out = tmp_path / "killed"
    for moment in MOMENTS[name]:
        process = start(rehearse, name, str(out), "0")
        while process.exitcode is None and not any((tmp_path / "killed.partial").glob(moment)):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        with pytest.raises(RequestError, match="unfinished"):
            lfm.load(str(tmp_path / "killed.partial"))
    rehearse(name, out, 0)
    rehearse(name, tmp_path / "whole", "inf")
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


@pytest.mark.parametrize("place", ["save_model", "_entry"])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_run_that_ends_while_it_writes_makes_the_same_bytes(name, place, tmp_path, monkeypatch):
    """While a member is written, and while the last one is copied into the output."""
    real, calls = getattr(_trained, place), 0

    def once(*arguments):
        nonlocal calls
        calls += 1
        made = real(*arguments)
        if calls == (3 if name == "snapshot" else 1):
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(_trained, place, once)
    with pytest.raises(KeyboardInterrupt):
        rehearse(name, tmp_path / "broken", 0)
    rehearse(name, tmp_path / "broken", 0)
    rehearse(name, tmp_path / "whole", "inf")
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


# --- text -----------------------------------------------------------------------------------------------------------


def test_snapshots_of_a_language_model_write_together(tmp_path):
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 256, "eos_token_id": 256,
    }  # fmt: skip
    (tmp_path / "text.txt").write_text("\n\n".join(f"A dog ran to tree {number} and sat." for number in range(30)))
    model = {"config": config, "tokenizer": "bytes"}
    method = Snapshot(cycles=2, steps=8, batch_size=4, learning_rate=1e-2)
    made = make(method, model, tmp_path / "out", data=str(tmp_path / "text.txt"), length=32)
    assert made.complete(["A dog"], 4) == lfm.load(tmp_path / "out").complete(["A dog"], 4)
    members = [lfm.load(tmp_path / "out" / "members" / str(number)) for number in (1, 2)]
    batch = members[0].encoder.encode(read(DataSpec(path=str(tmp_path / "text.txt"))), 32).batch([0, 1])
    mean = torch.stack([member.probs(batch) for member in members]).mean(0)
    torch.testing.assert_close(made.probs(batch), mean, rtol=1e-5, atol=1e-7)
    with pytest.raises(RequestError, match="BatchEnsemble trains classifiers, and this is a causal-lm model"):
        make(BatchEnsemble(steps=2), model, tmp_path / "none", data=str(tmp_path / "text.txt"), length=32)


def test_text_classifiers_are_trained_too(tmp_path):
    rows = [{"text": f"{word} {number}", "label": word} for number in range(12) for word in ("no", "yes")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"], "vocab_size": 257, "n_embd": 16,
        "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256,
    }  # fmt: skip
    model = {"config": config, "tokenizer": "bytes", "task": "text-classification"}
    method = BatchEnsemble(members=2, steps=60, batch_size=8, learning_rate=2e-2, spread=0.1)
    made = make(method, model, tmp_path / "out", data=str(tmp_path / "rows.jsonl"), length=16)
    measured = lfm.evaluate([made.label], {"accuracy": str(tmp_path / "rows.jsonl")}, settings=QUIET)
    [accuracy] = measured[0].estimates.values()
    assert accuracy.value == 100


# --- what does not fit ----------------------------------------------------------------------------------------------


def refused(method, models, tmp_path, **options):
    with pytest.raises(RequestError) as caught:
        lfm.ensemble(method, models, out=tmp_path / "out", settings=QUIET, **options)
    assert not list(tmp_path.glob("out*"))
    return "\n".join(caught.value.problems)


def test_requests_that_make_no_sense_are_refused_with_all_their_problems(trained, tmp_path):
    text = refused(Snapshot(), [new(), new()], tmp_path, weights=[1, 2], calibrate="members", copy_members=True)
    for part in (
        "Snapshot takes 1 model, got 2",
        "Snapshot takes no weights",
        "give labelled examples as `data`",
        "leave out `calibrate`",
        "leave out copy_members",
    ):
        assert part in text
    text = refused(Snapshot(cycles=9, steps=17), [new()], tmp_path, data=FEW)
    assert "takes 18 steps at least, as it is set up, and this is a run of 17" in text
    text = refused(Snapshot(cycles=9, epochs=1, batch_size=50), [new()], tmp_path, data=FEW)
    assert "this is a run of 2; give more `epochs`" in text
    text = refused(FastGeometric(cycles=4, steps=6), [new()], tmp_path, data=FEW)
    assert "takes 7 steps at least" in text
    text = refused(BatchEnsemble(members=5, batch_size=4), [new()], tmp_path, data=FEW)
    assert "a batch of 4 cannot be divided over 5 members" in text
    text = refused(BatchEnsemble(), [new()], tmp_path, data="no-such-file.csv")
    assert "no-such-file.csv" in text
    text = refused(Snapshot(), [str(trained / "snapshot")], tmp_path, data=FEW)
    assert "offers probs, and ensemble snapshot needs weights" in text


def test_text_is_found_to_be_too_short_once_it_is_cut(tmp_path):
    (tmp_path / "text.txt").write_text("Too short for that.")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 16}
    config |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"config": config, "tokenizer": "bytes"}
    with pytest.raises(RequestError, match="takes 10 steps at least, as it is set up, and this is a run of 3"):
        make(Snapshot(), model, tmp_path / "out", data=str(tmp_path / "text.txt"))


class Flat(nn.Module):
    """A layer that is called with pixels for rows, and one whose rows are images."""

    def __init__(self):
        super().__init__()
        self.each = nn.Linear(1, 2)
        self.last = nn.Linear(128, 10)

    def forward(self, x):
        return self.last(self.each(x.reshape(-1, 1)).reshape(len(x), -1))


def flat():
    return Flat()


def test_layers_whose_rows_are_no_examples_are_named(tmp_path):
    with pytest.raises(RequestError, match="layer each: is called with 192 rows for 3 examples"):
        make(BatchEnsemble(steps=2), new("flat"), tmp_path / "out")
    with pytest.raises(RequestError, match="no linear layer and no convolution"):
        layers_of(nn.Flatten(), random_digits())


# --- real data ------------------------------------------------------------------------------------------------------


def scores(models):
    """Return accuracy in % and negative log-likelihood on unseen digits, by model."""
    accuracy, nll = lfm.evaluate(models, {"accuracy": TEST}, settings=QUIET)[:2]
    return [
        (one.value, other.value) for one, other in zip(accuracy.estimates.values(), nll.estimates.values(), strict=True)
    ]


def reader():
    """Return a network that knows where in the picture it looks."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def test_digits_are_told_likelier_together_than_by_the_members_and_about_as_well_as_by_one_model(tmp_path):
    """The control is one model of as many steps; benchmarks/ensemble_trained.md has the numbers of several seeds."""
    how = {"batch_size": 32, "learning_rate": 1e-2, "weight_decay": 0.05}
    data = {**TRAIN, "limit": 400}
    lfm.tune(Full(steps=160, **how), new("reader"), data, out=tmp_path / "one", settings=QUIET)
    one = {**new("reader"), "ref": str(tmp_path / "one")}
    make(Snapshot(cycles=4, steps=160, **how), new("reader"), tmp_path / "snapshot", data)
    make(FastGeometric(cycles=4, steps=84, **how), one, tmp_path / "walk", data)
    make(BatchEnsemble(members=4, steps=160, start="signs", **how), new("reader"), tmp_path / "joint", data)
    (accuracy, nll), *others = scores([one, *(str(tmp_path / name) for name in ("snapshot", "walk", "joint"))])
    assert accuracy > 90
    for its_accuracy, its_nll in others:
        assert its_accuracy > accuracy - 4
        assert its_nll < nll + 0.1
    for name, (_, together) in zip(("snapshot", "walk"), others, strict=False):
        members = [{**new("reader"), "ref": str(tmp_path / name / "members" / str(number))} for number in range(1, 5)]
        alone = [its_nll for _, its_nll in scores(members)]
        assert together < sum(alone) / 4  # the logarithm is concave; and they do differ
