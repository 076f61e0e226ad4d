"""After the steps: measure what came out, and tell it - as a table on stdout, as JSON, as a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm import __version__
from lfm.errors import LfmError, RequestError
from lfm.evaluate.change import relative_change
from lfm.models.ref import ModelRef
from lfm.recipe.catalogue import Catalogue
from lfm.recipe.execute import StepRun, evaluation_key
from lfm.recipe.lineage import environment
from lfm.recipe.schema import Recipe, Step, pretty
from lfm.report import Chart, Column, Curve, Estimate, HeatMap, Node, Note, Run, Samples, Table, TrainingLog, write

if TYPE_CHECKING:
    from lfm.evaluate.measure import Measured, Measurement

SHOWN, LONGEST = 8, 300  # texts that the report shows of what a student learned from, and characters of each

# Which table a measure goes into, in the order of the tables.
TITLES = {
    ("accuracy", "%"): "Accuracy",
    ("perplexity", "per token"): "Perplexity per token",
    ("perplexity", "per character"): "Perplexity per character",
    ("NLL", "nats"): "Negative log-likelihood",
    ("ECE", "%"): "Calibration error",
    ("KL from baseline", "nats"): "Divergence from the baseline",
    ("agreement", "%"): "Agreement with the baseline",
}


def evaluate(recipe: Recipe, catalogue: Catalogue) -> Measured | None:
    """Measure what the recipe asks for; None if it asks for nothing."""
    if recipe.evaluate is None:
        return None
    from lfm.evaluate.measure import Measured, measure

    catalogue.run = evaluation_key(recipe)
    try:
        return measure(catalogue.names(), recipe.evaluate, catalogue)
    except RequestError as error:  # the steps are done, and the report can still tell of them
        return Measured(notes=[f"nothing was measured: {error}"])


def report(
    recipe: Recipe, runs: list[StepRun], catalogue: Catalogue, measured: Measured | None, out: Path | None
) -> Path:
    """Write `report.html` and `results.json` into the run's folder; returns the report's path.

    A single step that was done before, with nothing to measure, keeps the report it has: that one may hold measures.
    """
    out = out or Path()
    if recipe.single and measured is None and all(run.skipped for run in runs) and (out / "report.html").exists():
        return out / "report.html"
    run = summarise(recipe, runs, catalogue, measured, out.name)
    results = {"tables": [table_rows(table) for table in run.tables], "notes": [note.text for note in run.notes]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(run, out / "report.html")
        (out / "results.json").write_text(pretty(results) + "\n", encoding="utf-8")
    except OSError as error:
        raise LfmError(f"{error.filename or out}: the report could not be written: {error.strerror}") from error
    return out / "report.html"


def summarise(recipe: Recipe, runs: list[StepRun], catalogue: Catalogue, measured: Measured | None, title: str) -> Run:
    """Return everything that the report shows."""
    notes = [Note("info", f"{run.step.name}: {note}") for run in runs for note in run.lineage["notes"]]
    notes += [Note("warning", note) for note in (measured.notes if measured else ())]
    return Run(
        title=title,
        version=__version__,
        nodes=tuple(_nodes(recipe, runs, catalogue)),
        tables=tuple(tables(measured)) if measured else (),
        logs=tuple(_logs(runs)),
        charts=tuple(_charts(runs)),
        heat_maps=(*_heat_maps(runs, catalogue), *_drawn(runs)),
        samples=tuple(_samples(runs)),
        notes=tuple(notes),
        recipe=recipe.text,
        environment=environment(),
    )


def tables(measured: Measured) -> Iterator[Table]:
    """Yield a table for each kind of measure: models by data sets, and the mean over these where they are several."""
    for title in (*TITLES.values(), "Evaluation harness"):
        chosen = [item for item in measured.measurements if _title(item) == title]
        rows = tuple(dict.fromkeys(model for item in chosen for model in item.estimates))
        if not chosen:
            continue
        columns = [Column(item.metric, item.data, item.better, item.unit) for item in chosen]
        cells = {(row, j): item.estimates.get(row) for j, item in enumerate(chosen) for row in rows}
        if len(chosen) > 1 and title != "Evaluation harness":
            columns.append(Column(chosen[0].metric, "mean", chosen[0].better, chosen[0].unit))
            cells |= {(row, len(chosen)): _mean([cells[row, j] for j in range(len(chosen))]) for row in rows}
        yield Table(
            title=title,
            rows=rows,
            columns=tuple(columns),
            cells=cells,
            baseline=measured.baseline if measured.baseline in rows else None,
        )


def _title(item: Measurement) -> str:
    return TITLES.get((item.metric, item.unit), "Evaluation harness")


def _mean(cells: list[Estimate | None]) -> Estimate | None:
    """Return the mean of several estimates, without an interval: its parts need not be independent."""
    values = [cell.value for cell in cells if cell is not None]
    return Estimate(sum(values) / len(values)) if len(values) == len(cells) else None


def table_rows(table: Table) -> dict[str, Any]:
    """Return a table as plain JSON values: for each model, each measure with its interval."""
    heads = [" ".join(part for part in (column.metric, column.task, column.unit) if part) for column in table.columns]
    rows: dict[str, Any] = {}
    for (row, j), cell in table.cells.items():
        if cell is not None:
            rows.setdefault(row, {})[heads[j]] = {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n}
    return {"title": table.title, "baseline": table.baseline, "rows": rows}


def _nodes(recipe: Recipe, runs: list[StepRun], catalogue: Catalogue) -> Iterator[Node]:
    named: dict[str, ModelRef] = dict(recipe.models)
    for run in runs:
        for ref in run.step.models():
            if ref.ref not in recipe.steps and ref.ref not in recipe.models:
                named.setdefault(catalogue.name_of(ref), ref)
    for name, ref in named.items():
        detail = {key: str(value) for key, value in ref.model_dump(exclude_defaults=True).items()}
        yield Node(name, "model", digest=catalogue.digest(ref), detail=detail)
    for run in runs:
        lineage = run.lineage
        shown = {key: str(value) for key, value in _given(run.step).items()}
        yield Node(
            name=run.step.name,
            kind="step",
            verb=lineage["verb"],
            method=lineage["method"],
            inputs=tuple(dict.fromkeys(catalogue.name_of(ref) for ref in run.step.models())),
            digest=lineage["output"]["digest"],
            detail={**shown, "seconds": "done before" if run.skipped else f"{lineage['seconds']:.1f}"},
        )


def _given(step: Step) -> Mapping[str, Any]:
    """Return the parameters and inputs that were given, models apart."""
    inputs = step.inputs.model_dump(mode="json", exclude_defaults=True)
    models = {role for role, _ in step.roles()}
    return {**{role: value for role, value in inputs.items() if role not in models}, **step.parameters}


def _logs(runs: list[StepRun]) -> Iterator[TrainingLog]:
    for run in runs:
        path = run.folder / "training.jsonl"
        if not path.is_file():
            continue
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        curves = []
        for key in ("loss", "validation"):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                curves.append(Curve(key, tuple(x for x, _ in points), tuple(y for _, y in points)))
        yield TrainingLog(run.step.name, tuple(curves))


def _charts(runs: list[StepRun]) -> Iterator[Chart]:
    """Yield what steps measured and left in `curve.json`: columns of numbers, and which to draw over which."""
    for run in runs:
        path = run.folder / "curve.json"
        if not path.is_file():
            continue
        told = json.loads(path.read_text(encoding="utf-8"))
        columns = {name: tuple(math.nan if y is None else y for y in told["columns"][name]) for name in told["columns"]}
        for chart in told["charts"]:
            curves = tuple(Curve(name, columns[chart["x"]], columns[name]) for name in chart["y"])
            note = f"{told['examples']:,} examples."
            yield Chart(f"{run.step.name}: {chart['title']}", curves, chart["x"], chart["y_label"], note)


def _samples(runs: list[StepRun]) -> Iterator[Samples]:
    """Yield what steps made for students to learn from: what they left beside the weights."""
    for run in runs:
        picture, texts = run.folder / "synthesised.png", run.folder / "synthesised.jsonl"
        said = texts.read_text(encoding="utf-8").splitlines()[:SHOWN] if texts.is_file() else []
        metrics = run.lineage.get("metrics", {})
        found = Samples(
            run.step.name,
            picture.read_bytes() if picture.is_file() else None,
            tuple(str(json.loads(line)["text"])[:LONGEST] for line in said),
            {key.removeprefix("synthesised_"): v for key, v in metrics.items() if key.startswith("synthesised_")},
        )
        if found.picture or found.texts:
            yield found


def _drawn(runs: list[StepRun]) -> Iterator[HeatMap]:
    """Yield the grids that steps left in `heat_maps.json`."""
    for run in runs:
        path = run.folder / "heat_maps.json"
        for told in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ():
            title, values = f"{run.step.name}: {told['title']}", tuple(map(tuple, told["values"]))
            yield HeatMap(title, tuple(told["rows"]), tuple(told["columns"]), values, told["unit"], told["note"])


def _heat_maps(runs: list[StepRun], catalogue: Catalogue) -> Iterator[HeatMap]:
    """Yield, for each base, how far the blocks of everything made from it have moved."""
    by_base: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        roles = dict(reversed(list(run.step.roles())))
        origin = roles.get("base") or roles.get("model")
        before = None if origin is None else catalogue.behind(origin)
        if origin is None or before is None:
            continue
        moved = run.lineage.get("change") or relative_change(
            before.weights, catalogue.open(ModelRef(ref=run.step.name)).weights
        )
        by_base.setdefault(catalogue.name_of(origin), {})[run.step.name] = moved
    for base, rows in by_base.items():
        columns = list(dict.fromkeys(group for row in rows.values() for group in row))
        yield HeatMap(
            title=f"Change from {base}",
            rows=tuple(rows),
            columns=tuple(columns),
            values=tuple(tuple(row.get(column) for column in columns) for row in rows.values()),
            unit="|after - before| / |before|",
            note="Frobenius norm of the change of each part of the model, relative to that part.",
        )
