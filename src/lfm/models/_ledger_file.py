"""The ledger's SQLite file: made if it is new, refused if it is something else, never spoilt."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfm.errors import LfmError, RequestError

APPLICATION = 0x6C666D4C  # "lfmL", in the header of the file
VERSION = 1
TABLES = """
CREATE TABLE requests (
    key TEXT PRIMARY KEY,           -- sha256 of endpoint, path, body and repeat
    endpoint TEXT NOT NULL,         -- http://host/v1#model
    path TEXT NOT NULL,
    body TEXT NOT NULL,             -- canonical JSON; images by their digest
    repeat INTEGER NOT NULL,        -- which of several samples for the same body
    idempotency TEXT NOT NULL,      -- header of every send
    run TEXT NOT NULL,              -- the run that it counts for
    answer TEXT,                    -- JSON as it came; NULL until there is one
    claim TEXT,                     -- the process that has it under way
    until REAL,                     -- when a claim from another machine is void
    cost REAL NOT NULL DEFAULT 0,   -- the most it may cost while under way, then what it cost
    tokens_in INTEGER,
    tokens_out INTEGER,
    sends INTEGER NOT NULL DEFAULT 0,
    interrupted INTEGER NOT NULL DEFAULT 0,  -- how often a process ended while it was under way
    hits INTEGER NOT NULL DEFAULT 0,         -- how often it was answered from here
    asked REAL NOT NULL,
    answered REAL
);
CREATE INDEX by_claim ON requests (run) WHERE claim IS NOT NULL;
CREATE TABLE runs (run TEXT PRIMARY KEY, queries INTEGER NOT NULL, cost REAL NOT NULL);
CREATE TABLE endpoints (endpoint TEXT PRIMARY KEY, facts TEXT NOT NULL);
"""
WAIT = 0.05  # seconds between looks at a file whose journal is being changed
BUSY = 30.0  # seconds that the file may be locked


def connect(path: Path) -> sqlite3.Connection:
    """Open the file, after making sure that it is a ledger; nothing is written before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it holds what was asked and answered
        connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path}: the ledger cannot be opened: {why}") from None
    try:
        _check(path, connection)
        _retried(lambda: connection.execute("PRAGMA journal_mode = WAL"))
        connection.execute("PRAGMA synchronous = NORMAL")  # all that was written survives a killed process
        _make(path, connection)
    except sqlite3.Error as error:
        connection.close()
        raise trouble(path, error) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _check(path: Path, connection: sqlite3.Connection) -> None:
    application, version, tables = (
        _retried(lambda query=query: connection.execute(query).fetchone())[0]  # type: ignore[misc]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if application == 0 and version == 0 and tables == 0:
        return  # new
    if application != APPLICATION:
        raise RequestError(f"{path}: a database of another program, not a ledger; name another file with --ledger")
    if version != VERSION:
        raise RequestError(f"{path}: a ledger of version {version}, and this lfm writes version {VERSION}; update lfm")


def _make(path: Path, connection: sqlite3.Connection) -> None:
    """Make the tables, unless another process was faster."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in TABLES.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _retried(do: Callable[[], Any]) -> Any:
    """Return what `do` gives; SQLite does not wait by itself for a file whose journal is being changed."""
    deadline = time.monotonic() + BUSY
    while True:
        try:
            return do()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(WAIT)


def trouble(path: Path, error: sqlite3.Error) -> LfmError:
    text = str(error)
    if "locked" in text:
        return LfmError(f"{path}: the ledger was locked by another process for {BUSY:.0f} s; try again")
    if "malformed" in text or "not a database" in text or "file is encrypted" in text:
        return RequestError(
            f"{path}: not a ledger, or damaged ({text}); it was left as it is. Restore it from a copy, or move it away "
            "(what it answered will be asked again), or name another file with --ledger"
        )
    return LfmError(f"{path}: the ledger cannot be read or written: {text}")
