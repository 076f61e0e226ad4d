"""`lfm serve` on folders of ensembles: what clients are told is what `lfm.load` says."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys

import numpy as np
import openai
import pytest
import torch
import transformers as tf
from tests.serve.test_serve import ROOT, ask, picture, writer

import lfm
from lfm.data import Rows
from lfm.models.text import Message, Sampling
from lfm.recipe.step import Settings
from lfm.reuse.ensemble.average import Average

QUIET = Settings(quiet=True)


def saved_writer(place, shift):
    """A language model over bytes, with a chat template."""
    model = writer()
    with torch.no_grad():
        model.module.lm_head.weight.add_(shift * torch.roll(model.module.lm_head.weight, 1))
    model.module.save_pretrained(place)
    model.encoder.tokenizer.save_pretrained(place)
    return str(place)


def saved_classifier(place, names, seed):
    """An image classifier that numbers its classes in this order."""
    config = tf.ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tf.ViTForImageClassification(config).save_pretrained(place)
    shape = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (place / "preprocessor_config.json").write_text(json.dumps(shape))
    return str(place)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of an ensemble that writes and of one that classifies; yields their folders and its port."""
    work = tmp_path_factory.mktemp("ensembles")
    writers = [saved_writer(work / f"w{index}", index) for index in range(2)]
    classifiers = [
        saved_classifier(work / f"c{i}", names, i) for i, names in enumerate((["cat", "eel"], ["eel", "cat"]))
    ]
    lfm.ensemble(Average(of="logits"), writers, weights=[2, 1], out=work / "tales", settings=QUIET)
    lfm.ensemble("average", classifiers, out=work / "beasts", settings=QUIET)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "XDG_CACHE_HOME": str(work / "cache")}
    command = [sys.executable, "-m", "lfm", "serve", str(work / "tales"), str(work / "beasts"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
        lines = [run.stderr.readline() for _ in range(2)]
        assert [line.partition(" at ")[0] for line in lines] == [
            "serving tales (causal-lm, probs)",
            "serving beasts (image-classification, probs)",
        ]
        yield work / "tales", work / "beasts", int(lines[0].rpartition(":")[2].partition("/")[0])
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served[2]}/v1", api_key="none", max_retries=0) as client:
        yield client


def told(tokens):
    return [pytest.approx(token.logprob, abs=1e-5) for token in tokens]


def test_completions_of_an_ensemble_are_those_of_its_folder(served, client):
    prompts = ["Once", "Twice upon"]
    made = client.completions.create(model="tales", prompt=prompts, max_tokens=12, temperature=0, logprobs=3)
    for choice, wanted in zip(
        made.choices, lfm.load(served[0]).write(prompts, Sampling(max_new_tokens=12, top_logprobs=3)), strict=True
    ):
        assert choice.text == wanted.text
        assert choice.logprobs.token_logprobs == told(wanted.tokens)
    drawn = client.completions.create(model="tales", prompt="Once", max_tokens=12, temperature=1, seed=3)
    [wanted] = lfm.load(served[0]).write(["Once"], Sampling(max_new_tokens=12, temperature=1.0, seed=3))
    assert drawn.choices[0].text == wanted.text


def test_chat_with_an_ensemble_is_that_with_its_folder(served, client):
    turns = [{"role": "user", "content": "Hi"}]
    made = client.chat.completions.create(
        model="tales", messages=turns, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    how = Sampling(max_new_tokens=8, top_logprobs=2)
    [wanted] = lfm.load(served[0]).write([[Message(role="user", content="Hi")]], how)
    assert made.choices[0].message.content == wanted.text
    assert [item.logprob for item in made.choices[0].logprobs.content] == told(wanted.tokens)
    one = lfm.load(served[0].parent / "w0").write([[Message(role="user", content="Hi")]], how)[0]
    assert [token.logprob for token in one.tokens] != told(wanted.tokens), "it is not its first member"


def test_pictures_are_told_apart_as_by_the_folder(served):
    drawn = [picture(seed, size=8) for seed in range(5)]
    model = lfm.load(served[1])
    rows = Rows({"image": np.stack([pixels for pixels, _ in drawn])}, "pictures")
    wanted = model.probs(model.encoder.encode(rows, 8, labelled=False).batch(range(5)))
    body = {"model": "beasts", "images": [base64.b64encode(raw).decode() for _, raw in drawn]}
    status, found = ask(served[2], "/predict", body)
    assert status == 200, found
    assert found["classes"] == ["cat", "eel"]
    np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-6)
    assert found["labels"] == [found["classes"][index] for index in wanted.argmax(-1)]
