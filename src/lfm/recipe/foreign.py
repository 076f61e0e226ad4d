"""Configurations of other programs, read as steps of a recipe: `merged: {merge: their.yaml}`.

A verb that understands such files has a module `_foreign.py` with the function of `Reader`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from lfm.errors import RequestError
from lfm.method import Verb
from lfm.recipe._yaml import Located

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ForeignStep:
    """A step as a recipe would hold it, and where in the foreign file its keys come from.

    `notes` say what is no error and should not pass in silence.
    """

    name: str
    raw: Mapping[str, Any]
    located: Located
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """The function of a verb's `_foreign.py`."""

    def read(self, path: Path, name: str) -> list[ForeignStep]:
        """Return the steps that mean what a file says; the last of them makes the result and is called `name`.

        Raises RequestError with everything in the file that is wrong or cannot be done, each with its line.
        """


def reader(verb: Verb) -> Reader | None:
    """Return what reads foreign files for a verb, or None; imports it."""
    module = f"{verb.package}._foreign"
    return cast(Reader, importlib.import_module(module)) if importlib.util.find_spec(module) else None


def is_foreign(verb: Verb, method: object) -> bool:
    """Whether what stands for a method is a foreign file."""
    return isinstance(method, str) and method.endswith(SUFFIXES) and reader(verb) is not None


def read_foreign(verb: Verb, path: str | Path, name: str) -> list[ForeignStep]:
    """Return the steps that a foreign file stands for."""
    found = reader(verb)
    if found is None:
        raise RequestError(f"{verb.name} reads no configurations of other programs")
    return found.read(Path(path), name)
