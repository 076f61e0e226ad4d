"""Folders of ensembles: copies that need nothing else, language models, and learning from text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests import nets

import lfm
from lfm.errors import RequestError
from lfm.models.encode import IGNORE
from lfm.models.text import Sampling
from lfm.recipe.step import Settings
from lfm.reuse.ensemble._answers import confidence
from lfm.reuse.ensemble.average import Average
from lfm.reuse.ensemble.text_cascade import TextCascade

QUIET = Settings(quiet=True)
TEXT = "Once there was a dog.\n\nIt ran.\n\nThe red ball lay in the tall tree and nobody could reach it, so they left."


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """Two language models of bytes."""
    work, found = tmp_path_factory.mktemp("writers"), []
    for seed in range(2):
        config = tf.LlamaConfig(
            vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5, bos_token_id=256,
            eos_token_id=256,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tf.LlamaForCausalLM(config).save_pretrained(work / f"m{seed}")
        found.append({"ref": str(work / f"m{seed}"), "tokenizer": "bytes"})
    return found


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": part}) for part in TEXT.split("\n\n")))
    return str(path)


def losses(model, text):
    """Return the negative log-likelihood of every predicted token."""
    rows = lfm.data.read(lfm.DataSpec(path=text))
    batch = (examples := model.encoder.encode(rows, 128)).batch(range(len(examples)))
    said, wanted = model.log_probs(batch)[:, :-1], batch["labels"][:, 1:]
    picked = -said.gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
    return picked[wanted != IGNORE].double()


def test_weights_of_language_models_are_learned_from_text_of_any_lengths(writers, text, tmp_path):
    made = lfm.ensemble(Average(choose="likelihood"), writers, out=tmp_path / "both", data=text, settings=QUIET)
    first, second = (losses(lfm.load(ref), text) for ref in writers)
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    grid = -(shares * (-first).exp() + (1 - shares) * (-second).exp()).log().mean(1)
    assert float(losses(made, text).mean()) == pytest.approx(float(grid.min()), abs=1e-4)
    metrics = json.loads((tmp_path / "both" / "lineage.json").read_text())["metrics"]
    assert {"held-out accuracy", f"weight of {writers[0]['ref']}"} <= set(metrics)
    by_accuracy = lfm.ensemble(Average(choose="accuracy"), writers, out=tmp_path / "third", data=text, settings=QUIET)
    assert losses(by_accuracy, text).isfinite().all()


def test_perplexity_is_that_of_the_average_and_one_hot_is_the_member(writers, text, tmp_path):
    lfm.ensemble("average", writers, out=tmp_path / "both", settings=QUIET)
    lfm.ensemble("average", writers, weights=[0, 1], out=tmp_path / "second", settings=QUIET)
    first, second = (losses(lfm.load(ref), text) for ref in writers)
    both = losses(lfm.load(tmp_path / "both"), text)
    torch.testing.assert_close(both, -(((-first).exp() + (-second).exp()) / 2).log(), atol=1e-5, rtol=1e-5)
    assert torch.equal(losses(lfm.load(tmp_path / "second"), text), second)
    prompts = ["Once upon", "The"]
    assert lfm.load(tmp_path / "second").complete(prompts, 8) == lfm.load(writers[1]).complete(prompts, 8)


@pytest.mark.parametrize("calibrate", ["members", "ensemble"])
def test_language_models_are_calibrated_by_text_and_write_as_they_are_measured(writers, text, tmp_path, calibrate):
    out, prompts = tmp_path / "out", ["Once upon", "The"]
    model = lfm.ensemble("average", writers, out=out, data=text, calibrate=calibrate, settings=QUIET)
    plain = lfm.ensemble("average", writers, out=tmp_path / "plain", settings=QUIET)
    metrics = json.loads((out / "lineage.json").read_text())["metrics"]
    assert losses(model, text).mean() < losses(plain, text).mean()
    if calibrate == "ensemble":
        warmer = [log_probs(plain, text, t).mean() for t in metrics["temperature"] * torch.tensor([0.98, 1.0, 1.02])]
        assert float(losses(model, text).mean()) == pytest.approx(float(warmer[1]), abs=1e-5)
        assert warmer[1] < min(warmer[0], warmer[2])
    else:
        assert all(metrics[f"temperature of {ref['ref']}"] > 1 for ref in writers)  # random models are too sure
    how = Sampling(max_new_tokens=6, top_logprobs=0)
    for made, prompt in zip(model.write(prompts, how), prompts, strict=True):
        ids = model.encoder.tokenizer(prompt, return_tensors="pt")["input_ids"]
        [row] = model.log_probs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert made.tokens[0].logprob == pytest.approx(float(row[-1].max()), abs=1e-4)


def log_probs(model, text, temperature):
    """Return the losses of a model at a temperature."""
    rows = lfm.data.read(lfm.DataSpec(path=text))
    batch = (examples := model.encoder.encode(rows, 128)).batch(range(len(examples)))
    said = (model.log_probs(batch)[:, :-1] / temperature).log_softmax(-1)
    wanted = batch["labels"][:, 1:]
    return -said.gather(-1, wanted.clamp_min(0)[..., None])[..., 0][wanted != IGNORE].double()


def test_without_data_an_ensemble_is_calibrated_by_what_its_members_write(writers, tmp_path):
    writers = [{**ref, "ref": sharpened(ref["ref"], tmp_path / f"sharp{index}")} for index, ref in enumerate(writers)]
    how = {"calibrate": "ensemble", "length": 64, "settings": QUIET}
    made = [
        lfm.ensemble(Average(of="logits"), writers, out=tmp_path / name, seed=seed, **how)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    metrics = [json.loads((tmp_path / n / "lineage.json").read_text())["metrics"] for n in ("one", "again", "other")]
    assert metrics[0] == metrics[1]
    assert metrics[0]["temperature"] != metrics[2]["temperature"]
    # Each member is sure of something else; the mean of their logits is surer than the texts of either allow.
    assert metrics[0]["temperature"] == pytest.approx(metrics[2]["temperature"], abs=0.05)
    assert metrics[0]["temperature"] > 1.1
    assert metrics[0]["NLL of own text, calibrated"] < metrics[0]["NLL of own text"]
    assert 4000 < metrics[0]["tokens of own text"] < 9000
    assert made[0].complete(["The"], 8) == made[1].complete(["The"], 8)
    alone = lfm.ensemble("average", writers[:1], out=tmp_path / "alone", calibrate="ensemble", settings=QUIET)
    assert alone.task == "causal-lm"
    told = json.loads((tmp_path / "alone" / "lineage.json").read_text())["metrics"]
    assert told["temperature"] == pytest.approx(1, abs=0.04), "by its own text a model is as sure as it should be"


def sharpened(folder, to):
    """Copy a model to one that is much surer of what it says."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({**weights, "lm_head.weight": 3 * weights["lm_head.weight"]}, to / "model.safetensors", {"format": "pt"})
    return str(to)


