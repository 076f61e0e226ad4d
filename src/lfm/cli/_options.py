"""Options that commands share, and options made from the fields of methods and inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lfm.data import DataSpec
from lfm.method import choices
from lfm.models.ref import ModelRef
from lfm.recipe._yaml import parse_yaml
from lfm.recipe.step import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

HEADINGS = {
    "Output": ("out", "overwrite", "dry_run", "json_", "print_recipe"),
    "Measures": ("accuracy", "perplexity", "drift", "baseline"),
    "Running": ("seed", "device", "threads", "memory", "allow_pickle", "quiet"),
    "Endpoints": ("max_queries", "max_cost", "ledger"),
}


class Grouped(click.Command):
    """A command whose help shows its options under headings."""

    headings: Mapping[str, Sequence[str]] = HEADINGS
    arguments: Mapping[str, str] = {}  # what each argument means

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading_of = {name: heading for heading, names in self.headings.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in ("Options", *self.headings)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if parameter.name in self.arguments:
                record = (str(parameter.metavar), self.arguments[parameter.name])
            if record is not None and "--help" not in parameter.opts:
                sections[heading_of.get(parameter.name or "", "Options")].append(record)
        last = [heading for heading, records in sections.items() if records][-1:] or ["Options"]
        sections[last[0]].append(("-h, --help", "Show this message and exit."))
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records, col_max=26)


seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="INTEGER", help="Seed of everything random."
)


def settings_options(command: Command) -> Command:
    """Add the options that say how to run, which do not change what comes out."""
    for option in reversed(
        (
            click.option(
                "--device", default="cpu", show_default=True, help="Where models run: cpu, cuda, cuda:1, mps."
            ),
            click.option(
                "--threads", type=click.IntRange(1), metavar="INTEGER", help="Worker threads; all cores if left out."
            ),
            click.option(
                "--memory", metavar="SIZE", callback=_bytes, help="Most that a merge may hold, such as 500MB."
            ),
            click.option("--allow-pickle", is_flag=True, help="Read PyTorch pickle weights (tensors only)."),
            click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
            click.option(
                "--max-queries", type=click.IntRange(0), metavar="INTEGER", help="Most new requests of each step."
            ),
            click.option(
                "--max-cost", type=click.FloatRange(0), metavar="NUMBER", help="Most that they may cost, by `endpoint`."
            ),
            ledger_option,
        )
    ):
        command = option(command)
    return command


ledger_option = click.option(
    "--ledger", type=click.Path(path_type=Path), metavar="FILE", help="Where answers of endpoints are kept."
)


def settings_from(
    device: str,
    threads: int | None,
    memory: int | None,
    allow_pickle: bool,
    quiet: bool,
    max_queries: int | None = None,
    max_cost: float | None = None,
    ledger: Path | None = None,
) -> Settings:
    """Return the settings that those options describe."""
    settings = Settings(
        device=device,
        allow_pickle=allow_pickle,
        quiet=quiet,
        memory=memory,
        max_queries=max_queries,
        max_cost=max_cost,
        ledger=ledger,
    )
    return settings if threads is None else replace(settings, threads=threads)


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _bytes(ctx: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Return the bytes that `500MB`, `1.5G` or `2GiB` stand for."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{text!r} is no size; write 500MB, 1.5GB or 2GiB", ctx, option)
    unit = 1024 ** "kmgt".index(match[2], 0) * 1024 if match[3] and match[2] else UNITS[match[2]]
    return int(float(match[1]) * unit)


def run_options(command: Command) -> Command:
    """Add the options of everything that writes an output folder."""
    for option in reversed(
        (
            click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Folder to write."),
            click.option("--overwrite", is_flag=True, help="Replace the folder, if lfm made it."),
            click.option(
                "-n", "--dry-run", is_flag=True, help="Say what would be read and written, and every problem."
            ),
            click.option("--json", "json_", is_flag=True, help="Answer in JSON."),
        )
    ):
        command = option(command)
    return command


def measure_options(command: Command) -> Command:
    """Add the options that ask for measures: what a recipe writes under `evaluate`."""
    for option in reversed(
        (
            click.option("--accuracy", multiple=True, metavar="[NAME=]DATA", help="Measure classifiers on this data."),
            click.option("--perplexity", multiple=True, metavar="[NAME=]DATA", help="Measure language models on it."),
            click.option(
                "--drift", multiple=True, metavar="[NAME=]DATA", help="Measure divergence from the baseline on it."
            ),
        )
    ):
        command = option(command)
    return command


def measures_from(accuracy: tuple[str, ...], perplexity: tuple[str, ...], drift: tuple[str, ...]) -> dict[str, Any]:
    """Return the `evaluate` section that those options describe; empty when none was given."""
    given = {"accuracy": accuracy, "perplexity": perplexity, "drift": drift}
    return {measure: dict(_named_data(text) for text in texts) for measure, texts in given.items() if texts}


def _named_data(text: str) -> tuple[str, Any]:
    name, equals, data = text.partition("=")
    if not equals or "{" in name or "/" in name:
        name, data = "", text
    value = inline(data)
    path = value.get("path", "data") if isinstance(value, dict) else value
    return name or Path(str(path)).stem or str(path), value


def inline(text: str) -> Any:
    """Return an option's value: YAML where it starts with a brace or bracket, otherwise the text itself."""
    return parse_yaml(text, repr(text)).value if text.startswith(("{", "[")) else text


