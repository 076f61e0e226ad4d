"""Language models taught on texts that their teacher writes: by logits, likeliest tokens, text."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter

import pytest
import torch
from tests.killing import start
from tests.serving import Endpoint, prompt_of, serving

import lfm
from lfm.distill._losses import divergence, on_top, with_tail
from lfm.distill._texts import Sieve, Text, continued, repetition
from lfm.distill.response import Response
from lfm.distill.text.self_generated import SelfGenerated
from lfm.distill.text.sequence import Sequence
from lfm.errors import BudgetError, RequestError
from lfm.models.text import Sampling
from lfm.models.writing import ModuleStepper
from lfm.recipe.step import Settings

QUIET = Settings(quiet=True)
SMALL = {"steps": 3, "batch_size": 4, "count": 8, "min_tokens": 4}


@pytest.fixture(scope="session")
def stories(assets):
    return str(assets / "checkpoints" / "stories260k")


@pytest.fixture(scope="session")
def tales(assets):
    return {"path": str(assets / "data" / "tinystories-600.json"), "limit": 20}


def distill(method, teacher, student, out, settings=QUIET, **options):
    return lfm.distill(method, teacher, student, out=out, settings=settings, **{"length": 32, **options})


def log(out):
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def lineage(out):
    return json.loads((out / "lineage.json").read_text())


def texts(out):
    return [json.loads(line) for line in (out / "synthesised.jsonl").read_text().splitlines()]


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(stories, tales, tmp_path, top_k, temperature):
    method = Response(steps=2, batch_size=4, learning_rate=0.0, alpha=1.0, temperature=temperature, top_k=top_k)
    distill(method, stories, stories, tmp_path / "out", data=tales)
    assert all(abs(step["loss"]) < 1e-5 and step["gradient_norm"] < 1e-3 for step in log(tmp_path / "out"))


def test_a_smaller_student_of_text_learns_by_logits_and_by_likeliest_tokens(stories, tales, tmp_path):
    for top_k in (None, 8):
        out = tmp_path / str(top_k)
        method = Response(steps=30, batch_size=8, learning_rate=2e-3, temperature=1.0, top_k=top_k)
        distill(method, stories, {"layers": 2}, out, data=tales)
        losses = [step["loss"] for step in log(out)]
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert lfm.load(tmp_path / "None").module.config.num_hidden_layers == 2


def test_padding_of_a_vocabulary_changes_nothing(stories, tales, tmp_path):
    """Rows of the table that no token has take no part."""
    module = lfm.load(stories).module
    module.resize_token_embeddings(520, mean_resizing=False)
    with torch.no_grad():
        module.get_input_embeddings().weight[512:] = 9.0
    module.save_pretrained(tmp_path / "padded")
    padded = {"ref": str(tmp_path / "padded"), "tokenizer": stories}
    method = Response(steps=1, batch_size=4, learning_rate=0.0, alpha=1.0)
    for number, pair in enumerate(((padded, stories), (stories, padded))):
        distill(method, *pair, tmp_path / str(number), data=tales)
        assert abs(log(tmp_path / str(number))[0]["loss"]) < 1e-5


def test_tokens_weigh_the_same_however_long_their_texts_are(stories, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": "Once", "completion": text}) + "\n" for text in ("upon a time there was", "a dog")
        )
    )
    found = {}
    for size in (1, 2):
        method = Response(steps=1, batch_size=size, accumulate=2 // size, learning_rate=0.0, alpha=1.0)
        distill(method, stories, {"layers": 1}, tmp_path / str(size), data=str(tmp_path / "rows.jsonl"))
        found[size] = log(tmp_path / str(size))[0]["loss"]
    assert found[1] == pytest.approx(found[2], rel=1e-4)


def test_all_classes_and_a_tail_of_none_are_the_whole_and_unused_places_are_none():
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 9).log_softmax(-1), torch.randn(6, 9).log_softmax(-1)
    assert divergence(*with_tail(teacher, student, 9)) == pytest.approx(float(divergence(teacher, student)), abs=1e-5)
    top = teacher.topk(3, -1)
    told = torch.cat([top.values, torch.full((6, 2), -torch.inf)], -1)
    ids = torch.cat([top.indices, torch.zeros(6, 2, dtype=torch.long)], -1)
    for kind in ("forward", "reverse", "js"):
        whole = divergence(*with_tail(teacher, student, 3), kind=kind)
        assert divergence(*on_top(told, ids, student), kind=kind) == pytest.approx(float(whole), abs=1e-6)


def test_the_gradient_keeps_its_size_when_the_temperature_changes():
    torch.manual_seed(0)
    teacher = torch.randn(64, 10)
    norms = []
    for temperature in (8.0, 32.0):
        student = torch.zeros(64, 10, requires_grad=True)
        divergence(teacher, student, temperature=temperature).backward()
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_a_text_does_not_depend_on_what_is_written_beside_it(stories):
    module = lfm.load(stories).module
    how, starts = Sampling(temperature=1.0, top_p=0.9), [[1], [1, 403, 407], [1, 410]]

    def written(places):
        draws = [torch.Generator().manual_seed(place) for place in places]
        stepper = ModuleStepper(module)
        return [ids for ids, _ in continued(stepper, [starts[i] for i in places], 24, how, draws, frozenset({2}))]

    together = written([0, 1, 2])
    assert [written([place])[0] for place in range(3)] == together
    assert [len(start) + len(ids) for start, ids in zip(starts, together, strict=True)] == [24, 24, 24]


def test_the_first_tokens_can_be_greedy_and_probabilities_are_those_of_the_model(stories):
    model = lfm.load(stories)
    draws = [torch.Generator().manual_seed(0)]
    how = Sampling(temperature=3.0)
    [(ids, values)] = continued(model.stepper(), [[1, 403]], 20, how, draws, frozenset({2}), [6])
    said = model.log_probs({"input_ids": torch.tensor([[1, 403, *ids]])})[0]
    assert ids[:6] == said.argmax(-1)[1:7].tolist()
    assert ids != said.argmax(-1)[1:-1].tolist()
    expected = said[1:-1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
    assert values == pytest.approx(expected.tolist(), abs=1e-3)


def test_what_is_not_worth_reading_is_dropped_and_counted():
    sieve = Sieve(4, 0.5)
    for ids in ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 2), (1, *(7, 8) * 20)):
        sieve.take(Text(ids, 1, False, ""))
    sieve.take(None)
    assert [text.ids for text in sieve.kept] == [(1, 2, 3, 4, 5)]
    assert sieve.dropped == {"duplicates": 1, "short": 1, "repetitive": 1, "unreadable": 1}
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2] * 20) > 0.9


# --- self-generated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["logits", "top_k"])
def test_texts_of_its_own_teach_the_teacher_nothing(stories, tmp_path, answers):
    method = SelfGenerated(answers=answers, learning_rate=0.0, begin="vocabulary", **SMALL)
    distill(method, stories, stories, tmp_path / "out")
    assert all(abs(step["loss"]) < 1e-5 for step in log(tmp_path / "out"))
    assert len(texts(tmp_path / "out")) == 8


@pytest.mark.parametrize(("access", "best"), [("weights", "logits"), ("probs", "top k"), ("labels", "text")])
def test_the_best_that_a_teacher_offers_is_used_and_no_more(stories, tmp_path, access, best):
    distill(
        SelfGenerated(**SMALL),
        {"ref": stories, "access": access},
        {"config": small(), "tokenizer": stories},
        tmp_path / "o",
    )
    told = lineage(tmp_path / "o")
    assert any(f"by its {best}" in note for note in told["notes"])
    assert any("without any data" in note for note in told["notes"])
    assert told["metrics"]["synthesised_texts"] == 8
    assert (told["metrics"].get("synthesised_log_prob") is None) == (access == "labels")


def test_more_than_a_teacher_offers_is_refused_by_the_plan(stories, tmp_path):
    student = {"config": small(), "tokenizer": stories}
    for access, answers in (("probs", "logits"), ("labels", "top_k")):
        method = SelfGenerated(answers=answers, **SMALL)
        with pytest.raises(RequestError, match=f"offers {access}, and answers: {answers} takes"):
            distill(method, {"ref": stories, "access": access}, student, tmp_path / "o")
    assert not list(tmp_path.glob("o*"))


def small(**changes):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        **changes,
    }


def test_data_classifiers_and_other_tokenizers_are_refused(stories, tales, tmp_path):
    with pytest.raises(RequestError, match="reads no data"):
        distill(SelfGenerated(**SMALL), stories, {"layers": 1}, tmp_path / "o", data=tales)
    bert = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 260}
    bert |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(RequestError, match="writes no text"):
        distill(SelfGenerated(**SMALL), {"config": bert, "tokenizer": "bytes"}, {"layers": 1}, tmp_path / "o")
    other = {"config": small(vocab_size=257), "tokenizer": "bytes"}
    lfm.tune("full", other, tales, out=tmp_path / "other", length=32, settings=QUIET)
    with pytest.raises(RequestError, match="different tokenizers"):
        distill(Response(steps=1), stories, str(tmp_path / "other"), tmp_path / "o", data=tales)
    with pytest.raises(RequestError, match="different tokenizers"):
        distill(SelfGenerated(answers="logits", **SMALL), stories, str(tmp_path / "other"), tmp_path / "o")
    with pytest.raises(RequestError, match="answers: logits mean nothing"):
        distill(SelfGenerated(**SMALL), stories, other, tmp_path / "o")
    distill(SelfGenerated(answers="text", **SMALL), stories, str(tmp_path / "other"), tmp_path / "read", length=64)
    assert len(texts(tmp_path / "read")) == 8


def test_topics_are_gone_on_from_and_not_learned(stories, tmp_path):
    prompts = ["The dog", "A red ball", "Lily"]
    for access in ("weights", "labels"):
        method = SelfGenerated(prompts=prompts, **SMALL)
        distill(
            method, {"ref": stories, "access": access}, {"config": small(), "tokenizer": stories}, tmp_path / access
        )
        assert [line["text"].startswith(prompts[i % 3]) for i, line in enumerate(texts(tmp_path / access))] == [
            True
        ] * 8


def test_texts_are_data_for_other_steps(stories, tmp_path):
    distill(SelfGenerated(**SMALL), stories, {"layers": 1}, tmp_path / "one")
    data = str(tmp_path / "one" / "synthesised.jsonl")
    distill(Response(steps=2), stories, {"layers": 1}, tmp_path / "two", data=data)


def rehearse(stories, out, save_seconds):
    torch.set_num_threads(1)
    method = SelfGenerated(steps=30, batch_size=4, count=130, learning_rate=1e-3, min_tokens=4)
    student = {"config": small(), "tokenizer": stories}
    settings = Settings(quiet=True, save_seconds=float(save_seconds))
    lfm.distill(method, stories, student, out=out, length=24, settings=settings)


def test_a_run_that_is_killed_while_it_writes_and_while_it_learns_makes_the_same_model(stories, tmp_path):
    out = tmp_path / "killed"
    for moment in ("resume/texts/00000000.json", "resume/step-000000003"):
        process = start(rehearse, stories, str(out), "0")
        while process.exitcode is None and not any((tmp_path / "killed.partial").glob(moment)):
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it could be killed"
        assert not out.exists()
    rehearse(stories, out, "0")
    rehearse(stories, tmp_path / "whole", "inf")
    killed, whole = (lfm.open_checkpoint(folder) for folder in (out, tmp_path / "whole"))
    assert killed.digest == whole.digest
    for name in ("synthesised.jsonl", "training.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def held_out_loss(model, tales):
    from lfm.data import DataSpec, read

    model = lfm.load(model)
    batch = model.encoder.encode(read(DataSpec(path=tales["path"], part="held_out", limit=24)), 64).batch(range(64))
    said, labels = model.logits(batch)[:, :-1], batch["labels"][:, 1:]
    return float(torch.nn.functional.cross_entropy(said.flatten(0, 1), labels.flatten()))


def test_a_student_learns_more_from_texts_of_the_teacher_than_from_random_tokens(stories, tales, tmp_path):
    shared = {"steps": 80, "batch_size": 8, "learning_rate": 3e-3}
    distill(SelfGenerated(count=128, **shared), stories, {"layers": 1}, tmp_path / "own", length=64)
    tokenizer = lfm.load(stories).encoder.tokenizer
    noise = tokenizer.batch_decode(torch.randint(259, 512, (128, 64), generator=torch.Generator().manual_seed(0)))
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in noise))
    control = Response(temperature=1.0, alpha=1.0, **shared)
    distill(control, stories, {"layers": 1}, tmp_path / "noise", length=64, data=str(tmp_path / "noise.jsonl"))
    own, random = (held_out_loss(tmp_path / name, tales) for name in ("own", "noise"))
    assert own < random - 0.1


# --- through an API -------------------------------------------------------------------------------------------------


def writes(stories, told=None):
    """Return what answers as the model would behind an endpoint; with `told`, it names likeliest tokens too."""
    model = lfm.load(stories)

    def answer(asked):
        body = asked.body
        how = Sampling(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body.get("seed"),
            top_logprobs=body.get("logprobs"),
        )
        [made] = model.write([prompt_of(body)], how)
        choice = {"index": 0, "text": made.text, "finish_reason": made.finish}
        if made.tokens:
            choice["logprobs"] = {
                "tokens": [token.text for token in made.tokens],
                "token_logprobs": [token.logprob for token in made.tokens],
                "top_logprobs": [dict(token.top) for token in made.tokens],
            }
        usage = {"prompt_tokens": made.prompt_tokens, "completion_tokens": made.completion_tokens}
        return {"choices": [choice], "usage": usage}

    return answer


@pytest.fixture
def endpoint(stories):
    with serving(Endpoint(writes(stories))) as found:
        yield found


def test_an_endpoint_teaches_by_text_and_is_not_asked_twice_when_the_run_was_stopped(endpoint, stories, tmp_path):
    teacher = {"ref": endpoint.ref, "endpoint": {"concurrency": 1}}
    student = {"config": small(), "tokenizer": stories}
    method = SelfGenerated(begin="vocabulary", **SMALL)
    ledger = {"quiet": True, "ledger": tmp_path / "ledger.sqlite"}
    with pytest.raises(BudgetError):
        distill(method, teacher, student, tmp_path / "out", settings=Settings(max_queries=9, **ledger))
    assert len(endpoint.asked) == 9
    distill(method, teacher, student, tmp_path / "out", settings=Settings(max_queries=200, **ledger))
    bodies = Counter(json.dumps(asked.body, sort_keys=True) for asked in endpoint.asked)
    assert set(bodies.values()) == {1}
    assert any("by its text" in note for note in lineage(tmp_path / "out")["notes"])
    before = len(endpoint.asked)
    distill(method, teacher, student, tmp_path / "again", settings=Settings(**ledger))
    assert len(endpoint.asked) == before
    assert lfm.open_checkpoint(tmp_path / "again").digest == lfm.open_checkpoint(tmp_path / "out").digest


def test_an_endpoint_with_probabilities_teaches_by_its_likeliest_tokens(endpoint, stories, tmp_path):
    teacher = {"ref": endpoint.ref, "access": "probs"}
    settings = Settings(quiet=True, ledger=tmp_path / "ledger.sqlite")
    method = SelfGenerated(prompts=["Once upon a time"], learning_rate=0.0, top_k=6, **SMALL)
    distill(method, teacher, stories, tmp_path / "same", settings=settings)
    assert {asked.body["logprobs"] for asked in endpoint.asked} == {6}
    assert any("by its top k" in note for note in lineage(tmp_path / "same")["notes"])
    # the same model knows all that it is told, but for what names of tokens do not tell apart
    assert all(step["loss"] < 0.02 for step in log(tmp_path / "same"))
    distill(method, teacher, {"config": small(), "tokenizer": stories}, tmp_path / "other", settings=settings)
    assert all(step["loss"] > 1 for step in log(tmp_path / "other"))
    hot = SelfGenerated(temperature=2.0, **SMALL)
    with pytest.raises(RequestError, match="at temperature 1"):
        distill(hot, teacher, {"config": small(), "tokenizer": stories}, tmp_path / "hot", settings=settings)


def test_sequences_go_from_any_api_to_any_tokenizer(endpoint, tales, tmp_path):
    student = {"config": small(vocab_size=257), "tokenizer": "bytes"}
    settings = Settings(quiet=True, ledger=tmp_path / "ledger.sqlite")
    method = Sequence(steps=3, batch_size=4, prompt_words=9)
    distill(method, endpoint.ref, student, tmp_path / "out", settings=settings, data={**tales, "limit": 6}, length=96)
    found = texts(tmp_path / "out")
    assert len(found) == 6
    assert all(len(line["text"].split()) >= 9 for line in found)
    notes = lineage(tmp_path / "out")["notes"]
    assert not any("without any data" in note for note in notes)
