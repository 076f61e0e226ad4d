"""Serving models from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from pydantic import ValidationError

from lfm.errors import RequestError
from lfm.models.ref import ModelRef
from lfm.recipe.step import Settings
from lfm.serve.run import Serving, serve


def serve_models(models: Sequence[Any], names: Sequence[str], how: Serving, settings: Settings) -> None:
    """Serve models until Ctrl-C; what is served where is told on stderr."""
    refs, problems = [], []
    for model in models:
        try:
            refs.append(ModelRef.model_validate(model))
        except ValidationError as error:
            problems += [f"{model}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()]
    if problems:
        raise RequestError(*problems)

    def opened(ref: ModelRef) -> Any:
        from lfm.models.open import Alone, open_in

        return open_in(Alone(settings=settings, run="serve"), ref)

    serve(refs, names, how, opened, lambda line: click.echo(line, err=True))
