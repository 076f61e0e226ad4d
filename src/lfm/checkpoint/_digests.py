"""Digests of files that have not changed since they were last read, under the user's cache folder.

A file counts as unchanged while its path, size, inode and times of modification and status change are the same. Losing
the cache costs time and nothing else; `lfm verify` does not use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from lfm.checkpoint._header import Spec


def cache_folder() -> Path:
    """Return lfm's own cache folder: `$XDG_CACHE_HOME/lfm`, or `~/.cache/lfm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lfm"


def state(specs: Mapping[str, Spec]) -> str | None:
    """Return a name for the files of these tensors as they are now; None when they cannot be looked at."""
    try:
        paths = sorted(path.resolve() for path in {spec.path for spec in specs.values() if spec.path is not None})
        stats = [
            (str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
            for path in paths
            for stat in [path.stat()]
        ]
    except OSError:
        return None
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def recall(state: str | None, specs: Mapping[str, Spec]) -> dict[str, str] | None:
    """Return the digests of these tensors if they are known for files in that state."""
    if state is None:
        return None
    try:
        known = json.loads((cache_folder() / "digests" / state).read_text())
    except (OSError, ValueError, RuntimeError):
        return None
    complete = isinstance(known, dict) and set(known) == set(specs)
    return known if complete and all(isinstance(digest, str) for digest in known.values()) else None


def remember(state: str | None, digests: Mapping[str, str]) -> None:
    """Keep digests for files in that state; a cache that cannot be written (or a user without a home) is no error."""
    if state is None:
        return
    try:
        entry = cache_folder() / "digests" / state
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = entry.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        draft.write_text(json.dumps(dict(digests)))
        draft.replace(entry)
    except (OSError, RuntimeError):
        return
