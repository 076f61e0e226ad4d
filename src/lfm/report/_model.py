"""What a report holds: plain frozen data, checked when it is made, and its JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["higher", "lower", "none"]
Verdict = Literal["better", "worse", "unclear", "same", ""]

SCHEMA = 1  # of the JSON payload
MAX_POINTS = 128  # of a curve, drawn or in the payload: more than a chart on a screen can show


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval and the number of examples behind it, where they are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


Cell = Estimate | None


@dataclass(frozen=True)
class Column:
    """One measure of a table: a metric on a task, and which way is better."""

    metric: str
    task: str = ""
    better: Better = "none"
    unit: str = ""


@dataclass(frozen=True)
class Change:
    """The difference between a cell and the baseline's cell, and what it means."""

    difference: float
    verdict: Verdict


@dataclass(frozen=True)
class Table:
    """Models against measures. `cells` maps (row name, column index) to an estimate; a missing key is an empty cell."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[str, int], Cell]
    baseline: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse cells that no row and column shows: a number must not be lost in silence."""
        rows = set(self.rows)
        for row, column in self.cells:
            if row not in rows or not 0 <= column < len(self.columns):
                raise ValueError(f"table {self.title!r} has a cell at ({row!r}, {column}), which it does not show")
        if self.baseline is not None and self.baseline not in rows:
            raise ValueError(f"table {self.title!r}: the baseline {self.baseline!r} is not one of its rows")

    def best(self, column: int) -> tuple[str, ...]:
        """Return the rows with the best value of a column; none where nothing is better than something else."""
        better = self.columns[column].better
        values = {row: cell.value for row in self.rows if (cell := self._finite(row, column))}
        if better == "none" or len(set(values.values())) < 2:
            return ()
        top = max(values.values()) if better == "higher" else min(values.values())
        return tuple(row for row, value in values.items() if value == top)

    def change(self, row: str, column: int) -> Change | None:
        """Return the difference from the baseline; unclear where the two 95 % intervals overlap."""
        if self.baseline is None or row == self.baseline:
            return None
        base, cell = self._finite(self.baseline, column), self._finite(row, column)
        if base is None or cell is None:
            return None
        difference = cell.value - base.value
        return Change(difference, _verdict(cell, base, self.columns[column].better))

    def _finite(self, row: str, column: int) -> Cell:
        cell = self.cells.get((row, column))
        return cell if cell is not None and math.isfinite(cell.value) else None


def _verdict(cell: Estimate, base: Estimate, better: Better) -> Verdict:
    if cell.value == base.value:
        return "same"
    if better == "none":
        return ""
    span, base_span = _span(cell), _span(base)
    if span is None or base_span is None:
        return ""  # without intervals a difference is a difference, and no more can be said
    if span[0] <= base_span[1] and base_span[0] <= span[1]:
        return "unclear"
    return "better" if (cell.value > base.value) == (better == "higher") else "worse"


def _span(cell: Estimate) -> tuple[float, float] | None:
    """Return the interval of an estimate, or None where one of its ends is not known."""
    if cell.low is None or cell.high is None or math.isnan(cell.low) or math.isnan(cell.high):
        return None
    return cell.low, cell.high