def field_params(inputs: type[BaseModel], parameters: type[BaseModel]) -> Iterator[click.Parameter]:
    """Yield a command's arguments and options from the fields of a verb's inputs and a method's parameters."""
    for name, field in inputs.model_fields.items():
        if is_argument(field):
            several = _without_none(field.annotation) == list[ModelRef]
            metavar = f"{name.upper().removesuffix('S')}..." if several else name.upper()
            yield click.Argument([name], nargs=-1 if several else 1, required=False, metavar=metavar)
        else:
            yield _option(name, field)
    for name, field in parameters.model_fields.items():
        yield _option(name, field)


def is_argument(field: FieldInfo) -> bool:
    """Whether an input is given by its place on the command line: models that have to be named are."""
    return field.is_required() and _without_none(field.annotation) in (ModelRef, list[ModelRef])


def option_names(inputs: type[BaseModel], parameters: type[BaseModel]) -> dict[str, str]:
    """Return what a complaint calls each field: `--density`, `MODELS`."""
    fields = {**inputs.model_fields, **parameters.model_fields}
    return {name: name.upper() if is_argument(field) else _flag(name) for name, field in fields.items()}


def example(inputs: type[BaseModel], words: str, base: bool) -> str:
    """Return a command line with all that has to be given."""
    parts = [f"lfm {words}"]
    for name, field in inputs.model_fields.items():
        kind = _without_none(field.annotation)
        if is_argument(field):
            parts.append("A B" if kind == list[ModelRef] else "MODEL")
        elif field.is_required():
            parts.append(f"{_flag(name)} {'train.jsonl' if kind is DataSpec else _metavar(kind)}")
        elif name == "base" and base:
            parts.append("--base BASE")
    return " ".join([*parts, "-o out"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(name: str, field: FieldInfo) -> click.Option:
    kind = _without_none(field.annotation)
    text = (field.description or "") + _default(field)
    if kind is bool:
        return click.Option([f"{_flag(name)}/--no-{name.replace('_', '-')}", name], default=None, help=text)
    if choices(kind):
        return click.Option(
            [_flag(name), name], type=click.Choice([str(choice) for choice in choices(kind)]), help=text
        )
    if get_origin(kind) is list:
        return click.Option([_flag(name), name], metavar="A,B,...", callback=_listed, help=text)
    return click.Option([_flag(name), name], metavar=_metavar(kind), help=text)


def _listed(ctx: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """Let `1,2` stand for `[1,2]`."""
    return text if text is None or text.startswith(("[", "{")) else f"[{text}]"


def _default(field: FieldInfo) -> str:
    bounds = " ".join(
        f"{sign} {getattr(bound, attribute):g}"
        for bound in field.metadata
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(bound, attribute, None) is not None
    )
    default = field.default
    shown = [f"default: {default}"] if default not in (None, PydanticUndefined, {}) and default is not False else []
    shown += [bounds] if bounds else []
    shown += ["required"] if field.is_required() else []
    return f"  [{'; '.join(shown)}]" if shown else ""


def _metavar(kind: Any) -> str:
    if kind is ModelRef:
        return "MODEL"
    if kind is DataSpec:
        return "DATA"
    return {float: "NUMBER", int: "INTEGER"}.get(kind, "TEXT")


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


def given_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return what was given on the command line as a recipe would hold it."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            if value:
                found[name] = [inline(item) for item in value]
        elif isinstance(value, str):
            found[name] = inline(value)
        elif value is not None:
            found[name] = value
    return found
