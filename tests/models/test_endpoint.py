"""Endpoints that behave and endpoints that do not: nothing lost, nothing paid twice, every message plain."""

from __future__ import annotations

import base64
import io
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from tests.serving import Endpoint, prompt_of, serving

import lfm
from lfm.cli import main
from lfm.data import Rows
from lfm.errors import AccessError, BudgetError, LfmError, RequestError
from lfm.method import Access
from lfm.models.ledger import Budget, open_ledger
from lfm.models.open import open_model
from lfm.models.ref import ModelRef
from lfm.models.text import Message, Sampling

QUICK = {"backoff": 0.01, "timeout": 0.3}
HOT = Sampling(temperature=1.0)


@pytest.fixture
def endpoint():
    with serving(Endpoint()) as found:
        yield found


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger.sqlite"


def opened(endpoint, ledger, run="run", task="causal-lm", access=None, budget=None, **options):
    ref = {"ref": endpoint.ref, "task": task, "access": access, "endpoint": {**QUICK, **options}}
    return open_model(ModelRef.model_validate(ref), budget=Budget(run=run, ledger=ledger, **(budget or {})))


# --- what is said and understood ------------------------------------------------------------------------------------


def test_texts_go_to_completions_and_conversations_to_chat(endpoint, ledger):
    model = opened(endpoint, ledger)
    talk = [Message(role="system", content="be brief"), Message(role="user", content="hi")]
    how = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop=("\n",), seed=4)
    told = {}
    one, two = model.write(["once", talk], how, lambda index, piece: told.setdefault(index, piece))
    assert (one.text, two.text) == ("once!", "hi!")
    assert (one.prompt_tokens, one.completion_tokens, one.finish) == (4, 5, "stop")
    assert told == {0: "once!", 1: "hi!"}
    by_path = {asked.path: asked.body for asked in endpoint.asked}
    shared = {"model": "model", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["\n"]}
    shared |= {"seed": 4, "stream": False}
    assert by_path["/v1/completions"] == {**shared, "prompt": "once"}
    assert by_path["/v1/chat/completions"] == {**shared, "messages": [message.model_dump() for message in talk]}


def test_a_text_is_a_message_where_there_is_nothing_but_chat(endpoint, ledger):
    endpoint.chat_only = True
    assert opened(endpoint, ledger, concurrency=1).complete(["a", "b"]) == ["a!", "b!"]
    paths = [asked.path for asked in endpoint.asked]
    assert paths == ["/v1/completions", "/v1/chat/completions", "/v1/chat/completions"]
    [usage] = open_ledger(ledger).usage()
    assert (usage.requests, usage.unanswered) == (2, 0)
    endpoint.faults = [(500, {})] * 100  # known from now on, also without the endpoint
    assert opened(endpoint, ledger).complete(["a", "b"]) == ["a!", "b!"]
    assert len(endpoint.asked) == 3


TALK = [[Message(role="user", content=text)] for text in "abc"]


def test_a_server_that_wants_the_limit_under_its_newer_name_gets_it(endpoint, ledger):
    endpoint.limit = "max_completion_tokens"
    model = opened(endpoint, ledger, concurrency=1, budget={"max_queries": 3})
    how = Sampling(max_new_tokens=7)
    assert [made.text for made in model.write(TALK, how)] == ["a!", "b!", "c!"]
    limits = [{name: asked.body[name] for name in asked.body if name.startswith("max_")} for asked in endpoint.asked]
    assert limits == [{"max_tokens": 7}] + [{"max_completion_tokens": 7}] * 3  # refused once, then known
    assert set(endpoint.answered.values()) == {1}
    assert open_ledger(ledger).spent("run") == (3, 0)  # the refusal is free
    opened(endpoint, ledger).write([[Message(role="user", content="d")]], how)
    assert "max_completion_tokens" in endpoint.asked[-1].body  # another handle knows
    assert len(endpoint.asked) == 5


def test_the_newer_name_changes_no_question(endpoint, ledger, tmp_path):
    opened(endpoint, ledger).write(TALK)
    keys = {request["key"]: request["body"] for request in open_ledger(ledger).requests()}
    endpoint.limit = "max_completion_tokens"
    opened(endpoint, tmp_path / "other").write(TALK)
    assert {request["key"]: request["body"] for request in open_ledger(tmp_path / "other").requests()} == keys
    before = len(endpoint.asked)
    opened(endpoint, ledger, run="another").write(TALK)  # answered under the older name: not asked, nor paid, again
    assert len(endpoint.asked) == before


