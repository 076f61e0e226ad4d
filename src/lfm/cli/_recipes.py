"""Commands about recipes: run and validate one, those that come with lfm, and those of mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lfm.cli import _options as options
from lfm.cli import _print
from lfm.cli._verbs import Suggesting
from lfm.errors import LfmError, RequestError, did_you_mean
from lfm.method import first_line


@click.command(cls=options.Grouped)
@click.argument("recipe", type=click.Path(path_type=Path))
@options.run_options
@options.settings_options
def run(recipe: Path, out: Path | None, overwrite: bool, dry_run: bool, json_: bool, **how: Any) -> None:
    """Run a recipe: its steps, its evaluation, its report. What is done already is not done again."""
    from lfm.cli._run import run_and_tell
    from lfm.recipe.schema import load_recipe

    found = load_recipe(find_recipe(recipe))
    run_and_tell(found, options.settings_from(**how), out, overwrite=overwrite, dry_run=dry_run, json_=json_)


@click.command(cls=options.Grouped)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@click.pass_context
def validate(ctx: click.Context, recipe: Path, json_: bool) -> None:
    """Check a recipe and the headers of all it names; exit code 1 and every problem, or 0."""
    from lfm.recipe.schema import load_recipe
    from lfm.recipe.step import Settings

    path = find_recipe(recipe)
    try:
        found = load_recipe(path)
        from lfm.recipe.execute import plan

        problems = plan(found, Settings(quiet=True)).problems
    except RequestError as error:
        problems = list(error.problems)
    if json_:
        _print.as_json({"recipe": str(recipe), "problems": problems})
    else:
        click.echo("\n".join(problems) or f"{recipe}: no problems")
    if problems:
        ctx.exit(1)


@click.group(cls=Suggesting)
def recipes() -> None:
    """Recipes that come with lfm: list, show, copy; and their JSON Schema, for editors."""


def shipped() -> dict[str, Path]:
    """Return the recipes that come with lfm, by name; a source checkout keeps them at its root."""
    package = Path(__file__).parents[1]
    folder = package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """Return a recipe's file: the path itself, or a shipped recipe of that name."""
    if path.is_file() or (path.suffix and path.exists()):
        return path
    if str(path) in shipped():
        return shipped()[str(path)]
    here = [str(file) for file in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    raise RequestError(
        f"{path}: no such recipe, here or among the shipped{did_you_mean(str(path), [*here, *shipped()])}"
    )


@recipes.command("ls")
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def list_recipes(json_: bool) -> None:
    """List the shipped recipes."""
    rows = [(name, first_line(path.read_text(encoding="utf-8").lstrip("# "))) for name, path in shipped().items()]
    if json_:
        _print.as_json([{"recipe": name, "what": what} for name, what in rows])
    else:
        _print.table(["recipe", "what it does"], rows)


def _shipped(name: str) -> Path:
    if name not in shipped():
        raise RequestError(f"no shipped recipe {name!r}{did_you_mean(name, shipped())} (`lfm recipes ls` lists them)")
    return shipped()[name]


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a shipped recipe."""
    click.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@click.argument("name")
@click.argument("to", type=click.Path(path_type=Path))
def copy_recipe(name: str, to: Path) -> None:
    """Copy a shipped recipe to a file of your own, to change and run."""
    if to.exists():
        raise RequestError(f"{to}: exists already; choose another name")
    try:
        to.write_bytes(_shipped(name).read_bytes())
    except OSError as error:
        raise LfmError(f"{to}: {error.strerror}") from None
    click.echo(to)


@recipes.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes."""
    from lfm.recipe.schema import json_schema

    _print.as_json(json_schema())


@click.command("convert-config", cls=options.Grouped)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="File to write; not over another.")
def convert_config(config: Path, out: Path | None) -> None:
    """Turn a configuration of mergekit into the recipe that means the same; comments say what differs."""
    from lfm.cli._configs import converted, write_new

    text = converted(config)
    if out is None:
        click.echo(text, nl=False)
        return
    write_new(out, text)
    click.echo(out)
