"""Running a recipe from the command line: the plan, the work, and the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm.cli import _print
from lfm.errors import LfmError, RequestError
from lfm.recipe.schema import Recipe, Step
from lfm.recipe.step import Settings

if TYPE_CHECKING:
    from lfm.recipe.execute import RunPlan


def run_and_tell(
    recipe: Recipe, settings: Settings, out: Path | None, *, overwrite: bool, dry_run: bool, json_: bool
) -> None:
    """Run (or plan) a recipe and print what came of it."""
    from lfm.recipe.execute import execute, prepare

    if dry_run:
        made = prepare(recipe, settings, out, overwrite=overwrite)
        _tell_plan(made, json_)
        if made.problems:
            raise RequestError(*made.problems)
        return
    runs, catalogue = execute(recipe, settings, out, overwrite=overwrite)
    from lfm.recipe.summary import evaluate, report, table_rows, tables

    measured = evaluate(recipe, catalogue)
    page = report(recipe, runs, catalogue, measured, catalogue.out)
    for note in (*(note for run in runs for note in run.lineage["notes"]), *(measured.notes if measured else ())):
        click.echo(f"note: {note}", err=True)
    made_tables = list(tables(measured)) if measured else []
    if json_:
        steps = [
            {"step": run.step.name, "folder": str(run.folder), "skipped": run.skipped, "lineage": run.lineage}
            for run in runs
        ]
        told = [table_rows(table) for table in made_tables]
        _print.as_json({"out": str(catalogue.out), "steps": steps, "tables": told})
        return
    for run in runs:
        done = "done before" if run.skipped else f"{run.lineage['seconds']:.1f} s"
        click.echo(f"{run.folder}  {run.lineage['verb']} {run.lineage['method']}  {done}")
    for table in made_tables:
        click.echo()
        _tell_table(table)
    click.echo(f"\nreport: {page}")


def _tell_table(table: Any) -> None:
    heads = [column.task if column.unit != "lm-eval" else f"{column.task} {column.metric}" for column in table.columns]
    rows = []
    for name in table.rows:
        cells = [table.cells.get((name, j)) for j in range(len(table.columns))]
        rows.append([name, *(_print.number(cell and cell.value, table.columns[0].unit) for cell in cells)])
    unit = table.columns[0].unit if table.columns[0].unit in ("%", "nats") else ""
    title = f"{table.title} ({unit})" if unit else table.title
    _print.table([title, *heads], rows, numbers=range(1, len(heads) + 1))


def _tell_plan(made: RunPlan, json_: bool) -> None:
    told = {step.name: [*step.notes, *(found.notes if found else ())] for step, found in made.steps}
    notes = [f"{name}: {note}" for name, notes in told.items() for note in notes]
    if json_:
        steps = [
            {"step": step.name, "method": _called(step), "notes": told[step.name]}
            | ({key: getattr(found, key) for key in ("reads", "writes", "memory")} if found else {})
            for step, found in made.steps
        ]
        _print.as_json({"steps": steps, "problems": made.problems, "notes": made.notes})
    else:
        rows = []
        for step, found in made.steps:
            sizes = [_print.size(count) for count in (found.reads, found.writes, found.memory)] if found else ["?"] * 3
            seconds = found.seconds if found else None
            rows.append([step.name, _called(step), *sizes, "?" if seconds is None else f"about {seconds:.1g} s"])
        _print.table(["step", "method", "reads", "writes", "memory", "time"], rows, numbers=(2, 3, 4, 5))
    for note in (*notes, *made.notes):
        click.echo(f"note: {note}", err=True)


def _called(step: Step) -> str:
    return f"{step.card.verb.name} {step.card.name}"


def measure_and_tell(
    models: list[Any], measures: dict[str, Any], settings: Settings, out: Path | None, seed: int, json_: bool
) -> None:
    """Measure models and print the tables; with `out`, write report and results there."""
    from lfm.api import measure_models
    from lfm.recipe.summary import report, table_rows, tables

    recipe, catalogue, measured = measure_models(models, measures, settings, seed, options={})
    for note in measured.notes:
        click.echo(f"note: {note}", err=True)
    found = list(tables(measured))
    if json_:
        _print.as_json([table_rows(table) for table in found])
    else:
        for index, table in enumerate(found):
            click.echo("\n" if index else "", nl=False)
            _tell_table(table)
    if not found:
        raise LfmError("nothing could be measured (see the notes above)")
    if out is not None:
        report(recipe, [], catalogue, measured, out)
