"""How problems with data are worded, counted and raised."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from lfm.errors import RequestError, did_you_mean

SHOWN = 5  # a file with one mistake a line should not fill the terminal
WIDTH = 40


def refuse(problems: Sequence[str]) -> None:
    """Raise RequestError with the first five problems and a count of the others; return if there are none."""
    if problems:
        rest = len(problems) - SHOWN
        raise RequestError(*problems[:SHOWN], *([f"and {rest:,} more"] if rest > 0 else []))


def require(module: str, package: str, purpose: str) -> Any:
    """Return an optional library's module, or raise RequestError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f"{purpose} needs {package}, got: {error}; run: pip install {package}") from error


def choose_split(origin: str, wanted: str | None, available: Iterable[str]) -> str:
    """Return the split to read: the one that is wanted, or the only one there is."""
    names = list(available)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None:
        raise RequestError(f"{origin}: has splits {listed(names)}; choose one, such as split: {names[0]}")
    if wanted not in names:
        raise RequestError(f"{origin}: no split {wanted!r}, it has {listed(names)}{did_you_mean(wanted, names)}")
    return wanted


def listed(values: Iterable[object]) -> str:
    """Return `a, b, c`, cut after ten."""
    words = [shortened(str(value)) for value in values]
    return ", ".join(words[:10]) + (f" and {len(words) - 10:,} more" if len(words) > 10 else "")


def shortened(text: str) -> str:
    """Return `text`, cut where a message would become unreadable."""
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def described(value: object) -> str:
    """Return what a value from a JSON file is, in JSON's words: `null`, `the number 3`, `a list`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {shortened(str(value))}"
        case str():
            return f"the text {shortened(value)!r}"
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"
