"""Who has a question of the ledger under way, and whether that process still lives."""

from __future__ import annotations

import os
import socket
import time
from functools import cache
from pathlib import Path


def myself() -> str:
    """Return a name for this process that no other has, or had before it."""
    return _name_of(os.getpid())


@cache
def _name_of(process: int) -> str:
    return f"{socket.gethostname()} {process} {_started(process)}"


def _started(process: int) -> str:
    """Return when a process was started, in the system's ticks; empty where that cannot be known, `-` if it is dead."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "-" if Path("/proc/self/stat").exists() else ""
    return "-" if state in "ZX" else rest[18]


def alive(claim: str, until: float | None) -> bool:
    """Whether the process that made a claim can still keep it; those of other machines are given their time."""
    host, process, started = claim.rsplit(" ", 2)
    if host != socket.gethostname():
        return until is None or time.time() < until
    if claim == myself():
        return True
    if started:
        return _started(int(process)) == started
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
