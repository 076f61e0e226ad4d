"""On-policy distillation: the student writes, the teacher judges."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from tests.golden.trl.inputs import BETAS, RESULTS, TEMPERATURES, logits
from tests.killing import start

import lfm
from lfm.data import DataSpec, read
from lfm.distill._losses import jensen_shannon
from lfm.distill._on_policy import Mixed, Prompts
from lfm.distill.text.gkd import Gkd
from lfm.errors import RequestError
from lfm.models.encode import IGNORE
from lfm.recipe.step import Settings

QUIET = Settings(quiet=True)
GOLDEN = json.loads(RESULTS.read_text())


@pytest.fixture(scope="session")
def stories(assets):
    return str(assets / "checkpoints" / "stories260k")


@pytest.fixture(scope="session")
def tales(assets):
    return {"path": str(assets / "data" / "tinystories-600.json"), "limit": 12}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Once upon a time", "The dog", "Lily and Tom")))
    return str(path)


def log(out):
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_is_that_of_trl(beta, temperature):
    """TRL does without the factor T^2."""
    student, teacher, labels = logits()
    kept = labels != IGNORE
    found = jensen_shannon(teacher[kept], student[kept], beta=beta, temperature=temperature)
    assert float(found) / temperature**2 == pytest.approx(GOLDEN[f"{beta} {temperature}"], rel=1e-5)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_limits_are_those_of_the_divergence_over_its_weight(end):
    student, teacher, _ = (part.double() for part in logits())
    near = abs(end - 1e-7)
    found = jensen_shannon(teacher, student, beta=near) / (near * (1 - near))
    assert float(found) == pytest.approx(float(jensen_shannon(teacher, student, beta=end)), rel=2e-2)


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"lmbda": 0.0}, {"lmbda": 0.0, "seq_kd": True, "beta": 1.0}])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(stories, tales, tmp_path, options):
    method = Gkd(steps=2, batch_size=3, learning_rate=0.0, max_new_tokens=12, **options)
    lfm.distill(method, stories, stories, out=tmp_path / "out", data=tales, length=48, settings=QUIET)
    assert all(abs(step["loss"]) < 1e-5 for step in log(tmp_path / "out"))


def mixed(stories, data, **options):
    teacher, student = lfm.load(stories), lfm.load(stories)
    given = Prompts(read(DataSpec.model_validate(data)), student, 6, 40)
    return Mixed(Gkd(batch_size=4, max_new_tokens=10, **options), given, teacher, student, 0), student


def test_the_loss_is_on_completions_alone_and_prompts_are_those_of_the_data(stories, tales):
    for options in ({"lmbda": 1.0}, {"lmbda": 0.0}):
        source, student = mixed(stories, tales, **options)
        student.module.train()
        torch.manual_seed(0)
        batch = source.batch(0)
        assert student.module.training
        assert (batch["labels"][:, :6] == IGNORE).all()
        lengths = batch["attention_mask"].sum(1)
        assert torch.equal((batch["labels"] != IGNORE).sum(1), lengths - 6)
        known = {tuple(ids[:6]) for ids in (pair[0] for pair in source._prompts._pairs)}
        assert {tuple(ids[:6].tolist()) for ids in batch["input_ids"]} <= known
        assert lengths.max() == (16 if options["lmbda"] else 40)


def test_who_writes_is_drawn_and_the_same_step_draws_the_same_texts(stories, tales):
    source, _ = mixed(stories, tales, lmbda=0.5)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([source.batch(0)["input_ids"].shape[1] for _ in range(8)])
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


def test_prompts_alone_are_enough_where_the_student_writes_and_learning_brings_it_closer(stories, prompts, tmp_path):
    method = Gkd(steps=25, batch_size=3, learning_rate=3e-3, lmbda=1.0, max_new_tokens=16)
    lfm.distill(method, stories, {"layers": 2}, out=tmp_path / "out", data=prompts, settings=QUIET)
    losses = [step["loss"] for step in log(tmp_path / "out")]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    with pytest.raises(RequestError, match="set lmbda to 1, or seq_kd"):
        lfm.distill(Gkd(steps=1), stories, {"layers": 2}, out=tmp_path / "no", data=prompts, settings=QUIET)
    method = Gkd(steps=1, batch_size=3, seq_kd=True, max_new_tokens=4)
    lfm.distill(method, {"ref": stories, "access": "probs"}, stories, out=tmp_path / "p", data=prompts, settings=QUIET)


def test_an_endpoint_cannot_judge_and_says_so(stories, prompts, tmp_path):
    teacher = {"ref": "http://127.0.0.1:1/v1#model", "access": "probs"}
    with pytest.raises(RequestError, match="use sequence or self_generated"):
        lfm.distill(Gkd(steps=1), teacher, stories, out=tmp_path / "out", data=prompts, settings=QUIET)


def rehearse(stories, data, out, save_seconds):
    torch.set_num_threads(1)
    method = Gkd(steps=12, batch_size=2, learning_rate=1e-3, max_new_tokens=6)
    settings = Settings(quiet=True, save_seconds=float(save_seconds))
    lfm.distill(method, stories, {"layers": 1}, out=out, data=data, length=24, settings=settings)


def test_a_run_that_is_killed_makes_the_same_model(stories, tales, tmp_path):
    out = tmp_path / "killed"
    process = start(rehearse, stories, tales, str(out), "0")
    while process.exitcode is None and not any((tmp_path / "killed.partial").glob("resume/step-000000004")):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
    rehearse(stories, tales, out, "0")
    rehearse(stories, tales, tmp_path / "whole", "inf")
    assert lfm.open_checkpoint(out).digest == lfm.open_checkpoint(tmp_path / "whole").digest
