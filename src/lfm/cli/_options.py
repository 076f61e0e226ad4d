"""Options that commands share, and options made from the fields of methods and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import click
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lfm.data import DataSpec
from lfm.errors import RequestError
from lfm.method import choices
from lfm.models.ref import ModelRef
from lfm.recipe.step import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


def settings_options(command: Command) -> Command:
    """Add the options that say how to run, which do not change what comes out."""
    for option in reversed(
        (
            click.option("--device", default="cpu", show_default=True, help="Where models run: cpu, cuda, mps."),
            click.option("--threads", type=click.IntRange(1), help="Worker threads; all cores if left out."),
            click.option("--allow-pickle", is_flag=True, help="Read PyTorch pickle weights (tensors only)."),
            click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
        )
    ):
        command = option(command)
    return command


def settings_from(device: str, threads: int | None, allow_pickle: bool, quiet: bool) -> Settings:
    """Return the settings that those options describe."""
    settings = Settings(device=device, allow_pickle=allow_pickle, quiet=quiet)
    return settings if threads is None else Settings(device, threads, allow_pickle, quiet)


def run_options(command: Command) -> Command:
    """Add the options of everything that writes an output folder."""
    for option in reversed(
        (
            click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write."),
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
    if not text.startswith(("{", "[")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"{text}: not valid YAML: {str(error).splitlines()[0]}") from None


def field_params(inputs: type[BaseModel], parameters: type[BaseModel]) -> Iterator[click.Parameter]:
    """Yield a command's arguments and options from the fields of a verb's inputs and a method's parameters."""
    for name, field in inputs.model_fields.items():
        kind = _without_none(field.annotation)
        if field.is_required() and kind in (ModelRef, list[ModelRef]):
            yield click.Argument([name], nargs=-1 if kind == list[ModelRef] else 1, required=False)
        else:
            yield _option(name, field)
    for name, field in parameters.model_fields.items():
        yield _option(name, field)


def _option(name: str, field: FieldInfo) -> click.Option:
    kind = _without_none(field.annotation)
    flag = "--" + name.replace("_", "-")
    text = (field.description or "") + _default(field)
    if kind is bool:
        return click.Option([f"{flag}/--no-{name.replace('_', '-')}", name], default=None, help=text)
    if choices(kind):
        return click.Option([flag, name], type=click.Choice([str(choice) for choice in choices(kind)]), help=text)
    return click.Option([flag, name], metavar=_metavar(kind), help=text)


def _default(field: FieldInfo) -> str:
    bounds = " ".join(
        f"{sign} {getattr(bound, attribute):g}"
        for bound in field.metadata
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(bound, attribute, None) is not None
    )
    default = field.default
    shown = [f"default: {default}"] if default not in (None, PydanticUndefined) and default != {} else []
    shown += [bounds] if bounds else []
    shown += ["required"] if field.is_required() else []
    return f"  [{'; '.join(shown)}]" if shown else ""


def _metavar(kind: Any) -> str:
    if kind is ModelRef:
        return "MODEL"
    if kind is DataSpec:
        return "DATA"
    if get_origin(kind) is list:
        return "[A,B,...]"
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
