"""Ensembles of a model in memory and one behind an endpoint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from tests.serve.test_serve import served

import lfm
from lfm.data import DataSpec, read
from lfm.errors import RequestError
from lfm.recipe.step import Settings

DIGITS = {"path": "sklearn:digits", "part": "held_out", "limit": 12}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Return the folders of two image models, of which one takes larger images and numbers its classes backwards."""
    found = []
    for seed, (size, names) in enumerate([(8, range(10)), (16, reversed(range(10)))]):
        labels = dict(enumerate(map(str, names)))
        config = tf.ViTConfig(
            image_size=size, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, id2label=labels, label2id={n: i for i, n in labels.items()}, initializer_range=0.5,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = tf.ViTForImageClassification(config)
        folder = tmp_path_factory.mktemp("members") / f"m{seed}"
        module.save_pretrained(folder)
        shape = {"size": {"height": size, "width": size}, "image_mean": [0.5], "image_std": [0.5]}
        (folder / "preprocessor_config.json").write_text(json.dumps(shape))
        found.append(str(folder))
    return found


def said(model):
    examples = model.encoder.encode(read(DataSpec.model_validate(DIGITS)), 8)
    return model.probs(examples.batch(range(len(examples))))


def test_a_model_in_memory_and_an_endpoint_are_averaged_as_if_both_were_here(members, tmp_path):
    settings = Settings(quiet=True, ledger=tmp_path / "ledger.sqlite")
    lfm.ensemble("average", members, out=tmp_path / "here", settings=settings)
    with served({"far": lfm.load(members[1]).restrict(lfm.Access.PROBS)}) as port:
        far = f"http://127.0.0.1:{port}/v1#far"
        with pytest.raises(RequestError, match="far: offers labels, and ensemble average needs probs"):
            lfm.ensemble("average", [members[0], far], out=tmp_path / "mixed", settings=settings)
        both = [members[0], {"ref": far, "access": "probs"}]
        mixed = lfm.ensemble("average", both, out=tmp_path / "mixed", settings=settings)
        found = said(mixed)
        voted = lfm.ensemble("vote", [members[0], far], out=tmp_path / "votes", settings=settings)
        assert said(voted).sum(1) == pytest.approx(torch.ones(12), abs=1e-5)
    torch.testing.assert_close(found, said(lfm.load(tmp_path / "here")), atol=1e-5, rtol=1e-5)
    kept = json.loads((tmp_path / "mixed" / "lfm.json").read_text())["members"]
    assert kept[1]["ref"] == far
    assert "digest" not in kept[1]
