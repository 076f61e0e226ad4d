"""Learning on data: every method by the engine, hidden states of any two models, and runs that are stopped."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.distill import digits

import lfm
from lfm.distill._contract import Inside, Matching, Successive
from lfm.distill.attention_transfer import AttentionTransfer
from lfm.distill.born_again import BornAgain
from lfm.distill.crd import Crd
from lfm.distill.dkd import Dkd
from lfm.distill.fitnets import Fitnets
from lfm.distill.g2sd import G2sd
from lfm.distill.mutual import Mutual
from lfm.distill.response import Response
from lfm.distill.rkd import Rkd
from lfm.distill.simkd import Simkd
from lfm.errors import RequestError
from lfm.method import methods_of
from lfm.recipe.step import Settings

ON_DATA = sorted(name for name, card in methods_of("distill").items() if card.module == f"lfm.distill.{name}")
SHORT = {"steps": 6, "batch_size": 16, "learning_rate": 5e-3}


@cache
def few(labelled: bool = True) -> dict:
    """A hundred digits."""
    path = Path(mkdtemp()) / "few.npz"
    found = np.load(digits.saved() / "train.npz")
    arrays = {"x_train": found["x_train"][:100]} | ({"y_train": found["y_train"][:100]} if labelled else {})
    np.savez(path, **arrays)
    return {"path": str(path)}


def teach(method: Matching, out: Path, teacher: dict | None = None, student: object = None, data=None, **settings):
    how = Settings(threads=1, quiet=True, **settings)
    known = teacher or digits.ref("teacher", digits.trained())
    lfm.distill(method, known, student or digits.new("student"), out=out, data=data or few(), settings=how)
    return out


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def student_of(out: Path):
    module = digits.student()
    module.load_state_dict(load_file(out / "model.safetensors"))
    return module.eval()


def test_the_methods_are_those_of_the_page():
    assert set(ON_DATA) >= {"response", "dkd", "fitnets", "attention_transfer", "simkd", "rkd", "similarity"}
    assert set(ON_DATA) >= {"affinity", "crd", "mutual", "born_again", "g2sd"}


@pytest.mark.parametrize("name", ON_DATA)
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes_and_the_student_is_alone(name, tmp_path, monkeypatch):
    kind = methods_of("distill")[name].load()
    method = kind(**SHORT)
    whole = teach(method, tmp_path / "whole")
    assert set(load_file(whole / "model.safetensors")) == set(digits.student().state_dict())
    asked = [0]
    terms = kind.terms

    def stopping_terms(self, given):
        asked[0] += 1
        if asked[0] == 5:
            raise KeyboardInterrupt
        return terms(self, given)

    monkeypatch.setattr(kind, "terms", stopping_terms)
    if issubclass(kind, Successive):
        asked[0] = -SHORT["steps"]  # in the second generation
    with pytest.raises(KeyboardInterrupt):
        teach(method, tmp_path / "out", save_seconds=0.0)
    taken_up = teach(method, tmp_path / "out", save_seconds=0.0)
    for file in ("model.safetensors", "training.jsonl"):
        assert (taken_up / file).read_bytes() == (whole / file).read_bytes()


def test_the_ramp_of_dkd_follows_the_steps(tmp_path):
    first, *_, last = log(teach(Dkd(**SHORT, ramp=1.0), tmp_path / "out"))
    assert first["target"] == first["others"] == 0
    assert last["others"] > 0


def test_both_learn_from_each_other(tmp_path):
    records = log(teach(Mutual(steps=40, batch_size=50, learning_rate=5e-3), tmp_path / "out", digits.new("teacher")))
    assert records[-1]["teacher_labels"] < 0.6 * records[0]["teacher_labels"]
    assert records[-1]["labels"] < 0.8 * records[0]["labels"]


def test_each_generation_teaches_the_next(tmp_path):
    records = log(teach(BornAgain(**SHORT, generations=3), tmp_path / "out"))
    assert [record["generation"] for record in records] == [0] * 6 + [1] * 6 + [2] * 6


def test_first_hidden_states_then_answers(tmp_path):
    records = log(teach(G2sd(**SHORT, generic=0.5), tmp_path / "out"))
    assert ["hidden" in record for record in records] == [True] * 3 + [False] * 3


def test_without_labels_there_is_no_term_for_them(tmp_path):
    for method in (Response(**SHORT), Rkd(**SHORT), Dkd(**SHORT), Crd(**SHORT)):
        records = log(teach(method, tmp_path / type(method).__name__, data=few(labelled=False)))
        assert "labels" not in records[0]


def test_labels_are_needed_to_learn_together(tmp_path):
    with pytest.raises(RequestError, match="label"):
        teach(Mutual(**SHORT), tmp_path / "out", data=few(labelled=False))


def test_the_student_is_given_the_teachers_output_layer(tmp_path):
    """What is written says what the projection and the teacher's output layer say."""
    out = teach(Simkd(steps=120, batch_size=50, learning_rate=5e-3), tmp_path / "out")
    assert digits.accuracy(student_of(out)) > 0.6
    theirs = digits.teacher()
    theirs.load_state_dict(load_file(digits.trained() / "model.safetensors"))
    weight = student_of(out).head.weight
    space = theirs.head.weight  # (10, 48): every row of ours is one of theirs, seen through the projection
    assert weight.shape == (10, 24)
    fitted = torch.linalg.lstsq(space, weight).solution
    assert torch.allclose(space @ fitted, weight, atol=1e-3)


