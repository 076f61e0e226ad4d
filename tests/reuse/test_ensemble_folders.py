"""Folders of ensembles: copies that need nothing else, language models, and learning from text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from tests import nets

import lfm
from lfm.errors import RequestError
from lfm.models.encode import IGNORE
from lfm.recipe.step import Settings
from lfm.reuse.ensemble.average import Average

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


def test_language_models_are_not_calibrated(writers, text, tmp_path):
    with pytest.raises(RequestError, match="`calibrate` is for classifiers"):
        lfm.ensemble("average", writers, out=tmp_path / "out", data=text, calibrate="members", settings=QUIET)
    assert not (tmp_path / "out").exists()


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
