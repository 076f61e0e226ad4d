"""What every method has to fulfil, whoever wrote it: `check_card` passes, or says what is amiss.

A package of plug-ins can run it on its own cards: `check_card(lfm.cards()["merge", "median"])`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from tests.conformance.merges import MERGE_CHECKS

from lfm.cli._root import root
from lfm.method import Access, Card, Data, Have, Needs, cards
from lfm.recipe.schema import json_schema

LINES = 150
LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "pydantic"}
SHARES = re.compile(r"alpha|density|dropout|t|temperature|.*_(rate|decay|share|norm|eps)|learning_rate|momentum|warmup")


def says_what_it_is(card: Card) -> None:
    assert re.fullmatch(r"[A-Z].{9,110}\.", card.summary), "the first line is one sentence, which the listings show"
    assert card.doc == card.summary or card.doc.startswith(f"{card.summary}\n\n"), "an empty line follows the first"
    assert re.fullmatch(r"(https://\S+)?", card.paper), "the paper is an address"
    assert re.fullmatch(r"[a-z][a-z0-9_]*", card.name), "the name is a word in recipes and on the command line"


def says_what_it_needs(card: Card) -> None:
    assert isinstance(card.needs, Needs)
    assert card.load().needs == card.needs
    assert card.load().paper == card.paper
    low, high = card.needs.sources
    assert 1 <= low <= (high or low)
    have = Have(Access.WEIGHTS, Data.LABELLED, trains=True, sources=low)
    assert [line for line in card.needs.missing(have) if "package" not in line] == []


def is_final(card: Card) -> None:
    method = card.load()
    (contract,) = method.__bases__
    assert contract.__module__ in (f"{card.verb.package}._contract", "lfm.method")
    assert inspect.isabstract(contract)
    assert not inspect.isabstract(method), "it leaves methods of its contract out"
    assert method.__subclasses__() == []


def reads_the_same_without_being_imported(card: Card) -> None:
    read, loaded = card.parameters.model_json_schema(), card.load().model_json_schema()
    assert read.get("properties") == loaded.get("properties")
    assert read.get("required") == loaded.get("required")
    defaults = [
        {n: (f.annotation, f.default) for n, f in m.model_fields.items()} for m in (card.parameters, card.load())
    ]
    assert defaults[0] == defaults[1]


def _numbers(card: Card) -> Iterator[tuple[str, dict]]:
    for name, schema in card.parameters.model_json_schema().get("properties", {}).items():
        for kind in (schema, *schema.get("anyOf", ())):
            if kind.get("type") in ("integer", "number"):
                yield name, kind


def describes_and_bounds_its_parameters(card: Card) -> None:
    for name, schema in card.parameters.model_json_schema().get("properties", {}).items():
        assert re.fullmatch(r"\S.{5,}\.", schema.get("description", ""), re.DOTALL), (
            f"{name}: a sentence that says what"
        )
    for name, kind in _numbers(card):
        bounded = {"minimum", "exclusiveMinimum"} & set(kind)
        assert bounded or (kind["type"] == "number" and not SHARES.fullmatch(name)), f"{name}: has a natural range"


def takes_nothing_else(card: Card) -> None:
    for model in (card.parameters, card.load()):
        assert model.model_config.get("extra") == "forbid"
        assert model.model_config.get("frozen")
        with pytest.raises(ValidationError, match="not permitted"):
            model(no_such_parameter=1)
        for name, _ in _numbers(card):
            with pytest.raises(ValidationError):
                model(**{name: float("nan")})
            with pytest.raises(ValidationError, match="frozen"):
                setattr(model.model_construct(), name, 1)


def shares_no_name_with_what_the_verb_takes(card: Card) -> None:
    inputs, parameters = set(card.verb.inputs.model_fields), set(card.parameters.model_fields)
    assert not inputs & parameters
    assert card.verb.name not in inputs | parameters
    command = root.get_command(None, card.verb.name).get_command(None, card.name)
    options = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    assert len(options) == len(set(options)), "an option that all commands have"


def imports_little(card: Card) -> None:
    """What a method file imports when it is imported; optional libraries come in inside functions."""
    text = card.path.read_text(encoding="utf-8")
    own = {card.module.rpartition(".")[0], card.verb.package}
    for node in ast.parse(text).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [node.module]
        for name in names:
            folder, _, last = name.rpartition(".")
            allowed = name.partition(".")[0] in LIBRARIES or name == "lfm.method"
            private = any((folder == home and last.startswith("_")) or name.startswith(f"{home}._") for home in own)
            assert allowed or private, f"a method file does not import {name}"
    assert len(text.splitlines()) <= LINES, "the engine takes what methods share"


def has_a_help_page(card: Card) -> None:
    done = CliRunner().invoke(root, [card.verb.name, card.name, "--help"], prog_name="lfm")
    assert done.exit_code == 0, done.output
    assert card.summary.split()[0] in done.output
    for name in card.parameters.model_fields:
        assert f"--{name.replace('_', '-')}" in done.output


@cache
def _steps(names: tuple[tuple[str, str], ...]) -> list[dict]:
    """Return the schemas of all steps: making them takes a while, and they are the same until a method is added."""
    assert names
    return json_schema()["properties"]["steps"]["additionalProperties"]["oneOf"]


def stands_in_the_schema_of_recipes(card: Card) -> None:
    (found,) = [step for step in _steps(tuple(cards())) if step["title"] == f"{card.verb.name} {card.name}"]
    assert found["description"] == card.summary
    assert {*card.parameters.model_fields, *card.verb.inputs.model_fields} < set(found["properties"])


CHECKS: tuple[Callable[[Card], None], ...] = (
    says_what_it_is,
    says_what_it_needs,
    is_final,
    reads_the_same_without_being_imported,
    describes_and_bounds_its_parameters,
    takes_nothing_else,
    shares_no_name_with_what_the_verb_takes,
    imports_little,
    has_a_help_page,
    stands_in_the_schema_of_recipes,
)


def checks_for(card: Card) -> tuple[Callable[[Card], None], ...]:
    """Return the checks that a card has to pass."""
    return (*CHECKS, *(MERGE_CHECKS if card.verb.name == "merge" else ()))


def check_card(card: Card) -> None:
    """Raise AssertionError with the first thing that is amiss with a method."""
    for check in checks_for(card):
        check(card)