@dataclass(frozen=True)
class Curve:
    """One line of a chart. A value that is not finite breaks the line."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse points that lack a coordinate."""
        if len(self.x) != len(self.y):
            raise ValueError(f"curve {self.label!r} has {len(self.x)} x and {len(self.y)} y values")

    def thinned(self, limit: int = MAX_POINTS) -> Curve:
        """Return the curve with about `limit` points: of each stretch the lowest, the highest and a break stay."""
        if len(self.x) <= limit:
            return self
        keep = {0, len(self.x) - 1}
        buckets = limit // 2
        for bucket in range(buckets):
            stretch = range(bucket * len(self.x) // buckets, (bucket + 1) * len(self.x) // buckets)
            finite = [i for i in stretch if math.isfinite(self.y[i])]
            keep.update([i for i in stretch if not math.isfinite(self.y[i])][:1])
            if finite:
                keep.update((min(finite, key=self.y.__getitem__), max(finite, key=self.y.__getitem__)))
        kept = sorted(keep)
        return Curve(self.label, tuple(self.x[i] for i in kept), tuple(self.y[i] for i in kept))


@dataclass(frozen=True)
class TrainingLog:
    """The curves of one training step: loss terms, validation."""

    step_name: str
    curves: tuple[Curve, ...]
    x_label: str = "step"
    y_label: str = "loss"


@dataclass(frozen=True)
class Chart:
    """Curves that a step measured, such as what it costs to ask more models, and what it brings."""

    title: str
    curves: tuple[Curve, ...]
    x_label: str
    y_label: str
    note: str = ""


@dataclass(frozen=True)
class Node:
    """A model that went in, or a step that made one. `detail` holds parameters, ref, seconds, bytes, as text."""

    name: str
    kind: Literal["model", "step"]
    verb: str | None = None
    method: str | None = None
    inputs: tuple[str, ...] = ()
    digest: str | None = None
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HeatMap:
    """Values on a grid, such as the relative change of each layer (columns) of each model (rows)."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse values that do not fill the grid."""
        shape = [len(row) for row in self.values]
        if shape != [len(self.columns)] * len(self.rows):
            raise ValueError(
                f"heat map {self.title!r} names {len(self.rows)} rows of {len(self.columns)} columns, "
                f"its values are {len(shape)} rows of {sorted(set(shape))} columns"
            )


@dataclass(frozen=True)
class Samples:
    """Inputs that a step made for a student to learn from: a picture (PNG) of some, or texts; what they are like."""

    step_name: str
    picture: bytes | None = None
    texts: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """Something a reader should know."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class Run:
    """Everything a report tells. `recipe` is its YAML text."""

    title: str
    version: str
    nodes: tuple[Node, ...] = ()
    tables: tuple[Table, ...] = ()
    logs: tuple[TrainingLog, ...] = ()
    charts: tuple[Chart, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()
    samples: tuple[Samples, ...] = ()
    notes: tuple[Note, ...] = ()
    recipe: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def as_json(run: Run) -> dict[str, Any]:
    """Return the run as plain JSON values.

    Estimates keep every digit; curves are thinned, their y and heat maps rounded to four digits. JSON has no number for
    what is not finite: that becomes "nan", "inf" or "-inf".
    """
    return {
        "schema": SCHEMA,
        "title": run.title,
        "version": run.version,
        "nodes": [_node(node) for node in run.nodes],
        "tables": [_table(table) for table in run.tables],
        "logs": [_log(log) for log in run.logs],
        "charts": [_chart(chart) for chart in run.charts],
        "heat_maps": [_heat_map(heat_map) for heat_map in run.heat_maps],
        "samples": [
            {"step": one.step_name, "texts": list(one.texts), "facts": {k: _exact(v) for k, v in one.facts.items()}}
            for one in run.samples
        ],
        "notes": [{"level": note.level, "text": note.text} for note in run.notes],
        "recipe": run.recipe,
        "environment": dict(run.environment),
    }


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "kind": node.kind,
        "verb": node.verb,
        "method": node.method,
        "inputs": list(node.inputs),
        "digest": node.digest,
        "detail": dict(node.detail),
    }


def _table(table: Table) -> dict[str, Any]:
    columns = [{"metric": c.metric, "task": c.task, "better": c.better, "unit": c.unit} for c in table.columns]
    cells = [[_cell(table.cells.get((row, j))) for j in range(len(columns))] for row in table.rows]
    return {
        "title": table.title,
        "rows": list(table.rows),
        "columns": columns,
        "cells": cells,
        "baseline": table.baseline,
        "note": table.note,
    }


def _cell(cell: Cell) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {"value": _exact(cell.value), "low": _exact(cell.low), "high": _exact(cell.high), "n": cell.n}


def _log(log: TrainingLog) -> dict[str, Any]:
    return {"step": log.step_name, "x_label": log.x_label, "y_label": log.y_label, "curves": _curves(log.curves)}


def _chart(chart: Chart) -> dict[str, Any]:
    labels = {"x_label": chart.x_label, "y_label": chart.y_label}
    return {"title": chart.title, **labels, "note": chart.note, "curves": _curves(chart.curves)}


def _curves(curves: tuple[Curve, ...]) -> list[dict[str, Any]]:
    return [
        {"label": curve.label, "points": len(curve.x), "x": [_exact(_short(x)) for x in thin.x], "y": _rounded(thin.y)}
        for curve in curves
        for thin in [curve.thinned()]
    ]


def _heat_map(heat_map: HeatMap) -> dict[str, Any]:
    return {
        "title": heat_map.title,
        "rows": list(heat_map.rows),
        "columns": list(heat_map.columns),
        "values": [_rounded(row) for row in heat_map.values],
        "unit": heat_map.unit,
        "note": heat_map.note,
    }


def _exact(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return str(float(value))


def _rounded(values: tuple[float | None, ...]) -> list[float | str | None]:
    return [_exact(None if value is None else _short(float(f"{value:.4g}"))) for value in values]


def _short(value: float) -> float:
    """Return whole numbers as `int`: steps are then written `120`, not `120.0`."""
    return int(value) if math.isfinite(value) and abs(value) < 1e15 and value == int(value) else value
