"""`tune full` on real checkpoints and real data: what is practised gets better, and what is not is forgotten."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.killing import start

import lfm
from lfm.errors import RequestError
from lfm.recipe.step import Settings
from lfm.tune.weights.full import Full

QUIET = Settings(quiet=True)
IMAGE = {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
VIT = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tune(method, model, data, out, **options):
    return lfm.tune(method, model, data, out=out, settings=QUIET, **options)


def values(models, **measures):
    """Return one number by metric, data set and model."""
    found = lfm.evaluate(models, measures, settings=QUIET)
    return {
        (item.metric, item.data, name): estimate.value
        for item in found
        if item.unit != "per character"
        for name, estimate in item.estimates.items()
    }


def losses(folder):
    records = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def metrics(folder):
    return json.loads((folder / "lineage.json").read_text())["metrics"]


@pytest.fixture
def stories(assets):
    return str(assets / "checkpoints" / "stories260k")


def test_a_story_teller_learns_shakespeare_and_forgets_stories(assets, stories, tmp_path):
    plays = {"path": str(assets / "data" / "tiny-shakespeare.txt")}
    method = Full(steps=40, batch_size=8, learning_rate=4e-3)
    tune(method, stories, {**plays, "part": "train"}, tmp_path / "bard", length=128)
    held_out = {**plays, "part": "held_out", "limit": 40}
    tales = {"path": str(assets / "data" / "tinystories-600.json"), "limit": 15}
    found = values([stories, str(tmp_path / "bard")], perplexity={"plays": held_out, "tales": tales})
    assert found["perplexity", "plays", "stories260k"] > 3 * found["perplexity", "plays", "bard"]
    assert found["perplexity", "tales", "bard"] > 2 * found["perplexity", "tales", "stories260k"]
    assert found["perplexity", "tales", "stories260k"] < 6


def test_a_story_teller_learns_to_tell_praise_from_blame(assets, stories, tmp_path):
    data = {"format": "label-text"}
    method = Full(steps=120, batch_size=32, learning_rate=2e-3)
    reviews = {**data, "path": str(assets / "data" / "sst2-train.txt")}
    tune(method, stories, reviews, tmp_path / "critic", task="text-classification", length=48)
    dev = {**data, "path": str(assets / "data" / "sst2-dev.txt")}
    found = lfm.evaluate([str(tmp_path / "critic")], {"accuracy": dev}, settings=QUIET)
    [accuracy] = next(item for item in found if item.metric == "accuracy").estimates.values()
    assert accuracy.n == 872
    assert accuracy.low > 100 * 444 / 872  # the larger class


def test_a_vision_model_from_a_config_learns_digits(tmp_path):
    data = {"path": "sklearn:digits"}
    model = {"config": VIT, "task": "image-classification"}
    method = Full(steps=200, batch_size=64, learning_rate=3e-3)
    tune(method, model, {**data, "part": "train"}, tmp_path / "digits")
    found = values([str(tmp_path / "digits")], accuracy={"unseen": {**data, "part": "held_out"}})
    assert found["accuracy", "unseen", "digits"] > 85
    assert metrics(tmp_path / "digits")["final_loss"] < 0.5


def resnet20(assets):
    ref = str(assets / "checkpoints" / "cifar10-resnet20")
    return {"ref": ref, "module": "tests/nets.py:resnet20", "image": IMAGE}


def test_a_plain_network_gets_used_to_jpeg(assets, tmp_path):
    data = {"path": str(assets / "data" / "cifar10-jpeg.npz")}
    base = resnet20(assets)
    method = Full(steps=16, batch_size=64, learning_rate=1e-3, warmup=0.2)
    tune(method, base, {**data, "split": "train", "limit": 1024}, tmp_path / "tuned")
    found = losses(tmp_path / "tuned")
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    tuned = {**base, "ref": str(tmp_path / "tuned")}
    test = {**data, "split": "test", "limit": 400}
    scores = values([base, tuned], accuracy={"jpeg": test})
    assert scores["accuracy", "jpeg", "tuned"] > scores["accuracy", "jpeg", "cifar10-resnet20"]


def test_a_plain_network_gets_a_new_head_and_keeps_its_names(assets, tmp_path):
    data = {"path": str(assets / "data" / "mnist.npz"), "split": "train", "limit": 600, "classes": [3, 5, 8]}
    base = resnet20(assets)
    method = Full(steps=25, batch_size=32, learning_rate=5e-3, freeze=0.5)
    tune(method, base, data, tmp_path / "tuned", new_head=True)
    found = losses(tmp_path / "tuned")
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    before, after = (lfm.open_checkpoint(ref) for ref in (base["ref"], tmp_path / "tuned"))
    assert after.specs["linear.weight"].shape == (3, 64)
    assert torch.equal(before.tensor("conv1.weight"), after.tensor("conv1.weight"))
    assert torch.equal(before.tensor("bn1.running_mean"), after.tensor("bn1.running_mean"))
    assert not torch.equal(before.tensor("layer3.2.conv2.weight"), after.tensor("layer3.2.conv2.weight"))
    model = lfm.load({**base, "ref": str(tmp_path / "tuned")})
    assert model.encoder.classes == {"3": 0, "5": 1, "8": 2}


def test_the_half_done_output_of_a_run_is_no_model(stories, assets, tmp_path):
    data = {"path": str(assets / "data" / "tiny-shakespeare.txt"), "limit": 50}
    always = Settings(quiet=True, save_seconds=0)
    with pytest.raises(lfm.LfmError, match=r"(loss|gradient) became"):
        lfm.tune(Full(steps=60, learning_rate=1e30), stories, data, out=tmp_path / "out", length=16, settings=always)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="unfinished"):
        lfm.load(str(tmp_path / "out.partial"))


def test_masked_language_models_are_not_trained_to_copy_their_input(tmp_path):
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 260, "hidden_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "text.txt").write_text("one\n\ntwo\n\nthree")
    with pytest.raises(RequestError, match="masked language models cannot be tuned as such"):
        tune(Full(steps=1), {"config": config, "tokenizer": "bytes"}, tmp_path / "text.txt", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # told by the plan, before anything is loaded or written


def test_fine_tunes_of_published_weights_merge_with_them(assets, tmp_path):
    data = {"path": str(assets / "data" / "mnist.npz"), "split": "train", "limit": 64}
    base = resnet20(assets)
    for seed, name in enumerate(("a", "b")):
        tune(Full(steps=2, batch_size=32), base, data, tmp_path / name, seed=seed)
    sources = [{**base, "ref": str(tmp_path / name)} for name in ("a", "b")]
    merged = lfm.merge("task_arithmetic", sources, base=base, out=tmp_path / "out", settings=QUIET)
    assert merged.specs.keys() == lfm.open_checkpoint(base["ref"]).specs.keys()


def test_the_validation_loss_does_not_depend_on_the_size_of_a_batch(assets, stories, tmp_path):
    plays = {"path": str(assets / "data" / "tiny-shakespeare.txt")}
    found = []
    for size in (1, 7):
        out = tmp_path / str(size)
        options = {"validation": {**plays, "part": "held_out", "limit": 12}, "length": 32}
        tune(Full(steps=1, batch_size=size, learning_rate=0), stories, {**plays, "limit": 20}, out, **options)
        found.append(metrics(out)["best_validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def rehearse(model, data, out, save_seconds):
    """Train with all that a saved state must hold: moments, best weights, validations, accumulated batches."""
    torch.set_num_threads(1)
    rows = {"path": data, "limit": 60}
    lfm.tune(
        Full(steps=40, batch_size=4, learning_rate=1e-3, accumulate=2, patience=9, validate_every=4),
        model,
        {**rows, "part": "train"},
        validation={**rows, "part": "held_out", "limit": 4},
        out=out,
        length=16,
        settings=Settings(quiet=True, save_seconds=float(save_seconds)),
    )


def test_a_run_that_is_killed_again_and_again_makes_the_same_model(stories, assets, tmp_path):
    data, out = str(assets / "data" / "tiny-shakespeare.txt"), tmp_path / "killed"
    for moment in ("resume/step-000000003", "resume/step-00000002*", "resume/saved", "*.draft"):
        process = start(rehearse, stories, data, str(out), "0")
        while process.exitcode is None and not any((tmp_path / "killed.partial").glob(moment)):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        assert not out.exists()
        with pytest.raises(RequestError, match="unfinished"):
            lfm.load(str(tmp_path / "killed.partial"))
    process = start(rehearse, stories, data, str(out), "0")
    process.join()
    assert process.exitcode == 0
    rehearse(stories, data, tmp_path / "whole", "inf")
    killed, whole = (lfm.open_checkpoint(folder) for folder in (out, tmp_path / "whole"))
    assert killed.digest == whole.digest
    logs = {(folder / "training.jsonl").read_bytes() for folder in (out, tmp_path / "whole")}
    assert len(logs) == 1
    assert not (tmp_path / "killed.partial").exists()


def test_the_same_run_has_the_same_bits_and_another_seed_has_not(stories, assets, tmp_path):
    data = {"path": str(assets / "data" / "tiny-shakespeare.txt"), "limit": 50}
    method = Full(steps=3, batch_size=4, learning_rate=1e-3)
    made = [
        tune(method, stories, data, tmp_path / name, length=32, seed=seed).digest
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    ]
    assert made[0] == made[1] != made[2]


def test_patience_without_validation_data_is_refused_before_anything_is_loaded(tmp_path):
    model = {"config": VIT, "task": "image-classification"}
    with pytest.raises(RequestError, match="patience needs validation data"):
        tune(Full(patience=2), model, {"path": "sklearn:digits"}, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_the_functions_stay_functions_when_the_packages_of_their_names_are_imported():
    code = "import lfm, lfm.tune._engine, lfm.evaluate.measure; assert callable(lfm.tune) and callable(lfm.evaluate)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_wrong_with_data_and_model_is_said_in_one_go(tmp_path):
    with pytest.raises(RequestError) as caught:
        tune(Full(patience=2), str(tmp_path / "no-model"), str(tmp_path / "no-data.txt"), tmp_path / "out")
    assert len(caught.value.problems) == 3
    for word in ("no-data.txt", "patience", "no-model"):
        assert word in str(caught.value)
