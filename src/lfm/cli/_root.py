"""The commands. Each imports what it needs when it runs, so that help and listings answer at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from lfm import __version__
from lfm.cli import _options as options
from lfm.cli import _print
from lfm.cli._verbs import Suggesting, VerbGroup
from lfm.errors import LfmError, RequestError, did_you_mean
from lfm.method import Access, Card, Data, Have, card, cards, first_line, level, methods_of, number_of_models, verbs


class Root(Suggesting):
    """All commands: the verbs that have methods, then the rest."""

    def _verbs(self) -> dict[str, VerbGroup]:
        return {name: VerbGroup(verb) for name, verb in verbs().items() if methods_of(name)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._verbs(), *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.commands.get(cmd_name) or self._verbs().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles: list[tuple[str, Mapping[str, click.Command]]] = [("Make a model", self._verbs())]
        for title, names in SECTIONS.items():
            titles.append((title, {name: self.commands[name] for name in names}))
        for title, commands in titles:
            with formatter.section(title):
                formatter.write_dl([(name, _short(command)) for name, command in commands.items()])


SECTIONS = {
    "Run recipes": ("run", "validate", "recipes", "convert-config"),
    "Look at models": ("evaluate", "rank", "inspect", "diff", "verify", "ledger"),
    "Find out": ("methods", "advise", "env", "completion"),
}


def _short(command: click.Command) -> str:
    """Return a command's help up to its first colon or full stop."""
    return re.split(r"[.:;](\s|$)", first_line(command.help))[0] + "."


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lfm")
def root() -> None:
    """Learn from models: checkpoints in, a better checkpoint out.

    \b
    lfm merge ties A B --base C -o out    one step
    lfm run recipe.yaml                   many
    lfm advise --data none                what can be done with what you have
    lfm COMMAND --help                    all about a command
    """


@root.command(cls=options.Grouped)
@click.argument("recipe", type=click.Path(path_type=Path))
@options.run_options
@options.settings_options
def run(recipe: Path, out: Path | None, overwrite: bool, dry_run: bool, json_: bool, **how: Any) -> None:
    """Run a recipe: its steps, its evaluation, its report. What is done already is not done again."""
    from lfm.cli._run import run_and_tell
    from lfm.recipe.schema import load_recipe

    found = load_recipe(find_recipe(recipe))
    run_and_tell(found, options.settings_from(**how), out, overwrite=overwrite, dry_run=dry_run, json_=json_)


@root.command(cls=options.Grouped)
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


@root.command(cls=options.Grouped)
@click.argument("verb", required=False)
@click.argument("name", metavar="[METHOD]", required=False)
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def methods(verb: str | None, name: str | None, json_: bool) -> None:
    """List the methods, those of a verb, or all about one: `lfm methods`, `lfm methods merge`, `lfm methods ties`."""
    named = [item for item in cards().values() if verb not in verbs() and name is None and item.name == verb]
    if len(named) == 1 or (verb and name):
        _tell_method(named[0] if named else card(str(verb), str(name)), json_)
        return
    if verb and verb not in verbs() and not named:
        known = [*verbs(), *(item.name for item in cards().values())]
        raise RequestError(f"unknown verb or method {verb!r}{did_you_mean(verb, known)} (`lfm methods` lists them)")
    chosen = named or [item for item in cards().values() if verb in (None, item.verb.name)]
    if json_:
        _print.as_json([_card_json(item) for item in chosen])
    else:
        _print.table(["verb", "method", "what it does"], [(c.verb.name, c.name, c.summary) for c in chosen])


def _card_json(item: Card) -> dict[str, Any]:
    needs = {
        "access": item.needs.access.name.lower(),
        "data": item.needs.data.name.lower(),
        "trains": item.needs.trains,
        "sources": item.needs.sources,
        "base": item.needs.base,
        "same_architecture": item.needs.same_architecture,
        "same_tokenizer": item.needs.same_tokenizer,
        "extras": item.needs.extras,
    }
    parameters = item.parameters.model_json_schema().get("properties", {})
    return {
        "verb": item.verb.name,
        "method": item.name,
        "summary": item.summary,
        "paper": item.paper,
        "needs": needs,
        "parameters": parameters,
    }


def _tell_method(item: Card, json_: bool) -> None:
    if json_:
        _print.as_json(_card_json(item))
        return
    click.echo(f"{item.verb.name} {item.name}\n\n{_print.wrapped(item.doc)}\n")
    if item.paper:
        click.echo(f"Paper: {item.paper}")
    click.echo(f"Needs: {', '.join(_needs_in_words(item))}\n")
    rows = [
        (name, "required" if field.is_required() else field.default, field.description or "")
        for name, field in item.parameters.model_fields.items()
    ]
    _print.table(["parameter", "default", "meaning"], rows)


