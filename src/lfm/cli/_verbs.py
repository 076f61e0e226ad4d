"""`lfm merge ties A B --base C -o out`: a command for every method, generated from its card."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm.cli import _options as options
from lfm.cli._run import run_and_tell
from lfm.errors import RequestError, did_you_mean
from lfm.method import Card, Verb, first_line, methods_of
from lfm.recipe.foreign import reader

if TYPE_CHECKING:
    from lfm.recipe.schema import Recipe

CONFIG = "config"  # the hidden command behind `--config FILE`


class Suggesting(click.Group):
    """A group that answers a misspelt command with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"no such command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


class VerbGroup(Suggesting):
    """The methods of one verb; a method's options are made when it is asked for."""

    def __init__(self, verb: Verb) -> None:
        super().__init__(verb.name, help=verb.summary, no_args_is_help=True)
        self._verb = verb

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let `--config FILE`, wherever it stands, take the place of a method."""
        if any(arg.split("=")[0] == f"--{CONFIG}" for arg in args) and reader(self._verb) is not None:
            if args[0] in methods_of(self._verb.name):
                raise click.UsageError(f"the file that --{CONFIG} names says the method, too; leave {args[0]} out", ctx)
            args = [CONFIG, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*methods_of(self._verb.name), *commands_of(self._verb)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == CONFIG and reader(self._verb) is not None:
            return config_command(self._verb)
        card = methods_of(self._verb.name).get(cmd_name)
        return commands_of(self._verb).get(cmd_name) if card is None else method_command(card)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        methods = methods_of(self._verb.name)
        with formatter.section("Methods"):
            formatter.write_dl([(name, card.summary) for name, card in methods.items()])
        others = commands_of(self._verb)
        if others:
            with formatter.section("With what they make"):
                formatter.write_dl([(name, first_line(command.help)) for name, command in others.items()])
        with formatter.section("Examples"):
            for line in (_example(card) for card in list(methods.values())[:3]):
                formatter.write_text(line)
            if reader(self._verb) is not None:
                formatter.write_text(f"lfm {self._verb.name} --{CONFIG} theirs.yaml -o out")
            formatter.write_text(f"lfm {self._verb.name} METHOD --help")


def commands_of(verb: Verb) -> dict[str, click.Command]:
    """Return what a verb has beside its methods: `COMMANDS` of the `_commands.py` in its package, if there is one."""
    name = f"{verb.package}._commands"
    if importlib.util.find_spec(name) is None:
        return {}
    return {str(command.name): command for command in importlib.import_module(name).COMMANDS}


class MethodCommand(options.Grouped):
    """The command of one method."""

    def __init__(self, card: Card, made: click.Command) -> None:
        fields = list(options.field_params(card.verb.inputs, card.parameters))
        super().__init__(
            card.name,
            help=_rewrapped(card.doc) + (f"\n\nPaper: {card.paper}" if card.paper else ""),
            short_help=card.summary,
            callback=made.callback,
            params=[*fields, *made.params],
        )
        self._example = _example(card)
        inputs = card.verb.inputs.model_fields
        self.arguments = {name: field.description or "" for name, field in inputs.items() if options.is_argument(field)}
        self.headings = {
            "Models and data": list(inputs),
            "Method": list(card.parameters.model_fields),
            **options.HEADINGS,
        }

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Example"):
            formatter.write_text(self._example)


def _example(card: Card) -> str:
    return options.example(card.verb.inputs, f"{card.verb.name} {card.name}", card.needs.base)


def method_command(card: Card) -> click.Command:
    """Return the command that runs one method."""

    @options.settings_options
    @options.measure_options
    @options.run_options
    @options.seed_option
    @click.option("--print-recipe", is_flag=True, help="Print the recipe of this command and do nothing.")
    def command(**values: Any) -> None:
        _run_method(card, values)

    return MethodCommand(card, click.command()(command))


def _rewrapped(doc: str) -> str:
    """Let click wrap prose and leave formulas and lists as they are."""
    paragraphs = doc.split("\n\n")
    return "\n\n".join(f"\b\n{part}" if part.startswith((" ", "1.")) else part for part in paragraphs)


def config_command(verb: Verb) -> click.Command:
    """Return the command that runs a configuration of another program."""

    @click.command(CONFIG, cls=options.Grouped, help=_config_help(verb), hidden=True)
    @click.option(
        f"--{CONFIG}", "path", type=click.Path(path_type=Path), required=True, metavar="FILE", help="What to run."
    )
    @options.settings_options
    @options.measure_options
    @options.run_options
    @options.seed_option
    @click.option("--print-recipe", is_flag=True, help="Print the recipe that means the same and do nothing.")
    def command(path: Path, **values: Any) -> None:
        from lfm.api import from_config

        _run(lambda **how: from_config(path, verb=verb.name, options={}, **how), values)

    return command


def _config_help(verb: Verb) -> str:
    """Return what the verb's reader says of itself, and where the rest stands."""
    return f"{first_line(reader(verb).__doc__)}\n\n`lfm convert-config FILE` prints the recipe that means the same."


def _run_method(card: Card, values: dict[str, Any]) -> None:
    from lfm.api import one_step

    names = options.option_names(card.verb.inputs, card.parameters)
    fields = {name: values.pop(name) for name in names}

    def make(**how: Any) -> Recipe:
        return one_step(card.verb.name, card.name, options.given_values(fields), options=names, **how)

    _run(make, values)


def _run(make: Callable[..., Recipe], values: dict[str, Any]) -> None:
    """Make a recipe, with what the options that all commands share say, and run it."""
    names = ("device", "threads", "memory", "allow_pickle", "quiet", "max_queries", "max_cost", "ledger")
    settings = options.settings_from(**{name: values.pop(name) for name in names})
    measures = options.measures_from(*(values.pop(name) for name in ("accuracy", "perplexity", "drift")))
    out, overwrite, dry_run, json_, seed, print_recipe = (
        values.pop(name) for name in ("out", "overwrite", "dry_run", "json_", "seed", "print_recipe")
    )
    try:
        recipe = make(out=out, seed=seed, evaluate=measures)
    except RequestError as error:
        missing = ["where to? pass -o FOLDER"] if out is None and not print_recipe else []
        raise RequestError(*error.problems, *missing) from None
    if print_recipe:
        click.echo(recipe.text, nl=False)
        return
    run_and_tell(recipe, settings, out, overwrite=overwrite, dry_run=dry_run, json_=json_)
