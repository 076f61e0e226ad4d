"""Tangents: against an explicit Jacobian, adding up, taking away to the last bit, and what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import lfm
from lfm.data import DataSpec, read
from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.models.local import LocalBackend
from lfm.models.ref import ImageSpec
from lfm.recipe.step import Settings
from lfm.reuse.ensemble._tangent import TangentBackend

QUIET = Settings(quiet=True)
DIGITS = {"path": "sklearn:digits", "part": "held_out"}
CLASSES = {str(index): index for index in range(3)}


class Tiny(nn.Module):
    """A net with everything that must behave as in use: BatchNorm, dropout, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.twice = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


def handle(module, label, task="image-classification", **encoder):
    encoder = Encoder(task, **{"classes": CLASSES, **encoder})
    return Model(LocalBackend(module, encoder.tokenizer), Access.WEIGHTS, task, encoder, label)


def moved(module, make, seed, by=0.1):
    """Return the module made anew with weights near those of `module`."""
    made = make()
    made.load_state_dict(module.state_dict())
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight += by * torch.randn(weight.shape, generator=chance)
    return made


@pytest.fixture
def tiny():
    """A base and three fine-tunes of it, in training mode: only the backend makes it evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Tiny()
        base.norm.running_mean.normal_()
        base.norm.running_var.uniform_(0.5, 2.0)
    return handle(base, "base"), [handle(moved(base, Tiny, seed), f"m{seed}") for seed in (1, 2, 3)]


def pixels(rows=5, seed=9):
    chance = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, 4, generator=chance), "labels": torch.zeros(rows)}


def by_jacobian(logits, weights, moves):
    """Return logits + J moves, in reverse mode: one row of the Jacobian after the other."""
    expected = logits.detach().clone()
    for place in np.ndindex(*logits.shape):
        gradients = torch.autograd.grad(logits[place], weights, retain_graph=True)
        expected[place] += sum((g * move).sum() for g, move in zip(gradients, moves, strict=True))
    return expected


# --- the formula ----------------------------------------------------------------------------------------------------


def test_it_is_the_explicit_jacobian_times_the_sum_of_task_vectors(tiny):
    base, members = tiny
    weights = [0.5, 2.0, 1.0]
    found = TangentBackend(base, members, weights).logits(pixels())

    reference = Tiny().double().eval()
    reference.load_state_dict(base.module.state_dict())
    logits = reference(pixels()["pixel_values"].double())
    own = list(reference.parameters())
    task = [
        sum(w * (list(m.module.parameters())[i].double() - own[i]) for w, m in zip(weights, members, strict=True))
        for i in range(len(own))
    ]
    expected = by_jacobian(logits, own, [move.detach() for move in task])
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_near_the_base_it_is_the_model_itself_and_further_away_it_is_not(tiny):
    base, _ = tiny
    batch = pixels()
    errors = []
    for by in (0.02, 0.01):
        member = handle(moved(base.module, Tiny, 1, by), "m")
        found = TangentBackend(base, [member], [1.0]).logits(batch)
        errors.append(float((found - member.logits(batch)).abs().max()))
    assert errors[0] < 0.02
    assert 2.5 < errors[0] / errors[1] < 6  # what is left out is of second order


def test_members_add_up(tiny):
    base, members = tiny
    batch = pixels()
    start = base.logits(batch)
    alone = [TangentBackend(base, [member], [1.0]).logits(batch) - start for member in members]
    together = TangentBackend(base, members, [1.0, 1.0, 1.0]).logits(batch)
    np.testing.assert_allclose(together - start, sum(alone), atol=5e-6)
    assert float(sum(alone).abs().max()) > 0.1
    half = TangentBackend(base, members[:1], [0.5]).logits(batch)
    np.testing.assert_allclose(half - start, alone[0] / 2, atol=2e-6)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_member_of_weight_0_leaves_no_bit_behind(tiny, gone):
    base, members = tiny
    weights = [0.3, 0.7, 1.1]
    with torch.no_grad():
        members[gone].module.first.weight.fill_(torch.inf)  # even 0 times this would be seen
    without = [0.0 if index == gone else weight for index, weight in enumerate(weights)]
    kept = [index for index in range(3) if index != gone]
    never = TangentBackend(base, [members[i] for i in kept], [weights[i] for i in kept]).logits(pixels())
    assert torch.equal(TangentBackend(base, members, without).logits(pixels()), never)
    assert never.isfinite().all()


def test_the_base_as_a_member_changes_nothing(tiny):
    base, members = tiny
    expected = TangentBackend(base, members[:1], [1.0]).logits(pixels())
    assert torch.equal(TangentBackend(base, [members[0], base], [1.0, 1.0]).logits(pixels()), expected)
    np.testing.assert_allclose(TangentBackend(base, [base], [1.0]).logits(pixels()), base.logits(pixels()), atol=1e-6)


# --- transformers ---------------------------------------------------------------------------------------------------


def bert():
    config = tf.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


def llama():
    config = tf.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, num_labels=3, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return tf.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("make", [bert, llama])
def test_text_classifiers_agree_with_their_jacobian(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = make().eval()
    member = moved(start, make, 1, 0.02).eval()
    base, one = (handle(module, "m", "text-classification") for module in (start, member))
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.zeros(2)}
    found = TangentBackend(base, [one], [1.0]).logits(batch)

    own = list(start.parameters())
    moves = [(other - weight).detach() for weight, other in zip(own, member.parameters(), strict=True)]
    expected = by_jacobian(start(input_ids=ids, attention_mask=batch["attention_mask"]).logits, own, moves)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert float((found - base.logits(batch)).abs().max()) > 0.01


# --- folders --------------------------------------------------------------------------------------------------------


def vit(names="0123456789", width=16):
    config = tf.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=width, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        initializer_range=0.3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def write(module, folder: Path) -> str:
    module.save_pretrained(folder)
    shape = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(shape))
    return str(folder)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The folders of a base and three fine-tunes of it."""
    root = tmp_path_factory.mktemp("family")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = vit()
    return [write(base, root / "base"), *(write(moved(base, vit, n, 0.05), root / f"m{n}") for n in (1, 2, 3))]