def test_a_server_that_went_back_to_the_older_name_gets_that(endpoint, ledger):
    endpoint.limit = "max_completion_tokens"
    opened(endpoint, ledger, concurrency=1).write(TALK[:1])
    endpoint.limit = "max_tokens"
    opened(endpoint, ledger, concurrency=1).write(TALK)
    assert [asked.body.get("max_tokens") for asked in endpoint.asked] == [64, None, None, 64, 64]


@pytest.mark.parametrize("known", [False, True])
def test_a_refusal_that_is_about_the_limit_itself_is_told(endpoint, ledger, known):
    endpoint.limit = "max_completion_tokens"
    if known:
        opened(endpoint, ledger).write(TALK[:1])
    good, before = endpoint.limit, len(endpoint.asked)
    refused = (400, {"error": {"message": f"{good} is too large: 64"}})
    unknown = (400, {"error": {"message": f"'max_tokens' is not supported, use '{good}'"}})
    endpoint.faults = [refused, unknown] if known else [unknown, refused]
    with pytest.raises(RequestError, match="is too large: 64"):
        opened(endpoint, ledger).write(TALK[1:2])
    assert len(endpoint.asked) == before + 2
    assert open_ledger(ledger).spent("run")[0] == int(known)


def test_completions_keep_the_name_that_they_have(endpoint, ledger):
    endpoint.faults = [(400, {"error": {"message": "no max_completion_tokens here"}})]
    with pytest.raises(RequestError, match="no max_completion_tokens here"):
        opened(endpoint, ledger).complete(["a"])
    assert len(endpoint.asked) == 1


def test_an_api_that_is_named_is_the_only_one_used(endpoint, ledger):
    opened(endpoint, ledger, api="chat").complete(["a"])
    assert [asked.path for asked in endpoint.asked] == ["/v1/chat/completions"]
    with pytest.raises(RequestError, match="a conversation takes chat"):
        opened(endpoint, ledger, api="completions").write([[Message(role="user", content="x")]])


@pytest.mark.parametrize("prompt", ["p", [Message(role="user", content="p")]], ids=["completions", "chat"])
def test_log_probabilities_come_where_probabilities_are_offered(endpoint, ledger, prompt):
    how = Sampling(top_logprobs=2)
    with pytest.raises(AccessError, match=r"log-probabilities of tokens cannot be had: .* offers labels"):
        opened(endpoint, ledger).write([prompt], how)
    assert endpoint.asked == []
    [made] = opened(endpoint, ledger, access="probs").write([prompt], how)
    [token] = made.tokens
    assert (token.text, token.logprob, token.top["a"]) == ("p!", -0.5, -0.5)


def test_an_endpoint_without_log_probabilities_says_so_and_its_answer_is_kept(endpoint, ledger):
    endpoint.answer = lambda asked: {"choices": [{"text": "x", "logprobs": None}], "usage": {"completion_tokens": 1}}
    for _ in range(2):
        with pytest.raises(RequestError, match="gives no log-probabilities"):
            opened(endpoint, ledger, access="probs").write(["p"], Sampling(top_logprobs=1))
    assert len(endpoint.asked) == 1


def test_text_that_was_cut_off_is_said_to_be(endpoint, ledger):
    endpoint.answer = lambda asked: {"choices": [{"text": "x", "finish_reason": "length"}]}
    [made] = opened(endpoint, ledger).write(["p"])
    assert made.finish == "length"


def test_no_more_requests_are_under_way_than_allowed(endpoint, ledger):
    endpoint.pause = 0.02
    opened(endpoint, ledger, concurrency=3).complete([str(i) for i in range(15)])
    assert endpoint.busiest == 3


# --- access ---------------------------------------------------------------------------------------------------------


def test_an_endpoint_offers_labels_or_what_its_reference_says(endpoint, ledger):
    model = opened(endpoint, ledger)
    assert model.access == Access.LABELS
    for ask in (lambda: model.module, lambda: model.logits({}), lambda: model.probs({})):
        with pytest.raises(AccessError, match="this handle offers labels"):
            ask()
    assert opened(endpoint, ledger, access="probs").access == Access.PROBS
    with pytest.raises(AccessError, match="offers labels, cannot be opened as weights"):
        open_model(ModelRef(ref=endpoint.ref), access=Access.WEIGHTS)
    with pytest.raises(ValueError, match="an endpoint offers labels or probs, not logits"):
        ModelRef(ref=endpoint.ref, access="logits")


