"""Commands about methods: what there is, and what can be done with what one has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from lfm.cli import _options as options
from lfm.cli import _print
from lfm.errors import RequestError, did_you_mean
from lfm.method import Access, Card, Data, Have, card, cards, level, number_of_models, verbs


@click.command(cls=options.Grouped)
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


@click.command(cls=options.Grouped)
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
