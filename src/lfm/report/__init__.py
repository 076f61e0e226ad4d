"""One self-contained HTML file that tells what a run did: results, recipe graph, training curves, layers, lineage.

    from lfm.report import Run, write
    write(Run(title="demo", version="0.1.0", nodes=..., tables=...), Path("report.html"))

The file holds no script and asks the network for nothing; equal runs give equal bytes.
"""

from __future__ import annotations

from pathlib import Path

from lfm.report._model import (
    Cell,
    Change,
    Chart,
    Column,
    Curve,
    Estimate,
    HeatMap,
    Node,
    Note,
    Run,
    Samples,
    Table,
    TrainingLog,
)
from lfm.report._page import render

__all__ = [
    "Cell",
    "Change",
    "Chart",
    "Column",
    "Curve",
    "Estimate",
    "HeatMap",
    "Node",
    "Note",
    "Run",
    "Samples",
    "Table",
    "TrainingLog",
    "render",
    "write",
]


def write(run: Run, path: Path) -> None:
    """Write the report of `run` to `path`; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(run), encoding="utf-8", newline="\n")
    partial.replace(path)
