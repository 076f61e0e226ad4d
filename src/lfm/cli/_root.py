"""The commands. Each imports what it needs when it runs, so that help and listings answer at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lfm import __version__
from lfm.cli import _options as options
from lfm.cli import _print
from lfm.cli._ledger_commands import ledger
from lfm.cli._methods import advise, methods
from lfm.cli._recipes import convert_config, recipes, run, validate
from lfm.cli._verbs import Suggesting, VerbGroup
from lfm.errors import RequestError
from lfm.method import Access, first_line, level, methods_of, verbs


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
    "Look at models": ("evaluate", "rank", "inspect", "diff", "verify"),
    "Use models": ("serve", "ledger"),
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


for _command in (run, validate, methods, advise, ledger, recipes, convert_config):
    root.add_command(_command)


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
@click.option("--round", "decimals", type=click.IntRange(0, 9), metavar="N", help="Tell probabilities to N decimals.")
@click.option("--top-k", type=click.IntRange(1), metavar="N", help="Tell the N most probable classes or tokens alone.")
@click.option(
    "--perturb",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    metavar="SHARE",
    help="Share of noise in the probabilities of classes, the same for the same input; the likeliest class stays.",
)
@click.option("--secret-env", metavar="VARIABLE", help="Environment variable that holds what the noise is keyed with.")
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
    decimals: int | None,
    top_k: int | None,
    perturb: float,
    secret_env: str | None,
    **how: Any,
) -> None:
    """Serve models: the OpenAI protocol for text, /predict for texts and images to classify."""
    from lfm.cli._serve import serve_models
    from lfm.models.defence import Defence
    from lfm.serve.run import Serving

    if not models:
        raise RequestError("which models? name them: `lfm serve runs/mine`")
    place = Serving(
        *(host, port, token_env, allow_open, Access(level(Access, access)), together),
        defence=Defence(round=decimals, top_k=top_k, perturb=perturb),
        secret_env=secret_env,
    )
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