def _needs_in_words(item: Card) -> Iterator[str]:
    """Yield what a method asks for, in the words of `lfm advise`."""
    needs = item.needs
    yield number_of_models(*needs.sources)
    yield f"{needs.access.name.lower()} of the models"
    yield f"{needs.data.name.lower()} data" if needs.data else "no data"
    yield "training" if needs.trains else "no training"
    yield from (text for wanted, text in ((needs.base, "the base"), (needs.extras, ", ".join(needs.extras))) if wanted)
    if needs.same_architecture or needs.same_tokenizer:
        same = ["architecture"] * needs.same_architecture + ["tokenizer"] * needs.same_tokenizer
        yield f"one {' and '.join(same)}"


@root.command(cls=options.Grouped)
@click.option(
    "--access",
    default="weights",
    show_default=True,
    metavar="LEVEL",
    help="What your models offer: labels, probs, logits, gradients, weights.",
)
@click.option(
    "--data",
    default="none",
    show_default=True,
    metavar="LEVEL",
    help="What data you have: none, statistics, unlabelled, few, labelled.",
)
@click.option("--train/--no-train", default=True, show_default=True, help="Whether training is possible.")
@click.option("--sources", type=click.IntRange(0), default=2, show_default=True, help="How many models you have.")
@click.option(
    "--base/--no-base", default=True, show_default=True, help="Whether you have the model they were tuned from."
)
@click.option(
    "--same-architecture/--different-architectures",
    default=True,
    help="Whether the models have one architecture.  [default: same]",
)
@click.option(
    "--same-tokenizer/--different-tokenizers",
    default=True,
    help="Whether the models have one tokenizer.  [default: same]",
)
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def advise(access: str, data: str, train: bool, sources: int, base: bool, json_: bool, **same: bool) -> None:
    """Say which methods can be run with the access and the data that you have, and why the others cannot."""
    have = Have(
        Access(level(Access, access)), Data(level(Data, data)), trains=train, sources=sources, base=base, **same
    )
    answers = [(item, item.needs.missing(have)) for item in cards().values()]
    answers.sort(key=lambda answer: bool(answer[1]))
    if json_:
        _print.as_json(
            [{"verb": c.verb.name, "method": c.name, "possible": not why, "missing": why} for c, why in answers]
        )
        return
    rows = [("no" if why else "yes", c.verb.name, c.name, "; ".join(why) or c.summary) for c, why in answers]
    _print.table(["", "verb", "method", "why"], rows)


@root.command(cls=options.Grouped)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--base", metavar="MODEL", help="The model the others were tuned from; looked for if left out.")
@click.option("--exact", is_flag=True, help="Compare all weights of several models, not a sample of them.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--digest", is_flag=True, help="Compute content digests (reads the weights).")
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch pickle weights (tensors only).")
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def inspect(models: tuple[str, ...], base: str | None, json_: bool, **how: bool) -> None:
    """Say what checkpoints hold, from their headers: size, types, architecture, tokenizer, where they come from.

    Of several, a sample of the weights also says which belong together: fine-tunes of one base, or strangers.
    """
    from lfm.cli._checkpoints import inspect_models

    inspect_models(models, base, json_=json_, **how)


@root.command(cls=options.Grouped)
@click.argument("before")
@click.argument("after")
@click.option("--allow-pickle", is_flag=True, help="Read PyTorch pickle weights (tensors only).")
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@click.pass_context
def diff(ctx: click.Context, before: str, after: str, allow_pickle: bool, json_: bool) -> None:
    """Compare two checkpoints: which tensors differ, and how far each block has moved. Exit code 1 if they differ."""
    from lfm.cli._checkpoints import compare

    if compare(before, after, allow_pickle, json_):
        ctx.exit(1)


@root.command(cls=options.Grouped)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@click.pass_context
def verify(ctx: click.Context, folder: Path, json_: bool) -> None:
    """Check that a checkpoint made by lfm is as it was written: digest, finite numbers. Exit code 1 if not."""
    from lfm.cli._checkpoints import verify_folder

    if not verify_folder(folder, json_):
        ctx.exit(1)


@root.command(cls=options.Grouped)
@click.argument("models", nargs=-1, metavar="MODEL...")
@options.measure_options
@click.option("--baseline", help="The model that others are compared with; the first if left out.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Folder for report.html and results.json."
)
@options.seed_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@options.settings_options
def evaluate(
    models: tuple[str, ...],
    accuracy: tuple[str, ...],
    perplexity: tuple[str, ...],
    drift: tuple[str, ...],
    baseline: str | None,
    out: Path | None,
    seed: int,
    json_: bool,
    **how: Any,
) -> None:
    """Measure models on data, side by side."""
    from lfm.cli._run import measure_and_tell

    measures = options.measures_from(accuracy, perplexity, drift)
    problems = [] if models else ["which models? name them: `lfm evaluate A B --perplexity text.txt`"]
    problems += [] if measures else ["what to measure? pass --accuracy DATA, --perplexity DATA or --drift DATA"]
    if problems:
        raise RequestError(*problems)
    if baseline:
        measures["baseline"] = baseline
    measure_and_tell(
        [options.inline(model) for model in models], measures, options.settings_from(**how), out, seed, json_
    )