def encoded(model):
    return model.encoder.encode(read(DataSpec.model_validate(DIGITS)), 8).batch(range(40))


def test_it_is_a_folder_that_is_loaded_and_measured_and_taken_apart_again(family, tmp_path):
    base, *members = family
    three = lfm.ensemble("tangent", members, base=base, weights=[1, 0, 0.5], out=tmp_path / "three", settings=QUIET)
    two = lfm.ensemble(
        "tangent", [members[0], members[2]], base=base, weights=[1, 0.5], out=tmp_path / "two", settings=QUIET
    )
    assert three.access is Access.PROBS
    assert torch.equal(three.probs(encoded(three)), two.probs(encoded(two)))
    told = json.loads((tmp_path / "three" / "lfm.json").read_text())
    assert [Path(member["ref"]).name for member in told["members"]] == ["base", "m1", "m2", "m3"]
    assert told["weights"] == [1, 0, 0.5]
    again = lfm.load(tmp_path / "three")
    assert torch.equal(again.probs(encoded(again)), three.probs(encoded(three)))
    handles = [lfm.load(ref) for ref in family]
    expected = TangentBackend(handles[0], handles[1:], [1, 0, 0.5]).logits(encoded(three)).log_softmax(-1)
    assert torch.equal(three.log_probs(encoded(three)), expected)
    measured = lfm.evaluate([tmp_path / "three", base], {"accuracy": DIGITS}, settings=QUIET)[0]
    assert len(measured.estimates) == 2
    with pytest.raises(AccessError):
        _ = three.module


def test_weights_that_are_left_out_make_the_mean_of_the_members(family, tmp_path):
    base, *members = family
    model = lfm.ensemble("tangent", members[:2], base=base, out=tmp_path / "mean", settings=QUIET)
    handles = [lfm.load(ref) for ref in family]
    batch = encoded(model)
    alone = [TangentBackend(handles[0], [member], [1.0]).logits(batch) for member in handles[1:3]]
    np.testing.assert_allclose(model.log_probs(batch), ((alone[0] + alone[1]) / 2).log_softmax(-1), atol=2e-5)


def test_a_changed_base_is_refused_and_a_copied_one_goes_along(family, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = write(vit(), tmp_path / "base")
    for name, copied in (("linked", False), ("copied", True)):
        model = lfm.ensemble(
            "tangent", [family[1]], base=base, copy_members=copied, out=tmp_path / name, settings=QUIET
        )
    expected = model.probs(encoded(model))
    write(vit(), tmp_path / "base")
    with pytest.raises(RequestError, match="base: is not what it was"):
        lfm.load(tmp_path / "linked")
    model = lfm.load(tmp_path / "copied")
    assert torch.equal(model.probs(encoded(model)), expected)


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_requests_that_make_no_sense_are_refused_with_all_their_problems(family, tmp_path):
    base, *members = family
    with pytest.raises(RequestError) as caught:
        lfm.ensemble("tangent", members, weights=[1.0], data=DIGITS, calibrate="ensemble", out=tmp_path / "out")
    text = "\n".join(caught.value.problems)
    for told in ("needs a base", "3 models and 1 weight", "neither `data` nor `calibrate`"):
        assert told in text
    with pytest.raises(RequestError, match="Average does not use a base"):
        lfm.ensemble("average", members, base=base, out=tmp_path / "out")
    with pytest.raises(RequestError, match="offers probs, and ensemble tangent needs weights"):
        lfm.ensemble("tangent", [{"ref": members[0], "access": "probs"}], base=base, out=tmp_path / "out")


def test_members_that_do_not_fit_the_base_are_refused_by_name(family, tmp_path):
    renamed = write(vit("abcdefghij"), tmp_path / "renamed")
    wide = write(vit(width=32), tmp_path / "wide")
    with pytest.raises(RequestError) as caught:
        lfm.ensemble("tangent", [family[1], renamed, wide], base=family[0], out=tmp_path / "out", settings=QUIET)
    first, second = caught.value.problems
    assert "renamed: its classes" in first
    assert "wide: is not of the architecture" in second
    assert not (tmp_path / "out").exists()


def test_other_tasks_tokenizers_and_images_are_refused(tiny):
    base, (member, *_) = tiny
    with pytest.raises(RequestError, match="m: is a text-classification model"):
        TangentBackend(base, [handle(member.module, "m", "text-classification")], [1.0])
    with pytest.raises(RequestError, match="Tangent joins classifiers, and b is a causal-lm model"):
        TangentBackend(handle(base.module, "b", "causal-lm"), [member], [1.0])
    with pytest.raises(RequestError, match="m: reads images in another way"):
        TangentBackend(base, [handle(member.module, "m", image=ImageSpec(size=8))], [1.0])

    class Words:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(RequestError, match="m: its tokenizer is not that of the base"):
        TangentBackend(base, [handle(member.module, "m", tokenizer=Words())], [1.0])
    with pytest.raises(RequestError, match="does not write text"):
        TangentBackend(base, [member], [1.0]).write(["a"], None, None)
