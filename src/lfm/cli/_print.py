"""Answers on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click

from lfm.recipe.schema import pretty

WIDTH = 100


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> None:
    """Print aligned columns; those in `numbers` are aligned on the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = set(numbers)
    widths = [max(len(line[j]) for line in [list(head), *cells]) for j in range(len(head))]
    last = len(head) - 1
    if last not in right and sum(widths) + 2 * last > WIDTH:
        widths[last] = max(30, WIDTH - sum(widths[:last]) - 2 * last)
        cells = [part for line in cells for part in _wrapped(line, widths[last])]
    for line in (list(head), ["-" * width for width in widths], *cells):
        padded = (
            cell.rjust(width) if j in right else cell.ljust(width)
            for j, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        click.echo("  ".join(padded).rstrip())


def wrapped(text: str) -> str:
    """Return text with its paragraphs wrapped; formulas and lists, which are indented, stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, WIDTH) for part in paragraphs)


def _wrapped(line: list[str], width: int) -> list[list[str]]:
    """Return a line whose last cell is wrapped, as several lines."""
    parts = textwrap.wrap(line[-1], width, break_on_hyphens=False) or [""]
    return [line[:-1] + parts[:1], *([""] * (len(line) - 1) + [part] for part in parts[1:])]


def as_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(pretty(value))


def size(count: float) -> str:
    """Return a number of bytes as people read it: `1.3 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float | None, unit: str = "") -> str:
    """Return a measured value: percentages with one decimal, others with four significant digits."""
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.1f}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