@root.group(cls=Suggesting, invoke_without_command=True)
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@click.pass_context
def ledger(ctx: click.Context, ledger: Path | None, json_: bool) -> None:
    """What endpoints were asked and what it cost: list, show, export, forget. Alone, it lists."""
    if ctx.invoked_subcommand is None:
        from lfm.cli._ledger import tell_usage

        tell_usage(ledger, json_)
    elif json_ or ledger:
        ctx.default_map = {name: {"ledger": ledger, "json_": json_} for name in ("list", "show", "export", "forget")}


@ledger.command("list")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def list_endpoints(ledger: Path | None, json_: bool) -> None:
    """List the endpoints: requests, answers from the ledger, tokens, cost, what stayed unanswered."""
    from lfm.cli._ledger import tell_usage

    tell_usage(ledger, json_)


@ledger.command("show")
@click.argument("key")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def show_request(key: str, ledger: Path | None, json_: bool) -> None:
    """Print one request with its answer; KEY is the beginning of its key, as `export` tells it."""
    from lfm.cli._ledger import tell_request

    tell_request(ledger, key, json_)


@ledger.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--endpoint", metavar="URL", help="Of this endpoint alone: http://host/v1, or http://host/v1#model.")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def export_ledger(file: Path, endpoint: str | None, ledger: Path | None, json_: bool) -> None:
    """Write every request with its answer into FILE, a JSON object a line."""
    from lfm.cli._ledger import export

    export(ledger, file, endpoint, json_)


@ledger.command("forget")
@click.option("--endpoint", metavar="URL", required=True, help="http://host/v1, or http://host/v1#model.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def forget_endpoint(endpoint: str, yes: bool, ledger: Path | None, json_: bool) -> None:
    """Remove what an endpoint was asked and what it answered; it will be asked, and paid, again."""
    from lfm.cli._ledger import forget

    forget(ledger, endpoint, yes, json_)


@root.command(cls=options.Grouped)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--name", "names", multiple=True, metavar="NAME", help="Name to serve a model under; one for each model.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="PORT", help="0 for any free one."
)
@click.option("--token-env", metavar="VARIABLE", help="Ask clients for the token in this environment variable.")
@click.option("--allow-open", is_flag=True, help="Let other machines in without a token.")
@click.option(
    "--access",
    type=click.Choice(["labels", "probs"]),
    default="probs",
    show_default=True,
    help="What clients get: text and labels alone, or probabilities too.",
)
@click.option(
    "--together",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="INTEGER",
    help="Answer up to this many waiting prompts in one batch.",
)
@options.settings_options
def serve(
    models: tuple[str, ...],
    names: tuple[str, ...],
    host: str,
    port: int,
    token_env: str | None,
    allow_open: bool,
    access: str,
    together: int,
    **how: Any,
) -> None:
    """Serve models: the OpenAI protocol for text, /predict for texts and images to classify."""
    from lfm.cli._serve import serve_models
    from lfm.serve.run import Serving

    if not models:
        raise RequestError("which models? name them: `lfm serve runs/mine`")
    place = Serving(host, port, token_env, allow_open, Access(level(Access, access)), together)
    serve_models([options.inline(model) for model in models], names, place, options.settings_from(**how))


@root.command(cls=options.Grouped)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--data", metavar="DATA", help="A small labelled sample of the task.  [required]")
@click.option("--scores", metavar="A,B,...", help="Scores to compute, all if left out; the first decides the order.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, metavar="INTEGER", help="Tokens.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, metavar="INTEGER", help="Examples at a time."
)
@options.seed_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@options.settings_options
def rank(models: tuple[str, ...], data: str | None, scores: str | None, json_: bool, **how: Any) -> None:
    """Rank models for a task by a small labelled sample: scores, cost, and what could not be computed.

    Nothing is trained, and the models need not know the sample's classes.
    """
    from lfm.cli._rank import rank_and_tell

    problems = [] if models else ["which models? name them: `lfm rank A B C --data sample.csv`"]
    problems += [] if data else ["which task? pass a labelled sample: --data sample.csv"]
    if problems:
        raise RequestError(*problems)
    sizes = {name: how.pop(name) for name in ("length", "batch_size", "seed")}
    names = None if scores is None else [name.strip() for name in scores.split(",")]
    found = [options.inline(model) for model in models]
    rank_and_tell(found, options.inline(str(data)), names, options.settings_from(**how), json_, **sizes)


@root.group(cls=Suggesting)
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


@root.command("convert-config", cls=options.Grouped)
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


@root.command(cls=options.Grouped)
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def env(json_: bool) -> None:
    """Print versions, devices and folders, for bug reports."""
    from lfm.cli._environment import environment

    found = environment()
    if json_:
        _print.as_json(found)
    else:
        _print.table(["what", "value"], found.items())


@root.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: `eval "$(lfm completion bash)"`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise RequestError(f"no completion for {shell}")
    click.echo(found(root, {}, "lfm", "_LFM_COMPLETE").source())