def test_what_cannot_be_calibrated_without_data_is_said_in_the_plan(writers, tmp_path):
    for method, calibrate, message in (
        ("average", "members", "by its own text alone, every model has a temperature of 1"),
        ("stack", "ensemble", "Stack learns from examples here; give `data`"),
        ("rank_fusion", "ensemble", "classifiers, unlike language models, write nothing"),
        ("byte_average", "ensemble", "ByteAverage joins texts, which have no temperature"),
    ):
        with pytest.raises(RequestError, match=message):
            lfm.ensemble(method, writers, out=tmp_path / "out", calibrate=calibrate, settings=QUIET)
    kind = {"module": "tests.nets:resnet20", "image": {"size": 32}}
    save_file(nets.resnet20().state_dict(), tmp_path / "a.safetensors")
    pictures = [{"ref": str(tmp_path / "a.safetensors"), **kind}] * 2
    with pytest.raises(RequestError, match="classifiers, unlike language models, write nothing"):
        lfm.ensemble("average", pictures, out=tmp_path / "out", calibrate="ensemble", settings=QUIET)
    assert not (tmp_path / "out").exists()


def test_the_curve_of_a_text_cascade_is_kept(writers, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Once {word}"}) for word in ("a", "the", "some", "many")))
    method = TextCascade(threshold=0.3, tokens=4)
    lfm.ensemble(method, writers, out=tmp_path / "out", data=str(prompts), settings=QUIET)
    told = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert told["examples"] == 4
    assert told["columns"][f"asked of {writers[1]['ref']}, %"][-1] == 100
    [first, *_, last] = told["columns"]["mean confidence of what stays, %"]
    made = lfm.load(writers[0]).write(
        ["Once a", "Once the", "Once some", "Once many"], Sampling(max_new_tokens=4, top_logprobs=0)
    )
    assert first == pytest.approx(100 * sum(map(confidence, made)) / 4)
    assert last is None
    metrics = json.loads((tmp_path / "out" / "lineage.json").read_text())["metrics"]
    assert metrics[f"share asked of {writers[1]['ref']} at threshold 1.01"] == 1
    with pytest.raises(RequestError, match="takes the column prompt, or text; these rows have image"):
        lfm.ensemble(method, writers, out=tmp_path / "no", data="sklearn:digits", settings=QUIET)
    with pytest.raises(RequestError, match="Fuse learns nothing from examples; leave out `data`"):
        lfm.ensemble("fuse", writers, out=tmp_path / "no", data=str(prompts), settings=QUIET)


def test_copies_hold_one_file_where_that_is_the_member(tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("a", "b"):
        save_file(nets.resnet20().state_dict(), tmp_path / "weights" / f"{name}.safetensors")
    kind = {"module": "tests.nets:resnet20", "image": {"size": 32}}
    members = [{"ref": str(tmp_path / "weights" / f"{name}.safetensors"), **kind} for name in ("a", "b")]
    lfm.ensemble("average", members, out=tmp_path / "both", copy_members=True, settings=QUIET)
    kept = sorted(str(path.relative_to(tmp_path / "both")) for path in (tmp_path / "both" / "members").rglob("*.*"))
    assert kept == ["members/0-weights/a.safetensors", "members/1-weights/b.safetensors"]
    shutil.rmtree(tmp_path / "weights")
    (tmp_path / "both").rename(tmp_path / "moved")
    assert lfm.load(tmp_path / "moved").task == "image-classification"


def test_what_cannot_be_copied_whole_is_said_before_anything_is_written(writers, tmp_path):
    lfm.ensemble("average", writers, out=tmp_path / "both", settings=QUIET)
    code = {"ref": writers[0]["ref"], "module": f"{tmp_path}/net.py:net"}
    with pytest.raises(RequestError) as caught:
        lfm.ensemble("average", [tmp_path / "both", code], out=tmp_path / "out", copy_members=True, settings=QUIET)
    told = "\n".join(caught.value.problems)
    assert "its own members lie elsewhere" in told
    assert "net.py:net, is not copied" in told
    assert not (tmp_path / "out").exists()
