"""How many cached look-ups a second the ledger of endpoints gives to threads that ask at once.

    .venv/bin/python benchmarks/ledger.py
    .venv/bin/python benchmarks/ledger.py --requests 20000 --threads 8 --seconds 5

A ledger is filled with requests and answers of the size of a short chat, then threads ask for random ones of them
through `Ledger.answer`, as an endpoint's handle does. It also tells how fast new requests are claimed and kept, with an
endpoint that answers at once.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path

from lfm.models.ledger import Budget, Claim, Question, Sent, open_ledger

ANSWER = json.dumps({"choices": [{"message": {"content": "word " * 100}}], "usage": {"prompt_tokens": 80}})


def question(index: int) -> Question:
    messages = [{"role": "user", "content": f"{index} {'question ' * 40}"}]
    return Question("http://host/v1#model", "/chat/completions", {"model": "model", "messages": messages})


def answered(claim: Claim) -> Sent:
    return Sent(ANSWER, 80, 100, 0.001)


def never(claim: Claim) -> Sent:
    raise AssertionError("a question that was answered was sent")


def measure(folder: Path, requests: int, threads: int, seconds: float) -> dict[str, float]:
    """Return new requests and cached look-ups a second."""
    ledger = open_ledger(folder / "ledger.sqlite")
    budget = Budget("benchmark", max_queries=requests)
    started = time.perf_counter()

    def fill(thread: int) -> None:
        for index in range(thread, requests, threads):
            ledger.answer(question(index), budget, answered)

    in_threads(fill, threads)
    filled = time.perf_counter() - started
    counts = [0] * threads
    end = time.perf_counter() + seconds

    def look_up(thread: int) -> None:
        chance = random.Random(thread)
        while time.perf_counter() < end:
            ledger.answer(question(chance.randrange(requests)), budget, never)
            counts[thread] += 1

    in_threads(look_up, threads)
    ledger.close()
    return {"new requests / s": requests / filled, "cached look-ups / s": sum(counts) / seconds}


def in_threads(work, count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    how = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, value in measure(Path(folder), how.requests, how.threads, how.seconds).items():
            print(f"{name:>20}  {value:>10,.0f}")


if __name__ == "__main__":
    main()
