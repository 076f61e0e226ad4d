"""One bar on stderr: on a terminal only, and never on stdout, which is for the answer."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Self


class Progress:
    """Shows how far a piece of work has come; silent when not on a terminal, with NO_COLOR's friends, or when quiet."""

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self._bar = None
        if not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=name, unit_scale=True, leave=False, file=sys.stderr)

    def advance(self, amount: int = 1, note: str = "") -> None:
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
