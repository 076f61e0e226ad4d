"""What every method has to fulfil, whoever wrote it: `check_card` passes, or says what is amiss.

A package of plug-ins can run it on its own cards: `check_card(lfm.cards()["merge", "median"])`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from tests.merging import merge, near, tensors

from lfm.cli._root import root
from lfm.method import Access, Card, Data, Have, Method, Needs
from lfm.recipe.schema import json_schema
from lfm.reuse.merge import _engine
from lfm.reuse.merge._machine import kernels

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


def stands_in_the_schema_of_recipes(card: Card) -> None:
    steps = json_schema()["properties"]["steps"]["additionalProperties"]["oneOf"]
    (found,) = [step for step in steps if step["title"] == f"{card.verb.name} {card.name}"]
    assert found["description"] == card.summary
    assert {*card.parameters.model_fields, *card.verb.inputs.model_fields} < set(found["properties"])


# --- merges: properties of all of them, on small random models

SELECTIVE = {"arcee_fusion"}  # takes over what moved most, whatever its parameters: never all of a source
ODD = {"odd": torch.tensor([-0.0, 0.0, 1e-40, -1e-44, 3e38, 1.0])}  # what arithmetic may lose: signs of 0, denormals


def _sources(card: Card) -> int:
    low, high = card.needs.sources
    return min(max(low, 3), high or 3)


def _run(card: Card, method: Method, sources, base, **options):
    with tempfile.TemporaryDirectory() as folder:
        return merge(method, sources, base if card.needs.base else None, at=Path(folder), **options)


def _whole(card: Card) -> Method:
    """The method, with nothing dropped and the whole way gone."""
    fields = card.parameters.model_fields
    return card.load()(**{name: 1 for name in ("density", "scale", "alpha", "t") if name in fields})


def _close(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def keeps_shapes_types_and_numbers(card: Card) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = tensors(0, dtype)
        found = _run(card, card.load()(), [near(base, seed) for seed in range(1, 1 + _sources(card))], base)
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, dtype) for n, t in base.items()}
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert all(tensor.any() for tensor in found.values())


def gives_back_what_is_everywhere_the_same(card: Card) -> None:
    """Sources that are the base give the base bit for bit; without a base, equal models give that model."""
    model = {**tensors(0), **ODD}
    for sources in {card.needs.sources[0], _sources(card)}:
        found = _run(card, card.load()(), [model] * sources, model)
        if card.needs.base:
            same = {name: torch.equal(found[name].view(torch.int32), model[name].view(torch.int32)) for name in model}
            assert all(same.values()), same
        else:
            _close(found, model)


def gives_back_a_single_source(card: Card) -> None:
    if card.needs.sources[0] == 1 and card.name not in SELECTIVE:
        source = near(tensors(0), 1)
        _close(_run(card, _whole(card), [source], tensors(0)), source)


def does_not_depend_on_the_order_of_sources(card: Card) -> None:
    if card.needs.sources[1] is None:
        base, weights = tensors(0), [1.0, 0.5, 2.0] if card.load().weighted else None
        sources = [near(base, seed) for seed in (1, 2, 3)]
        turned, turned_weights = [sources[i] for i in (2, 0, 1)], weights and [weights[i] for i in (2, 0, 1)]
        for method in (card.load()(), _whole(card)):
            one = _run(card, method, sources, base, weights=weights)
            _close(_run(card, method, turned, base, weights=turned_weights), one)


def does_not_depend_on_how_it_runs(card: Card) -> None:
    """Threads, the size of a chunk, and whether there is a compiler: the same bytes."""
    base = tensors(0, shapes={"w": (31, 33), "v": (700,), "none": (0, 3), "one": ()})
    sources = [near(base, seed) for seed in range(1, 1 + _sources(card))]
    one, two = (_run(card, card.load()(), sources, base, threads=threads) for threads in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "CHUNK", 64)
        patch.setattr(_engine, "KEEP", 0)
        three = _run(card, card.load()(), sources, base)
        patch.setattr(kernels, "native", lambda wide: None)
        four = _run(card, card.load()(), sources, base)
    for other in (three, four):
        assert all(torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one)


def drops_nothing_at_density_one(card: Card) -> None:
    if "density" in card.parameters.model_fields:
        base = tensors(0)
        sources = [{name: tensor + size for name, tensor in base.items()} for size in (0.25, 0.5, 1)][: _sources(card)]
        one, two = (_run(card, _whole(card), sources, base, seed=seed) for seed in (0, 1))
        assert all(torch.equal(one[name], two[name]) and (one[name] > base[name] + 0.2).all() for name in base)


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
MERGE_CHECKS: tuple[Callable[[Card], None], ...] = (
    keeps_shapes_types_and_numbers,
    gives_back_what_is_everywhere_the_same,
    gives_back_a_single_source,
    does_not_depend_on_the_order_of_sources,
    does_not_depend_on_how_it_runs,
    drops_nothing_at_density_one,
)


def checks_for(card: Card) -> tuple[Callable[[Card], None], ...]:
    """Return the checks that a card has to pass."""
    return (*CHECKS, *(MERGE_CHECKS if card.verb.name == "merge" else ()))


def check_card(card: Card) -> None:
    """Raise AssertionError with the first thing that is amiss with a method."""
    for check in checks_for(card):
        check(card)
