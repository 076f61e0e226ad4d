"""What a teacher says of fixed data, kept on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import lfm
from lfm.checkpoint import cache_folder
from lfm.distill import _cache
from lfm.distill._cache import bytes_per_token, narrowest
from lfm.distill._contract import Kept
from lfm.distill.response import Response
from lfm.errors import RequestError
from lfm.recipe.step import Settings

QUIET = Settings(quiet=True)


@pytest.fixture(scope="session")
def stories(assets):
    return str(assets / "checkpoints" / "stories260k")


@pytest.fixture(scope="session")
def tales(assets):
    return {"path": str(assets / "data" / "tinystories-600.json"), "limit": 12}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def loads(monkeypatch):
    """Count how often the teacher is loaded to be asked."""
    found = []

    def counted(*arguments, **options):
        found.append(arguments)
        return opened(*arguments, **options)

    opened = _cache.open_in
    monkeypatch.setattr(_cache, "open_in", counted)
    return found


def distill(out, teacher, student, data, *, kept=True, validation=None, **options):
    settings = {"batch_size": 4, "learning_rate": 2e-3, "temperature": 1.0, "top_k": 16, **options}
    method = Response(cache_teacher=kept, **settings)
    lfm.distill(method, teacher, student, out=out, data=data, validation=validation, length=48, settings=QUIET)
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def folders():
    return sorted((cache_folder() / "teachers").iterdir())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_learns_from_the_disk_what_it_learns_from_the_teacher(stories, tales, tmp_path, temperature, loads):
    options = {"steps": 12, "temperature": temperature}
    found = {
        kept: distill(tmp_path / str(kept), stories, {"layers": 1}, tales, kept=kept, **options)
        for kept in (True, False)
    }
    pairs = list(zip(found[True], found[False], strict=True))
    assert all(one["loss"] == pytest.approx(other["loss"], rel=2e-2, abs=1e-3) for one, other in pairs)
    assert len(loads) == 1
    metrics = json.loads((tmp_path / "True" / "lineage.json").read_text())["metrics"]
    assert (metrics["cache_bytes_per_token"], metrics["full_bytes_per_token"]) == (64, 1024)


def test_a_student_that_is_the_teacher_has_next_to_nothing_to_learn(stories, tales, tmp_path):
    steps = distill(tmp_path / "out", stories, stories, tales, steps=2, learning_rate=0.0, alpha=1.0)
    assert all(abs(step["loss"]) < 1e-4 for step in steps)


def test_the_teacher_is_asked_once_for_all_students_and_again_for_anything_else(stories, tales, tmp_path, loads):
    distill(tmp_path / "a", stories, {"layers": 1}, tales, steps=2)
    again = distill(tmp_path / "b", stories, {"layers": 1}, tales, steps=2)
    assert len(loads) == len(folders()) == 1
    assert again == [json.loads(line) for line in (tmp_path / "a" / "training.jsonl").read_text().splitlines()]
    distill(tmp_path / "c", stories, {"layers": 1}, tales, steps=1, top_k=3)
    distill(tmp_path / "d", stories, {"layers": 1}, {**tales, "limit": 5}, steps=1)
    distill(tmp_path / "e", str(tmp_path / "a"), {"layers": 1}, tales, steps=1)  # another teacher
    distill(tmp_path / "f", stories, {"layers": 1}, tales, steps=1, validation={**tales, "limit": 3})
    assert len(loads) == len(folders()) == 5


def test_what_is_damaged_is_computed_again(stories, tales, tmp_path, loads, caplog):
    distill(tmp_path / "a", stories, {"layers": 1}, tales, steps=2)
    [folder] = folders()
    for number, harm in enumerate((lambda raw: raw[:-7], lambda raw: raw[:50] + b"\0\1" + raw[52:], lambda raw: b"")):
        for name in ("ids.bin", "about.json"):
            (folder / name).write_bytes(harm((folder / name).read_bytes()))
            caplog.clear()
            distill(tmp_path / f"{number} {name}", stories, {"layers": 1}, tales, steps=2)
            assert "is damaged" in caplog.text
    assert len(loads) == 7
    digests = {lfm.open_checkpoint(tmp_path / name).digest for name in ("a", "0 ids.bin", "2 about.json")}
    assert len(digests) == 1
    assert folders() == [folder], "drafts are cleared away"


def test_the_cache_is_small_and_ids_are_as_narrow_as_can_be(stories, tales, tmp_path):
    kinds = [narrowest(size).itemsize for size in (256, 257, 65_536, 65_537)]
    assert kinds == [1, 2, 2, 4]
    assert bytes_per_token(Kept(8, 1.0), 32_000) == 32
    distill(tmp_path / "a", stories, {"layers": 1}, tales, steps=1)
    [folder] = folders()
    offsets = np.fromfile(folder / "offsets.bin", dtype="<i8")
    assert (folder / "ids.bin").stat().st_size + (folder / "log_probs.bin").stat().st_size == offsets[-1] * 64
    values = np.fromfile(folder / "log_probs.bin", dtype="<f2").reshape(-1, 16).astype(np.float32)
    assert (np.diff(values) <= 0).all()
    assert (np.exp(values).sum(-1) < 1.01).all()


def test_what_is_no_language_model_and_other_tokenizers_are_refused(stories, tales, tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 16}
    config |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    with pytest.raises(RequestError, match="another tokenizer"):
        distill(tmp_path / "a", stories, {"config": config, "tokenizer": "bytes"}, tales, steps=1)
    endpoint = {"ref": "http://127.0.0.1:1/v1#model", "access": "probs"}
    with pytest.raises(RequestError, match="leave it out"):
        distill(tmp_path / "b", endpoint, stories, tales, steps=1)


def test_answers_come_as_tensors_that_a_loss_can_take(stories, tales, tmp_path):
    distill(tmp_path / "a", stories, {"layers": 1}, tales, steps=1)
    [folder] = folders()
    key = json.loads((folder / "about.json").read_text())["key"]
    batch = _cache.Answers.read(folder, key).batch([3, 0])
    assert {name: part.dtype for name, part in batch.items()} == {
        "top_ids": torch.int64,
        "top_log_probs": torch.float32,
    }
    assert batch["top_ids"].shape == batch["top_log_probs"].shape
    assert int(batch["top_ids"].max()) < 512
