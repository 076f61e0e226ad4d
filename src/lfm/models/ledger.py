"""The ledger of endpoints: every request that was sent, its answer, what it cost. One SQLite file.

    answer, known = open_ledger(path).answer(question, budget, send)

A question that was answered before is answered from the file. Otherwise it is claimed, counted and reserved in one
transaction, so that callers side by side send one request and cannot spend more than there is; then sent; then its
answer is kept. A claim belongs to a process: when that dies, the next who asks takes the question over, which is the
one case in which a request may reach the endpoint twice. Both times it carries the same idempotency key.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lfm.checkpoint import cache_folder
from lfm.errors import BudgetError, LfmError, RequestError, plural
from lfm.models._claims import alive, myself
from lfm.models._ledger_file import connect, trouble

WAIT = 0.05  # seconds between looks at what other processes do
FLUSH = 500  # hits that are counted in memory before they are written


@dataclass(frozen=True)
class Budget:
    """What a run may ask of endpoints, and the ledger that remembers it. Without a name, each handle is its own run."""

    run: str = ""
    max_queries: int | None = None
    max_cost: float | None = None
    ledger: Path | None = None  # the ledger in lfm's cache folder where none is named


@dataclass(frozen=True)
class Question:
    """One request to an endpoint; `body` is what decides the answer, and `repeat` tells samples of one body apart."""

    endpoint: str
    path: str
    body: Mapping[str, Any]
    repeat: int = 0
    reserve: float = 0.0  # the most that it can cost

    @cached_property
    def text(self) -> str:
        return json.dumps(self.body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def key(self) -> str:
        content = json.dumps([self.endpoint, self.path, self.text, self.repeat]).encode()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Sent:
    """What came back: the answer as JSON text, and what it took. Without `tokens`, the reserve is what it cost."""

    answer: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost: float | None = None


@dataclass
class Claim:
    """A question that this process may send; `sends` is counted by who does."""

    key: str
    idempotency: str
    sends: int = 0


@dataclass
class Usage:
    """What the ledger knows of one endpoint."""

    endpoint: str
    requests: int = 0  # that were answered
    hits: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    unanswered: int = 0
    sends: int = 0
    interrupted: int = 0


class Refused(RequestError):
    """The endpoint will not answer this question, however often it is asked: nothing of it is kept."""


@dataclass
class Ledger:
    """One ledger file; any number of threads and processes may use it at a time."""

    path: Path
    _lock: threading.Condition = field(default_factory=threading.Condition, repr=False)
    _hits: Counter[str] = field(default_factory=Counter, repr=False)
    _connection: sqlite3.Connection | None = field(default=None, repr=False)
    _process: int = field(default=0, repr=False)

    # --- asking -----------------------------------------------------------------------------------------------------

    def look_up(self, key: str) -> str | None:
        """Return the answer to a question that was answered before."""
        with self._lock:
            row = self._one("SELECT answer FROM requests WHERE key = ?", key)
            if row is None or row[0] is None:
                return None
            self._hits[key] += 1
            if self._hits.total() >= FLUSH:
                self.flush()
            return str(row[0])

    def answer(
        self, question: Question, budget: Budget, send: Callable[[Claim], Sent], seconds: float = 3600.0
    ) -> tuple[str, bool]:
        """Return a question's answer, and whether it was known; `send` asks the endpoint, in `seconds` at most.

        Whatever `send` raises is raised here, and the question stays unanswered. Raises BudgetError, before anything
        is sent, where the run has no query or money left.
        """
        claim = self._claim(question, budget, seconds)
        if isinstance(claim, str):
            return claim, True
        try:
            sent = send(claim)
        except BaseException as error:
            self._release(claim, budget, error)
            raise
        return self._settle(claim, budget, sent), False

    def _claim(self, question: Question, budget: Budget, seconds: float) -> Claim | str:
        """Return the right to send a question, or its answer; wait while somebody else has it under way."""
        while True:
            known = self.look_up(question.key)
            if known is not None:
                return known
            with self._lock:
                with self._transaction():
                    claim = self._try(question, budget, seconds)
                if claim is not None:
                    return claim
                self._lock.wait(WAIT)

    def _try(self, question: Question, budget: Budget, seconds: float) -> Claim | None:
        """Claim a question if it is free and paid for; None where that may change."""
        row = self._one("SELECT answer, claim, until, idempotency, run, cost FROM requests WHERE key = ?", question.key)
        if row is not None and (row[0] is not None or (row[1] is not None and alive(row[1], row[2]))):
            return None
        counted = row is not None and row[1] is not None  # by a process that died: its query and reserve stay
        if not counted or row[4] != budget.run:
            if not self._affordable(budget, question.reserve):
                return None
            if counted:
                self._count(row[4], -1, -row[5])
            self._count(budget.run, 1, question.reserve)
        elif row[5] != question.reserve:
            self._count(budget.run, 0, question.reserve - row[5])
        idempotency = row[3] if row is not None else f"lfm-{uuid.uuid4().hex}"
        if row is None:
            self._do(
                "INSERT INTO requests (key, endpoint, path, body, repeat, idempotency, run, asked)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                *(question.key, question.endpoint, question.path, question.text, question.repeat, idempotency),
                *(budget.run, time.time()),
            )
        self._do(
            "UPDATE requests SET claim = ?, until = ?, run = ?, cost = ?, interrupted = interrupted + ? WHERE key = ?",
            *(myself(), time.time() + seconds, budget.run, question.reserve, int(counted), question.key),
        )
        return Claim(question.key, idempotency)

    def _affordable(self, budget: Budget, reserve: float) -> bool:
        """Whether a run can take one more request. False while that is open; raises BudgetError when it cannot."""
        queries, cost = self.spent(budget.run)
        few = budget.max_queries is None or queries + 1 <= budget.max_queries
        cheap = budget.max_cost is None or cost + reserve <= budget.max_cost
        if few and cheap:
            return True
        under_way = self._all("SELECT claim, until FROM requests WHERE run = ? AND claim IS NOT NULL", budget.run)
        if any(alive(claim, until) for claim, until in under_way):
            return False  # one that fails gives its query back, one that is answered may cost less than reserved
        if not few:
            raise BudgetError(f"the budget of {plural(budget.max_queries or 0, 'request')} is used up")
        raise BudgetError(
            f"the budget of {budget.max_cost:g} is used up: {cost:.6g} are spent, "
            f"and the next request may cost up to {reserve:.6g}"
        )

    def _settle(self, claim: Claim, budget: Budget, sent: Sent) -> str:
        """Keep an answer, unless there is one; return the one that is kept."""
        with self._lock:
            with self._transaction():
                row = self._one("SELECT answer, run, cost FROM requests WHERE key = ?", claim.key)
                if row is None:  # forgotten meanwhile
                    return sent.answer
                if row[0] is not None:  # somebody took over who thought this process dead
                    return str(row[0])
                cost = row[2] if sent.cost is None else sent.cost
                self._count(row[1], 0, cost - row[2])
                self._do(
                    "UPDATE requests SET answer = ?, claim = NULL, until = NULL, cost = ?, tokens_in = ?,"
                    " tokens_out = ?, sends = sends + ?, answered = ? WHERE key = ?",
                    *(sent.answer, cost, sent.tokens_in, sent.tokens_out, claim.sends, time.time(), claim.key),
                )
            self._lock.notify_all()
        return sent.answer

    def _release(self, claim: Claim, budget: Budget, error: BaseException) -> None:
        """Give a question up that got no answer."""
        interrupted = claim.sends > 0 and not isinstance(error, Exception)
        with self._lock:
            with self._transaction():
                row = self._one(
                    "SELECT run, cost FROM requests WHERE key = ? AND claim = ? AND answer IS NULL",
                    claim.key,
                    myself(),
                )
                if row is None:
                    return
                self._count(row[0], -1, -row[1])
                if isinstance(error, Refused):
                    self._do("DELETE FROM requests WHERE key = ?", claim.key)
                else:
                    self._do(
                        "UPDATE requests SET claim = NULL, until = NULL, cost = 0, sends = sends + ?,"
                        " interrupted = interrupted + ? WHERE key = ?",
                        *(claim.sends, int(interrupted), claim.key),
                    )
            self._lock.notify_all()

    def _count(self, run: str, queries: int, cost: float) -> None:
        self._do(
            "INSERT INTO runs VALUES (?, ?, ?) ON CONFLICT (run) DO UPDATE"
            " SET queries = max(0, queries + excluded.queries), cost = max(0, cost + excluded.cost)",
            *(run, queries, cost),
        )

    # --- what is known ----------------------------------------------------------------------------------------------

    def spent(self, run: str) -> tuple[int, float]:
        """Return the queries and the money that a run has used, what is under way included."""
        with self._lock:
            row = self._one("SELECT queries, cost FROM runs WHERE run = ?", run)
        return (0, 0.0) if row is None else (int(row[0]), float(row[1]))

    def facts(self, endpoint: str) -> dict[str, Any]:
        """Return what was learned about an endpoint itself."""
        with self._lock:
            row = self._one("SELECT facts FROM endpoints WHERE endpoint = ?", endpoint)
        return {} if row is None else dict(json.loads(row[0]))

    def learn(self, endpoint: str, facts: Mapping[str, Any]) -> None:
        """Keep something about an endpoint itself."""
        with self._lock, self._transaction():
            text = json.dumps({**self.facts(endpoint), **facts}, sort_keys=True)
            self._do("INSERT OR REPLACE INTO endpoints VALUES (?, ?)", endpoint, text)

    def usage(self) -> list[Usage]:
        """Return what each endpoint was asked, by name."""
        with self._lock:
            self.flush()
            rows = self._all(
                "SELECT endpoint, count(answer), sum(hits), sum(coalesce(tokens_in, 0)), sum(coalesce(tokens_out, 0)),"
                " sum(cost), count(*) - count(answer), sum(sends), sum(interrupted)"
                " FROM requests GROUP BY endpoint ORDER BY endpoint"
            )
        return [Usage(*row) for row in rows]

    def requests(self, endpoint: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield every request with its answer, those of `endpoint` (with or without `#model`), oldest first."""
        columns: tuple[str, ...] = (
            "key",
            "endpoint",
            "path",
            "body",
            "repeat",
            "answer",
            "tokens_in",
            "tokens_out",
            "cost",
            "hits",
        )
        columns += ("sends", "interrupted", "run", "asked", "answered")
        with self._lock:
            self.flush()
            keys = [row[0] for row in self._all(f"SELECT key FROM requests {_OF} ORDER BY asked, key", *_of(endpoint))]
        for key in keys:
            with self._lock:
                row = self._one(f"SELECT {', '.join(columns)} FROM requests WHERE key = ?", key)
            if row is not None:
                found = dict(zip(columns, row, strict=True))
                answer = None if found["answer"] is None else json.loads(found["answer"])
                yield {**found, "body": json.loads(found["body"]), "answer": answer}

    def forget(self, endpoint: str) -> int:
        """Remove everything about an endpoint but what is under way, and return the number of requests removed."""
        with self._lock:
            self.flush()
            with self._transaction():
                under_way = self._all(
                    f"SELECT key, claim, until FROM requests {_OF} AND claim NOT NULL", *_of(endpoint)
                )
                for key, claim, until in under_way:
                    if not alive(claim, until):
                        self._do("UPDATE requests SET claim = NULL WHERE key = ?", key)
                count = self._do(f"DELETE FROM requests {_OF} AND claim IS NULL", *_of(endpoint)).rowcount
                self._do(f"DELETE FROM endpoints {_OF}", *_of(endpoint))
        return int(count)

    # --- the file ---------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the hits that were counted in memory."""
        with self._lock:
            if self._hits and self._process == os.getpid():
                with self._transaction():
                    for key, count in self._hits.items():
                        self._do("UPDATE requests SET hits = hits + ? WHERE key = ?", count, key)
            self._hits.clear()

    def close(self) -> None:
        """Write what is still in memory and close the file."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                with contextlib.suppress(LfmError):
                    self.flush()
                self._connection.close()
            self._connection = None

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None or self._process != os.getpid():  # a connection does not survive a fork
            self._connection, self._process = connect(self.path), os.getpid()
            self._hits.clear()
        return self._connection

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Do everything inside or nothing, alone on the file."""
        self._do("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(LfmError):
                self._do("ROLLBACK")
            raise
        self._do("COMMIT")

    def _do(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connected().execute(statement, values)
        except sqlite3.Error as error:
            raise trouble(self.path, error) from None

    def _one(self, statement: str, *values: Any) -> Any:
        try:
            return self._connected().execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise trouble(self.path, error) from None

    def _all(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._connected().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise trouble(self.path, error) from None


_OF = "WHERE (? IS NULL OR endpoint = ? OR substr(endpoint, 1, length(?) + 1) = ? || '#')"


def _of(endpoint: str | None) -> tuple[str | None, ...]:
    return (endpoint,) * 4


def default_path() -> Path:
    """Return the ledger that is used where none is named."""
    return cache_folder() / "ledger.sqlite"


_open: dict[Path, Ledger] = {}
_opening = threading.Lock()


def open_ledger(path: Path | None = None) -> Ledger:
    """Return the ledger in a file, which is made if it is not there; one object for each file and process.

    Raises RequestError, and changes nothing, where the file is something else or damaged.
    """
    try:
        place = (path or default_path()).expanduser().absolute()
    except RuntimeError:
        raise RequestError(f"{path}: there is no home folder; name the ledger's file with --ledger") from None
    with _opening:
        ledger = _open.get(place)
        if ledger is None or not place.exists():
            if ledger is not None:
                ledger.close()
            ledger = _open[place] = Ledger(place)
            try:
                with ledger._lock:
                    ledger._connected()
            except BaseException:
                del _open[place]
                raise
            atexit.register(ledger.close)
    return ledger
