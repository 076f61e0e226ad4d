"""What can go wrong, told to people.

    LfmError                the run failed                          exit code 1
    ├── BudgetError         the queries or the money are used up
    └── RequestError        the request was wrong                   exit code 2
        ├── AccessError     a model was asked for more than its interface offers
        └── UnsafeError     a file that nobody should trust

Every message says what is wrong, where, what was got, and what to do. A `RequestError` holds all problems of a
request at once. Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LfmError(Exception):
    """The run could not be finished; the message says why and what to do."""

    exit_code = 1


class BudgetError(LfmError):
    """A run has asked endpoints all that it may."""


class RequestError(LfmError, ValueError):
    """The request cannot be served as it stands; `problems` holds every reason, one line each."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class AccessError(RequestError):
    """A model was asked for more than its interface offers."""


class UnsafeError(RequestError):
    """A file was refused because loading it could do harm or give wrong weights."""


def did_you_mean(word: str, choices: Iterable[object]) -> str:
    """Return `"; did you mean 'density'?"` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(word.lower(), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def plural(count: int, noun: str) -> str:
    """Return `"1 model"`, `"2 models"`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
