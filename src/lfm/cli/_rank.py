"""`rank`: models for a task, as a table."""

from __future__ import annotations

from typing import Any

import click

from lfm.cli import _print
from lfm.errors import LfmError
from lfm.recipe.step import Settings


def rank_and_tell(
    models: list[Any],
    data: Any,
    scores: list[str] | None,
    settings: Settings,
    json_: bool,
    *,
    length: int,
    batch_size: int,
    seed: int,
) -> None:
    """Rank models and print them, the best first; below the table, what is missing from it."""
    from lfm.api import rank
    from lfm.evaluate.transfer import SCORES

    found = rank(models, data, scores=scores, length=length, batch_size=batch_size, seed=seed, settings=settings)
    if json_:
        _print.as_json([one.as_dict() for one in found])
    else:
        columns = list(SCORES) if scores is None else list(dict.fromkeys(scores))
        rows = []
        for one in found:
            values = [_print.number(one.scores.get(name)) for name in columns]
            count = "-" if one.parameters is None else f"{one.parameters:,}"
            seconds = "-" if one.seconds is None else f"{1000 * one.seconds:.3g}"
            size = "-" if one.bytes is None else _print.size(one.bytes)
            rows.append([one.place or "-", one.model, *values, count, size, seconds])
        heads = ["", "model", *columns, "parameters", "size", "ms/example"]
        _print.table(heads, rows, numbers=[0, *range(2, len(heads))])
        reasons: dict[tuple[str, str], list[str]] = {}
        for one in found:
            for name, why in one.missing.items():
                reasons.setdefault((one.model, why), []).append(name)
        for (model, why), names in reasons.items():
            click.echo(f"{model}: no {', '.join(names)}: {why}")
    if not any(one.scores for one in found):
        raise LfmError("no model could be scored (see the reasons above)")