def test_a_method_that_needs_weights_is_refused_before_it_starts(endpoint, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a b c\n")
    assert main(["merge", "linear", endpoint.ref, endpoint.ref, "-o", str(tmp_path / "o")]) == 2
    assert "offers labels, and merge linear needs weights" in capsys.readouterr().err
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "lfm: 1\nmodels: {m: {ref: somewhere/model, access: probs}}\n"
        f"steps: {{t: {{tune: full, model: m, data: '{tmp_path / 't.txt'}'}}}}\nout: {tmp_path / 'run'}\n"
    )
    assert main(["run", str(recipe)]) == 2
    assert "m: offers probs, and tune full needs weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ({"ref": "http://host/v1"}, "written http://host/v1#model"),
        ({"ref": "http://host/v1?key=1#m"}, "written http://host/v1#model"),
        ({"ref": "https://me:secret@host/v1#m"}, "holds no password"),
        ({"ref": "http://h/v1#m", "endpoint": {"key": "sk-secret"}}, "must be the name of an environment variable"),
        ({"ref": "http://h/v1#m", "endpoint": {"key": "hf_Secret"}}, "must be the name of an environment variable"),
        ({"ref": "folder", "endpoint": {}}, "`endpoint` goes with"),
        ({"ref": "http://h/v1#m", "module": "a.py:b"}, "leave out `module`"),
    ],
)
def test_a_reference_that_makes_no_sense_is_refused_without_repeating_a_secret(ref, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelRef.model_validate(ref)
    assert "ecret" not in str(caught.value)


# --- the key --------------------------------------------------------------------------------------------------------

SECRET = "sk-never-to-be-seen-0123456789"


def test_the_key_is_sent_and_stands_nowhere(endpoint, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("MY_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    ledger = tmp_path / "ledger.sqlite"
    model = opened(endpoint, ledger, key="MY_KEY", retries=1)
    model.complete(["hello"])
    assert endpoint.asked[0].headers["authorization"] == f"Bearer {SECRET}"
    said = [repr(model), repr(vars(model._Model__backend)), caplog.text]
    endpoint.answer = lambda asked: {"choices": [{"text": f"your key is {asked.headers['authorization']}"}]}
    said += model.complete(["repeat it"])
    complaint = {"error": {"message": f"Incorrect API key provided: {SECRET}"}}
    for fault, kind in (((401, complaint), RequestError), ((500, complaint), LfmError), (SECRET.encode(), LfmError)):
        endpoint.faults = [fault, fault]
        with pytest.raises(kind) as caught:
            model.complete(["again"])
        said += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    assert "Incorrect API key provided: ***" in "".join(said)
    data = tmp_path / "t.tsv"
    data.write_text("0 a\n1 b\n")
    ref = f"{{ref: '{endpoint.ref}', endpoint: {{key: MY_KEY}}}}"
    main(["evaluate", ref, "--accuracy", str(data), "-o", str(tmp_path / "report"), "--ledger", str(ledger)])
    main(["ledger", "--ledger", str(ledger), "--json"])
    main(["ledger", "export", str(tmp_path / "all.jsonl"), "--ledger", str(ledger)])
    said += [*capsys.readouterr(), caplog.text]
    assert SECRET not in "".join(said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_key_that_is_named_and_missing_stops_the_run_before_it_starts(endpoint, tmp_path, capsys):
    with pytest.raises(RequestError, match="environment variable NO_SUCH_KEY, which is not set"):
        opened(endpoint, tmp_path / "l", key="NO_SUCH_KEY")
    (tmp_path / "t.tsv").write_text("0 a\n1 b\n")
    ref = f"{{ref: '{endpoint.ref}', endpoint: {{key: NO_SUCH_KEY}}}}"
    assert main(["evaluate", ref, "--accuracy", str(tmp_path / "t.tsv")]) == 2
    assert "NO_SUCH_KEY, which is not set" in capsys.readouterr().err
    assert endpoint.asked == []


def test_the_default_key_is_used_where_it_is_set_and_not_missed_where_not(endpoint, ledger, monkeypatch):
    opened(endpoint, ledger).complete(["a"])
    monkeypatch.setenv("OPENAI_API_KEY", "k1")
    opened(endpoint, ledger).complete(["b"])
    opened(endpoint, ledger, key="").complete(["c"])
    assert [asked.headers.get("authorization") for asked in endpoint.asked] == [None, "Bearer k1", None]
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(RequestError, match="characters that a key cannot have") as caught:
        opened(endpoint, ledger)
    assert "lines" not in str(caught.value)


# --- an endpoint that misbehaves ------------------------------------------------------------------------------------

NO_TEXT = b'{"choices": [{"index": 0}]}'
FAULTS = {
    "error": (500, {"error": {"message": "overloaded"}}),
    "rate limit": (429, {"error": "slow down"}, {"Retry-After": "0.05"}),
    "hangs": 0.6,
    "cut": "cut",
    "drips": "drip",
    "reset": "reset",
    "no JSON": b"<html>busy</html>",
    "a list": b"[1]",
    "half a JSON": b'{"choices": [',
    "no choices": b"{}",
    "no text": NO_TEXT,
    "an error as an answer": b'{"error": {"message": "worker died"}}',
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_fails_is_asked_again_and_answered_once(endpoint, ledger, kind):
    endpoint.faults = [FAULTS[kind]] * 2
    assert opened(endpoint, ledger).complete(["a"]) == ["a!"]
    assert len(endpoint.asked) == 3
    assert len({asked.headers["idempotency-key"] for asked in endpoint.asked}) == 1
    [usage] = open_ledger(ledger).usage()
    assert (usage.requests, usage.sends, usage.unanswered) == (1, 3, 0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("error", "status 500: overloaded"),
        ("rate limit", "status 429: slow down"),
        ("hangs", "no answer within 0.3 s"),
        ("drips", "no whole answer within 0.3 s"),
        ("cut", "the answer broke off"),
        ("no JSON", "answered no JSON: '<html>busy</html>'"),
        ("no text", "lacks what was asked for"),
        ("an error as an answer", "answered an error: worker died"),
    ],
)
def test_an_endpoint_that_stays_broken_is_named_with_what_is_kept(endpoint, ledger, kind, said):
    model = opened(endpoint, ledger, concurrency=1, retries=1)
    good = endpoint.answer

    def break_after_two(asked):
        if sum(endpoint.answered.values()) == 1:
            endpoint.faults = [FAULTS[kind]] * 2
        return good(asked)

    endpoint.answer = break_after_two
    with pytest.raises(LfmError) as caught:
        model.complete(list("abcd"))
    message = str(caught.value)
    assert message.startswith(f"{endpoint.ref}: ")
    assert said in message
    assert "(asked 2 times); 2 of 4 were answered, and their answers are kept in" in message
    assert "Run the same again" in message
    endpoint.answer = good
    endpoint.faults = []
    assert opened(endpoint, ledger).complete(list("abcd")) == ["a!", "b!", "c!", "d!"]
    assert set(endpoint.answered.values()) == {1}


def test_nobody_there_is_said_after_a_few_tries(ledger):
    ref = ModelRef.model_validate(
        {"ref": "http://127.0.0.1:9/v1#m", "task": "causal-lm", "endpoint": {**QUICK, "retries": 1}}
    )
    with pytest.raises(LfmError, match=r"http://127.0.0.1:9/v1#m: no connection \(.*\) \(asked 2 times\); 0 of 1"):
        open_model(ref, budget=Budget(ledger=ledger)).complete(["a"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301])
def test_a_refusal_is_shown_and_not_repeated(endpoint, ledger, status):
    endpoint.faults = [(status, {"error": {"message": "not you"}})] * 2
    with pytest.raises(RequestError, match=f"status {status}: not you"):
        opened(endpoint, ledger, api="completions").complete(["a"])
    assert len(endpoint.asked) == 1
    assert open_ledger(ledger).usage() == []
    assert open_ledger(ledger).spent("run") == (0, 0)


def test_all_wait_when_the_endpoint_asks_to(endpoint, ledger):
    endpoint.faults = [(429, {}, {"Retry-After": "0.3"})]
    started = time.monotonic()
    opened(endpoint, ledger, concurrency=1).complete(["a", "b"])
    assert time.monotonic() - started >= 0.3


def test_a_mixture_of_all_faults_loses_nothing_and_pays_nothing_twice(endpoint, ledger):
    endpoint.faults = [fault for fault in FAULTS.values() for _ in range(2)]
    prompts = [f"prompt {i}" for i in range(30)]
    assert opened(endpoint, ledger, retries=30).complete(prompts) == [f"{prompt}!" for prompt in prompts]
    assert endpoint.answered == Counter(prompts)


# --- the ledger behind it -------------------------------------------------------------------------------------------


def test_a_changed_answer_changes_nothing(endpoint, ledger):
    assert opened(endpoint, ledger).complete(["a"]) == ["a!"]
    endpoint.answer = lambda asked: {"choices": [{"text": "something else"}]}
    assert opened(endpoint, ledger, run="another").complete(["a"]) == ["a!"]
    assert len(endpoint.asked) == 1


def test_samples_of_one_prompt_are_different_requests(endpoint, ledger):
    count = iter(range(100))
    endpoint.answer = lambda asked: {"choices": [{"text": str(next(count))}]}
    model = opened(endpoint, ledger, concurrency=1)
    first = [made.text for made in model.write(["a", "a", "b", "a"], HOT)]
    second = [made.text for made in model.write(["a", "b"], HOT)]
    assert first + second == ["0", "1", "2", "3", "4", "5"]
    again = opened(endpoint, ledger)
    assert [made.text for made in again.write(["a", "a", "b", "a"], HOT)] == first
    assert [made.text for made in again.write(["a", "b"], HOT)] == second
    seeded = HOT.model_copy(update={"seed": 3})
    one, two, three = (made.text for made in again.write(["a", "a", "b"], seeded))
    assert [made.text for made in again.write(["a", "a", "b"], seeded)] == [one, two, three]
    assert len({one, two, three}) == 3
    greedy = again.complete(["a", "a"])
    assert greedy[0] == greedy[1]


def test_a_budget_of_queries_is_never_exceeded(endpoint, ledger):
    endpoint.pause = 0.005
    model = opened(endpoint, ledger, budget={"max_queries": 10}, concurrency=8)
    with pytest.raises(BudgetError, match=r"budget of 10 requests is used up; \d+ of 40 were answered") as caught:
        model.complete([str(i) for i in range(40)])
    assert "Allow more" in str(caught.value)
    assert sum(endpoint.answered.values()) == len(endpoint.asked) == 10
    with pytest.raises(BudgetError):  # it is still used up in another process, or handle
        opened(endpoint, ledger, budget={"max_queries": 10}).complete(["new"])
    done = list(endpoint.answered)
    assert opened(endpoint, ledger, budget={"max_queries": 10}).complete(done) == [f"{text}!" for text in done]
    opened(endpoint, ledger, budget={"max_queries": 40}).complete([str(i) for i in range(40)])
    assert set(endpoint.answered.values()) == {1}


def test_a_budget_of_money_is_never_exceeded(endpoint, ledger):
    prices = {"price_in": 1e6, "price_out": 1e6}  # one a token
    budget = {"max_cost": 300.0}
    model = opened(endpoint, ledger, budget=budget, **prices)
    with pytest.raises(BudgetError, match=r"budget of 300 is used up: \d+ are spent, and the next request may cost"):
        model.write([f"{i:05}" for i in range(200)], Sampling(max_new_tokens=20))
    paid = sum(11 for _ in endpoint.asked)
    assert 200 < paid <= 300
    [usage] = open_ledger(ledger).usage()
    assert usage.cost == pytest.approx(paid)
    assert open_ledger(ledger).spent("run") == (len(endpoint.asked), pytest.approx(paid))
    with pytest.raises(RequestError, match="its prices are not known"):
        opened(endpoint, ledger, budget=budget)


def test_an_answer_that_does_not_tell_its_tokens_costs_the_most_it_can(endpoint, ledger):
    endpoint.answer = lambda asked: {"choices": [{"text": "x"}]}
    opened(endpoint, ledger, price_out=1e6).write(["p"], Sampling(max_new_tokens=9))
    [usage] = open_ledger(ledger).usage()
    assert usage.cost == 9


SCRIPT = """
import sys
from lfm.models.ledger import Budget
from lfm.models.open import open_model
from lfm.models.ref import ModelRef
from pathlib import Path
url, ledger = sys.argv[1:]
ref = ModelRef.model_validate({"ref": url, "task": "causal-lm", "endpoint": {"concurrency": 4, "backoff": 0.01}})
model = open_model(ref, budget=Budget(run="killed", max_queries=40, ledger=Path(ledger)))
print(len(model.complete([f"prompt {i}" for i in range(40)])))
"""


def test_a_killed_run_goes_on_and_asks_nothing_again_that_was_answered(endpoint, ledger):
    endpoint.pause = 0.05
    command = [sys.executable, "-c", SCRIPT, endpoint.ref, str(ledger)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while sum(endpoint.answered.values()) < 12:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.1)
    before = Counter(endpoint.answered)
    known = {request["body"]["prompt"] for request in open_ledger(ledger).requests() if request["answer"] is not None}
    assert 8 <= len(known) <= len(before) < 40
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "40\n"
    twice = {
        prompt for prompt, count in Counter(prompt_of(asked.body) for asked in endpoint.asked).items() if count > 1
    }
    assert len(twice) <= 4  # what was under way
    assert not twice & known
    keys = {
        prompt: {a.headers["idempotency-key"] for a in endpoint.asked if prompt_of(a.body) == prompt}
        for prompt in twice
    }
    assert all(len(found) == 1 for found in keys.values())
    [usage] = open_ledger(ledger).usage()
    assert usage.requests == 40
    assert len(twice) <= usage.interrupted <= 4
    assert open_ledger(ledger).spent("killed")[0] == 40


def test_two_processes_that_ask_the_same_send_it_once(endpoint, ledger):
    endpoint.pause = 0.05
    command = [sys.executable, "-c", SCRIPT, endpoint.ref, str(ledger)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(endpoint.answered) == 40
    assert set(endpoint.answered.values()) == {1}


def test_two_threads_that_ask_the_same_send_it_once(endpoint, ledger):
    endpoint.pause = 0.1
    model = opened(endpoint, ledger)
    threads = [threading.Thread(target=lambda: model.complete(["a", "a"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(endpoint.asked) == 1
    [usage] = open_ledger(ledger).usage()
    assert (usage.requests, usage.hits) == (1, 7)


# --- classifiers of `lfm serve` -------------------------------------------------------------------------------------


def classify(asked):
    """Take a text for its first letter, an image for its mean."""
    items = asked.body.get("texts") or asked.body["images"]
    if "images" in asked.body:
        from PIL import Image

        opened = [np.asarray(Image.open(io.BytesIO(base64.b64decode(item)))) for item in items]
        shares = [float(image.mean()) / 255 for image in opened]
    else:
        shares = [0.9 if item.startswith("b") else 0.2 for item in items]
    return {"classes": ["a", "b"], "probabilities": [[1 - share, share] for share in shares]}


@pytest.fixture
def classifier(endpoint):
    endpoint.about = {"task": "text-classification", "classes": ["a", "b"]}
    endpoint.answer = classify
    return endpoint


def test_a_text_classifier_is_asked_example_by_example(classifier, ledger):
    model = opened(classifier, ledger, task=None, access="probs")
    assert (model.task, model.encoder.classes) == ("text-classification", {"a": 0, "b": 1})
    examples = model.encoder.encode(Rows({"text": ["bad", "ad", "bed"], "label": ["b", "a", "a"]}, "here"), 8)
    batch = examples.batch([0, 1, 2])
    assert batch["labels"].tolist() == [1, 0, 0]
    torch.testing.assert_close(model.probs(batch), torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.1, 0.9]]))
    assert model.labels(batch).tolist() == [1, 0, 1]
    assert {asked.path for asked in classifier.asked} == {"/predict"}
    assert len(classifier.asked) == 3
    with pytest.raises(RequestError, match="no class called c"):
        model.encoder.encode(Rows({"text": ["x"], "label": ["c"]}, "here"), 8)
    with pytest.raises(RequestError, match="takes the columns text and label"):
        model.encoder.encode(Rows({"image": np.zeros((1, 2, 2), np.uint8)}, "here"), 8)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 5, 7, 3)])
def test_images_arrive_pixel_by_pixel_and_are_kept_by_digest(classifier, ledger, shape):
    from PIL import Image

    classifier.about = {"task": "image-classification", "classes": {"a": 0, "b": 1}}
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    model = opened(classifier, ledger, task=None, access="probs", concurrency=1)
    model.probs(model.encoder.encode(Rows({"image": pixels}, "here"), 8, labelled=False).batch([0, 1]))
    for asked, image in zip(classifier.asked, pixels, strict=True):
        sent = Image.open(io.BytesIO(base64.b64decode(asked.body["images"][0])))
        assert np.array_equal(np.asarray(sent), image)
    kept = [request["body"]["images"] for request in open_ledger(ledger).requests()]
    assert all(len(images) == 1 and images[0].startswith("sha256:") for images in kept)


def test_a_classifier_that_gives_labels_has_an_accuracy_and_no_more(classifier, tmp_path, capsys):
    classifier.answer = lambda asked: {"classes": ["a", "b"], "labels": [asked.body["texts"][0][0]]}
    data = tmp_path / "t.csv"
    data.write_text("text,label\nbad,b\nad,a\nace,b\n")
    assert main(["evaluate", classifier.ref, "--accuracy", str(data), "--json", "--ledger", str(tmp_path / "l")]) == 0
    [table] = json.loads(capsys.readouterr().out)
    assert table["rows"]["model"]["accuracy t %"]["value"] == pytest.approx(200 / 3)
    model = opened(classifier, tmp_path / "l", task=None, access="probs")
    with pytest.raises(RequestError, match="gives labels and no probabilities"):
        model.probs({"texts": ["bad"]})


@pytest.mark.parametrize("row", [[0.5, 0.6], [0.5], [float("nan"), 0.5], ["x", 0.5], [-0.5, 1.5]])
def test_probabilities_that_are_none_are_not_believed(classifier, ledger, row):
    classifier.answer = lambda asked: {"classes": ["a", "b"], "probabilities": [row]}
    with pytest.raises(LfmError, match="asked 2 times"):
        opened(classifier, ledger, task=None, access="probs", retries=1).probs({"texts": ["x"]})


def test_classes_that_change_their_order_are_followed_and_others_refused(classifier, ledger):
    model = opened(classifier, ledger, task=None, access="probs")
    classifier.answer = lambda asked: {"classes": ["b", "a"], "probabilities": [[0.25, 0.75]]}
    torch.testing.assert_close(model.probs({"texts": ["x"]}), torch.tensor([[0.75, 0.25]]))
    classifier.answer = lambda asked: {"classes": ["a", "c"], "probabilities": [[0.25, 0.75]]}
    with pytest.raises(RequestError, match="the class 'c', which it did not name"):
        model.labels({"texts": ["y"]})


def test_an_endpoint_that_names_no_classes_is_no_classifier(endpoint, ledger):
    with pytest.raises(RequestError, match="does not say which classes"):
        opened(endpoint, ledger, task="text-classification")
    assert opened(endpoint, ledger, task=None).task == "causal-lm"


# --- recipes --------------------------------------------------------------------------------------------------------


def test_what_decides_the_answers_identifies_an_endpoint_and_its_key_and_price_do_not(endpoint):
    from lfm.recipe.catalogue import Catalogue
    from lfm.recipe.schema import Recipe
    from lfm.recipe.step import Settings

    def identity(**changes):
        ref = {"ref": "http://h/v1#m", **changes}
        return Catalogue(Recipe({}, {}, None), Settings(), None).identity(ModelRef.model_validate(ref))

    plain = identity()
    assert identity(endpoint={"key": "OTHER", "price_in": 3, "timeout": 1}) == plain
    others = [identity(endpoint={"api": "chat"}), identity(access="probs"), identity(ref="http://h/v1#n")]
    assert len({json.dumps(found, sort_keys=True) for found in [plain, *others]}) == 4
    assert all(found["digest"] != plain["digest"] for found in others)


def test_a_handle_of_an_endpoint_by_python(endpoint, ledger):
    model = lfm.load(endpoint.ref, budget=lfm.Budget(max_queries=1, ledger=ledger))
    assert model.complete(["a"]) == ["a!"]
    with pytest.raises(lfm.BudgetError):
        model.complete(["b"])
    assert repr(model) == f"Model({endpoint.ref!r}, causal-lm, access=labels)"


def test_a_local_model_is_a_black_box_on_request(tmp_path):
    from tests.tiny import write_llama

    folder = str(write_llama(tmp_path / "m"))
    assert lfm.load(folder).access == Access.WEIGHTS
    box = lfm.load({"ref": folder, "access": "probs"})
    assert box.access == Access.PROBS
    with pytest.raises(AccessError, match="its module cannot be had"):
        _ = box.module
    with pytest.raises(AccessError, match="offers probs, cannot be opened as weights"):
        open_model(ModelRef(ref=folder, access="probs"), access=Access.WEIGHTS)
