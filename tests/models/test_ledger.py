"""The ledger: one send for one question, budgets that hold, files that are never spoilt."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
import threading
import time
from collections import Counter

import pytest

from lfm.cli import main
from lfm.errors import BudgetError, RequestError
from lfm.models import ledger as module
from lfm.models._claims import alive, myself
from lfm.models.ledger import Budget, Question, Refused, Sent, open_ledger

HOST = "http://host/v1#model"


@pytest.fixture
def ledger(tmp_path):
    found = open_ledger(tmp_path / "ledger.sqlite")
    yield found
    found.close()


def question(text="q", endpoint=HOST, repeat=0, reserve=0.0):
    return Question(endpoint, "/completions", {"prompt": text, "model": "m"}, repeat, reserve)


def saying(answer="{}", **paid):
    def send(claim):
        claim.sends += 1
        return Sent(answer, **paid)

    return send


def never(claim):
    raise AssertionError("sent")


# --- asking ---------------------------------------------------------------------------------------------------------


def test_a_question_is_its_endpoint_path_body_and_repeat():
    assert question().key == Question(HOST, "/completions", {"model": "m", "prompt": "q"}).key
    others = [
        *(question("r"), question(repeat=1), question(endpoint="http://other/v1#model")),
        Question(HOST, "/chat/completions", question().body),
    ]
    assert len({found.key for found in [question(), *others]}) == 5
    assert question(reserve=3).key == question().key


def test_what_was_answered_is_known_and_the_first_answer_counts(ledger):
    assert ledger.answer(question(), Budget("a"), saying('{"n": 1}')) == ('{"n": 1}', False)
    assert ledger.answer(question(), Budget("b"), never) == ('{"n": 1}', True)
    assert (ledger.spent("a"), ledger.spent("b")) == ((1, 0.0), (0, 0.0))
    [usage] = ledger.usage()
    assert (usage.requests, usage.hits, usage.sends) == (1, 1, 1)


def test_what_failed_is_not_counted_and_stays_unanswered(ledger):
    def fail(claim):
        claim.sends += 3
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ledger.answer(question(reserve=2.0), Budget("a"), fail)
    assert ledger.spent("a") == (0, 0.0)
    [usage] = ledger.usage()
    assert (usage.requests, usage.unanswered, usage.sends, usage.interrupted, usage.cost) == (0, 1, 3, 0, 0.0)
    ledger.answer(question(), Budget("a"), saying())
    [usage] = ledger.usage()
    assert (usage.requests, usage.unanswered, usage.sends) == (1, 0, 4)


def test_what_was_refused_leaves_no_trace(ledger):
    def refuse(claim):
        raise Refused("never")

    with pytest.raises(Refused):
        ledger.answer(question(), Budget("a"), refuse)
    assert ledger.usage() == []
    assert ledger.spent("a") == (0, 0.0)


def test_an_interruption_is_told_and_the_next_send_carries_the_same_key(ledger):
    keys = []

    def interrupt(claim):
        claim.sends += 1
        keys.append(claim.idempotency)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.answer(question(), Budget("a"), interrupt)

    def send(claim):
        keys.append(claim.idempotency)
        return Sent("{}")

    ledger.answer(question(), Budget("a"), send)
    assert keys[0] == keys[1]
    assert ledger.usage()[0].interrupted == 1


def test_many_callers_of_few_questions_send_each_once(ledger):
    sends: Counter[str] = Counter()

    def work(start):
        for step in range(40):
            text = f"{(start + step) % 20}"

            def send(claim, text=text):
                sends[text] += 1
                time.sleep(0.001)
                return Sent(json.dumps(text))

            assert json.loads(ledger.answer(question(text), Budget("a"), send)[0]) == text

    in_threads(work, 8)
    assert sends == Counter({f"{i}": 1 for i in range(20)})
    assert ledger.spent("a") == (20, 0.0)


def in_threads(work, count):
    failures = []

    def guarded(index):
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# --- budgets --------------------------------------------------------------------------------------------------------


def test_eight_threads_cannot_overshoot_a_budget_of_queries(ledger):
    sent, refused = [], []

    def work(index):
        for step in range(10):
            try:
                ledger.answer(
                    question(f"{index} {step}"), Budget("a", max_queries=13), lambda c: sent.append(1) or Sent("1")
                )
            except BudgetError:
                refused.append(1)

    in_threads(work, 8)
    assert (len(sent), len(refused)) == (13, 67)


def test_eight_threads_cannot_overshoot_a_budget_of_money(ledger):
    spent = []

    def work(index):
        for step in range(10):

            def send(claim):
                spent.append(0.5)
                time.sleep(0.001)
                return Sent("1", 1, 1, 0.5)

            with contextlib.suppress(BudgetError):
                ledger.answer(question(f"{index} {step}", reserve=2.0), Budget("a", max_cost=10.0), send)

    in_threads(work, 8)
    assert 8.0 < sum(spent) <= 10.0
    assert ledger.spent("a") == (len(spent), pytest.approx(sum(spent)))


def test_one_that_fails_gives_its_query_to_one_that_waits(ledger):
    inside, go = threading.Event(), threading.Event()

    def fail(claim):
        inside.set()
        go.wait()
        raise ValueError

    def first():
        with pytest.raises(ValueError):
            ledger.answer(question("x"), Budget("a", max_queries=1), fail)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    threading.Timer(0.1, go.set).start()
    assert ledger.answer(question("y"), Budget("a", max_queries=1), saying("1"))[0] == "1"
    thread.join()
    with pytest.raises(BudgetError, match="the budget of 1 request is used up"):
        ledger.answer(question("z"), Budget("a", max_queries=1), never)


def test_a_budget_is_that_of_a_run_and_a_later_one_may_be_larger(ledger):
    for run in ("a", "b"):
        ledger.answer(question(run), Budget(run, max_queries=1), saying())
        with pytest.raises(BudgetError):
            ledger.answer(question(f"{run} more"), Budget(run, max_queries=1), never)
    ledger.answer(question("a more"), Budget("a", max_queries=2), saying())
    with pytest.raises(BudgetError):
        ledger.answer(question("nothing"), Budget("c", max_queries=0), never)
    with pytest.raises(
        BudgetError, match=r"budget of 1 is used up: 0 are spent, and the next request may cost up to 2"
    ):
        ledger.answer(question("dear", reserve=2.0), Budget("d", max_cost=1.0), never)


# --- processes that die ---------------------------------------------------------------------------------------------


def die_in_the_middle(path, text):
    def send(claim):
        claim.sends += 1
        os._exit(9)

    open_ledger(path).answer(question(text, reserve=1.0), Budget("a", max_queries=1), send)


def test_the_question_of_a_dead_process_is_taken_over_and_counted_once(ledger):
    process = multiprocessing.get_context("fork").Process(target=die_in_the_middle, args=(ledger.path, "q"))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert ledger.spent("a") == (1, 1.0)  # it may have been answered
    with pytest.raises(BudgetError):
        ledger.answer(question("another"), Budget("a", max_queries=1), never)
    ledger.answer(question(reserve=1.0), Budget("a", max_queries=1), saying("1", tokens_in=1, tokens_out=1, cost=0.25))
    assert ledger.spent("a") == (1, 0.25)
    assert ledger.usage()[0].interrupted == 1


def test_a_takeover_by_another_run_moves_the_count(ledger):
    process = multiprocessing.get_context("fork").Process(target=die_in_the_middle, args=(ledger.path, "q"))
    process.start()
    process.join()
    ledger.answer(question(reserve=3.0), Budget("b"), saying())
    assert (ledger.spent("a"), ledger.spent("b")) == ((0, 0.0), (1, 3.0))


def test_who_lives_is_known_by_more_than_a_number(monkeypatch):
    host, number, started = myself().rsplit(" ", 2)
    assert alive(myself(), None)
    assert not alive(f"{host} {number} {started}1", None)  # the number was used before
    assert not alive(f"{host} 4194305 1", None)
    later = time.time() + 60
    assert alive(f"elsewhere {number} 1", later)
    assert not alive(f"elsewhere {number} 1", time.time() - 1)


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_something_else_is_refused_and_left_as_it_is(tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    newer = tmp_path / "newer.sqlite"
    open_ledger(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    module._open.clear()
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, and no database\n" * 50)
    folder = tmp_path / "folder"
    folder.mkdir()
    cases = {other: "database of another program", newer: "a ledger of version 99", text: "not a ledger, or damaged"}
    for path, message in cases.items():
        before = path.read_bytes()
        with pytest.raises(RequestError, match=message):
            open_ledger(path)
        assert path.read_bytes() == before
    with pytest.raises(RequestError, match="cannot be opened"):
        open_ledger(folder)


def test_a_damaged_ledger_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "ledger.sqlite"
    found = open_ledger(path)
    for index in range(200):
        found.answer(question(f"{index} {'x' * 500}"), Budget("a"), saying('"' + "y" * 500 + '"'))
    found.close()
    module._open.clear()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    before = path.read_bytes()
    with pytest.raises(RequestError, match=r"damaged \(.*\); it was left as it is\. Restore it .* --ledger"):
        list(open_ledger(path).requests())
    open_ledger(path).close()
    module._open.clear()
    assert path.read_bytes() == before


def test_a_ledger_is_readable_by_its_owner_alone(ledger):
    assert ledger.path.stat().st_mode & 0o077 == 0


def test_eight_processes_make_one_ledger(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask_ten, args=(tmp_path / "new.sqlite", index)) for index in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = open_ledger(tmp_path / "new.sqlite")
    assert found.spent("a") == (10, 0.0)
    assert found.usage()[0].requests == 10
    found.close()


def ask_ten(path, index):
    for step in range(10):
        open_ledger(path).answer(question(f"{(index + step) % 10}"), Budget("a"), saying())


def test_eight_threads_look_up_what_is_known(ledger):
    """A small `benchmarks/ledger.py`, which also takes the time."""
    for index in range(50):
        ledger.answer(question(f"{index}"), Budget("a"), saying(f"{index}"))

    def work(start):
        for step in range(200):
            index = (start * 7 + step) % 50
            assert ledger.answer(question(f"{index}"), Budget("a", max_queries=0), never) == (f"{index}", True)

    in_threads(work, 8)
    assert ledger.usage()[0].hits == 1600


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(ledger):
    for index in range(3):
        ledger.answer(question(f"{index}"), Budget("a"), saying('{"a": 1}', tokens_in=10, tokens_out=5, cost=0.5))
    ledger.answer(question("0"), Budget("a"), never)
    ledger.answer(question("x", "http://host/v1#other"), Budget("a"), saying())
    ledger.answer(question("x", "http://host/v10#model"), Budget("a"), saying())
    ledger.learn(HOST, {"chat_only": True})
    return ledger


def test_the_command_lists_endpoints(filled, capsys):
    for arguments in (["ledger", "--json"], ["ledger", "list", "--json"]):
        assert main([*arguments, "--ledger", str(filled.path)]) == 0
        told = json.loads(capsys.readouterr().out)["endpoints"]
        assert [found["endpoint"] for found in told] == [HOST, "http://host/v1#other", "http://host/v10#model"]
        expected = {"requests": 3, "hits": 1, "tokens_in": 30, "tokens_out": 15, "cost": 1.5, "unanswered": 0}
        assert {key: told[0][key] for key in expected} == expected
    assert main(["ledger", "--ledger", str(filled.path)]) == 0
    assert HOST in capsys.readouterr().out


def test_the_command_exports_and_shows(filled, tmp_path, capsys):
    file = tmp_path / "all.jsonl"
    assert main(["ledger", "export", str(file), "--ledger", str(filled.path)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["body"]["prompt"] for row in rows] == ["0", "1", "2", "x", "x"]
    assert rows[0]["answer"] == {"a": 1}
    assert main(["ledger", "export", str(file), "--ledger", str(filled.path)]) == 2
    assert "exists already" in capsys.readouterr().err
    one = tmp_path / "one.jsonl"
    assert main(["ledger", "export", str(one), "--endpoint", HOST, "--ledger", str(filled.path)]) == 0
    assert len(one.read_text().splitlines()) == 3
    capsys.readouterr()
    assert main(["ledger", "show", rows[1]["key"][:12], "--json", "--ledger", str(filled.path)]) == 0
    assert json.loads(capsys.readouterr().out)["body"]["prompt"] == "1"
    assert main(["ledger", "show", "zz", "--ledger", str(filled.path)]) == 2


def test_the_command_forgets_one_endpoint_when_it_is_sure(filled, capsys):
    forget = ["ledger", "forget", "--ledger", str(filled.path), "--endpoint"]
    assert main([*forget, "http://host/v1"]) == 2
    assert "4 requests would be removed for good; pass --yes" in capsys.readouterr().err
    assert main([*forget, "http://host/v1#modle", "--yes"]) == 2
    assert "did you mean 'http://host/v1#model'" in capsys.readouterr().err
    assert main([*forget, HOST, "--yes"]) == 0
    assert "3 requests removed" in capsys.readouterr().out
    assert filled.facts(HOST) == {}
    assert [usage.endpoint for usage in filled.usage()] == ["http://host/v1#other", "http://host/v10#model"]
    assert main([*forget, "http://host/v1", "--yes"]) == 0
    assert [usage.endpoint for usage in filled.usage()] == ["http://host/v10#model"]
    assert filled.spent("a")[0] == 5  # what was paid stays paid


def test_looking_at_a_ledger_does_not_make_one(tmp_path, capsys):
    assert main(["ledger", "--ledger", str(tmp_path / "none")]) == 2
    assert "no ledger there" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
