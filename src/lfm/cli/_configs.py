"""`lfm convert-config`: a configuration of another program as a recipe."""

from __future__ import annotations

import textwrap
from pathlib import Path

from lfm.errors import LfmError, RequestError


def converted(path: Path) -> str:
    """Return the recipe that means the same as a configuration, with what differs as comments."""
    from lfm.api import from_config

    recipe = from_config(path)
    notes = [note for step in recipe.steps.values() for note in step.notes]
    lines = [f"# What {path} says, as a recipe.{' Not quite the same:' if notes else ''}"]
    for note in notes:
        lines += textwrap.wrap(
            note, 110, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join([*(line for line in lines if line.isprintable()), recipe.text])


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RequestError(f"{path}: exists already; choose another name") from None
    except OSError as error:
        raise LfmError(f"{path}: {error.strerror}") from None