def test_validation_watches_what_is_trained_along(tmp_path):
    method = Fitnets(**SHORT, patience=1, validate_every=2)
    how = Settings(threads=1, quiet=True)
    test = {"path": str(digits.saved() / "test.npz")}
    teacher = digits.ref("teacher", digits.trained())
    lfm.distill(method, teacher, digits.new("student"), out=tmp_path / "out", data=few(), validation=test, settings=how)
    assert any("validation" in record for record in log(tmp_path / "out"))


def test_layers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RequestError, match="the student has no layer 7"):
        teach(Fitnets(**SHORT, layers={7: 0}), tmp_path / "out")


# --- transformers ---------------------------------------------------------------------------------------------------


def encoder(folder: Path, hidden: int, layers: int) -> dict:
    config = tf.BertConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(hidden)
        tf.BertForSequenceClassification(config).save_pretrained(folder)
    return {"ref": str(folder), "tokenizer": "bytes", "task": "text-classification"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": "a good day " * (1 + i % 3), "label": "1"} for i in range(6)]
    rows += [{"text": "bad luck", "label": "0"} for _ in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(path)}


@pytest.mark.parametrize("name", [name for name in ON_DATA if name != "attention_transfer"])
def test_encoders_of_text_learn_in_every_way(name, texts, tmp_path):
    """Texts of several lengths, so that there is padding; students narrower and of fewer layers."""
    kind = methods_of("distill")[name].load()
    given = {"steps": 3, "batch_size": 4} | ({"layers": "all"} if issubclass(kind, Inside) else {})
    teacher, student = encoder(tmp_path / "t", 24, 4), encoder(tmp_path / "s", 16, 2)
    out = teach(kind(**given), tmp_path / "out", teacher, student, texts)
    assert log(out)[-1]["loss"] > 0
    loaded = tf.BertForSequenceClassification.from_pretrained(out)
    assert loaded.config.num_hidden_layers == 2


def test_a_cut_teacher_is_a_student_in_one_line(texts, tmp_path):
    teacher = encoder(tmp_path / "t", 24, 4)
    cut = {"layers": [0, 3], "width": 0.5}
    out = teach(Fitnets(steps=3, batch_size=4, layers="all"), tmp_path / "out", teacher, cut, texts)
    config = tf.BertForSequenceClassification.from_pretrained(out).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 12, 1)
    with pytest.raises(RequestError, match="has 4 layers"):
        teach(Fitnets(steps=3), tmp_path / "other", teacher, {"layers": 9}, texts)


def test_models_that_write_text_get_no_other_output_layer(tmp_path):
    config = tf.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "t")
    teacher = {"ref": str(tmp_path / "t"), "tokenizer": "bytes"}
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "a good day"}) for _ in range(8)))
    data = {"path": str(tmp_path / "text.jsonl")}
    with pytest.raises(RequestError, match="classifier's alone"):
        teach(Simkd(steps=1), tmp_path / "no", teacher, {"layers": 1}, data)
    for method in (
        Fitnets(steps=2),
        AttentionTransfer(steps=2),
        Rkd(steps=2, batch_size=4),
        Crd(steps=2, batch_size=4),
    ):
        out = teach(method, tmp_path / type(method).__name__, teacher, {"layers": 1}, data)
        assert np.isfinite(log(out)[-1]["loss"])


# --- several teachers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"ensemble": "average"}, {"ensemble": "average", "weights": [3, 1]}])
def test_an_ensemble_of_images_teaches(how, tmp_path):
    members = [digits.ref("teacher", digits.trained()), digits.ref("teacher", digits.trained(1))]
    given = {key: value for key, value in how.items() if key != "ensemble"}
    lfm.ensemble(how["ensemble"], members, out=tmp_path / "both", settings=Settings(quiet=True), **given)
    out = teach(Response(steps=100, batch_size=50, learning_rate=5e-3), tmp_path / "s", {"ref": str(tmp_path / "both")})
    assert digits.accuracy(student_of(out)) > 0.6
    with pytest.raises(RequestError, match="weights"):
        teach(Fitnets(**SHORT), tmp_path / "no", {"ref": str(tmp_path / "both")})


def test_an_ensemble_of_texts_teaches(texts, tmp_path):
    members = [encoder(tmp_path / f"m{i}", size, 1) for i, size in enumerate((16, 24))]
    lfm.ensemble("average", members, out=tmp_path / "both", settings=Settings(quiet=True))
    student = encoder(tmp_path / "s", 12, 1)
    out = teach(Response(steps=3, batch_size=4), tmp_path / "out", {"ref": str(tmp_path / "both")}, student, texts)
    assert log(out)[-1]["forward"] > 0


# --- what it is worth -----------------------------------------------------------------------------------------------


def test_a_teacher_is_worth_more_than_the_labels_alone(tmp_path):
    """A hundred images, 200 steps: hidden states teach more than the labels do."""
    given = {"steps": 200, "batch_size": 50, "learning_rate": 5e-3}
    labels = digits.accuracy(student_of(teach(Response(**given, alpha=0.0), tmp_path / "labels")))
    for method in (Fitnets(**given), Crd(**given)):
        found = digits.accuracy(student_of(teach(method, tmp_path / type(method).__name__)))
        assert found >= labels + 0.01, f"{type(method).__name__}: {found} {labels}"
