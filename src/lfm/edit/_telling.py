"""What the commands about patches tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lfm.checkpoint import Checkpoint, open_checkpoint
from lfm.cli import _print
from lfm.errors import RequestError
from lfm.recipe.patches import about, edited_of, read_edited, read_patch, verify
from lfm.recipe.step import Settings


def tell_made(checkpoint: Checkpoint, json_: bool) -> None:
    """Print what came of putting patches on or taking them off."""
    edited = edited_of(checkpoint)
    patches = [] if edited is None else [patch.id for patch in edited.patches]
    if json_:
        _print.as_json({"out": checkpoint.ref, "digest": checkpoint.digest, "patches": patches})
    else:
        click.echo(f"{checkpoint.ref}  {len(patches)} {'patch' if len(patches) == 1 else 'patches'}")


def tell_patches(folder: Path, json_: bool) -> None:
    """Print the patches of an edited folder."""
    edited = read_edited(folder)
    if edited is None:
        raise RequestError(f"{folder}: has no patches; `lfm edit` makes folders that have")
    told = [about(patch) for patch in edited.patches]
    if json_:
        _print.as_json({"base": edited.base, "ref": edited.ref, "patches": told})
        return
    rows = [
        [
            one["id"][:12],
            one["method"] or "-",
            len(one["requests"]),
            len(one["changes"]),
            _print.size(one["bytes"]),
            _print.number(one["scores"].get("efficacy")),
            _first(one["requests"]),
        ]
        for one in told
    ]
    _print.table(["patch", "method", "edits", "tensors", "size", "efficacy", "what"], rows, numbers=(2, 3, 4, 5))


def _first(requests: Sequence[Mapping[str, Any]]) -> str:
    if not requests:
        return "-"
    more = f" and {len(requests) - 1} more" if len(requests) > 1 else ""
    return f"{requests[0]['prompt']} -> {requests[0]['target']}{more}"


def tell_patch(place: Path, json_: bool) -> None:
    """Print one patch."""
    told = about(read_patch(place))
    if json_:
        _print.as_json(told)
        return
    given = [(key, str(value)) for key, value in told["parameters"].items()]
    head = [("patch", told["id"]), ("base", told["base"] or "any that fits"), ("method", told["method"] or "-")]
    _print.table(["", "value"], [*head, ("size", _print.size(told["bytes"])), *given])
    click.echo()
    asked = [(one["prompt"], one["target"], one.get("old") or "-") for one in told["requests"]]
    _print.table(["prompt", "target", "old"], asked)
    click.echo()
    changes = [
        (name, one["kind"], ", ".join(f"{role} {shape}" for role, shape in one.items() if role != "kind"))
        for name, one in told["changes"].items()
    ]
    _print.table(["tensor", "change", "shapes"], changes)
    if told["scores"]:
        click.echo()
        _print.table(
            ["measure", "value"], [(key, _print.number(value)) for key, value in told["scores"].items()], numbers=[1]
        )


def tell_verdict(model: str, base: str | None, json_: bool) -> bool:
    """Print whether an edited folder is what it says; returns whether it is, as far as can be seen."""
    found = verify(model, base)
    if json_:
        _print.as_json(dataclasses.asdict(found) | {"holds": found.holds})
        return found.holds
    for problem in found.problems:
        click.echo(problem)
    click.echo(f"weights {_said(found.as_written, 'as written', 'changed since they were written', 'without lineage')}")
    missing = "not compared: the base is not where it was, name it with --base"
    click.echo(f"patches {_said(found.whole, 'on their base give these weights', 'give other weights', missing)}")
    return found.holds


def _said(value: bool | None, yes: str, no: str, unknown: str) -> str:
    return unknown if value is None else yes if value else no


def tell_audit(before: str, after: str, allow_pickle: bool, json_: bool) -> None:
    """Print how two models differ and what that looks like."""
    from lfm.edit._audit import audit

    one, two = (open_checkpoint(ref, allow_pickle=allow_pickle).weights for ref in (before, after))
    found = audit(one, two)
    if json_:
        _print.as_json(dataclasses.asdict(found))
        return
    click.echo(f"{found.verdict}: {found.why}")
    if found.differences:
        click.echo()
        rows = [
            [d.name, f"{d.share:.0%}", _print.number(d.relative), d.rank or "many", min(d.shape, default=1)]
            for d in found.differences
        ]
        _print.table(["tensor", "elements", "|change| / |before|", "rank", "of"], rows, numbers=(1, 2, 3, 4))


def tell_test(model: str, data: Any, baseline: str | None, settings: Settings, json_: bool) -> None:
    """Print how a model does on edit requests, and what it says to each of them."""
    from lfm.edit._trial import test

    found = test(model, data, baseline, settings)
    if json_:
        _print.as_json(found)
        return
    _print.table(
        ["measure", "value"], [(key, _print.number(value)) for key, value in found["metrics"].items()], numbers=[1]
    )
    click.echo()
    rows = [
        (one["prompt"], one["target"], one["after"].strip(), "yes" if one["efficacy"] else "no")
        for one in found["edits"]
    ]
    _print.table(["prompt", "target", "says", "in force"], rows)


def tell_plan(model: str, data: Any, settings: Settings, seed: int, json_: bool) -> None:
    """Print what a model says to requests now, and which of them get in each other's way."""
    from lfm.edit._trial import foresee

    found = foresee(model, data, settings, seed)
    if json_:
        _print.as_json(found)
        return
    rows = [
        (one["prompt"], one["target"], one["before"].strip(), "yes" if one["said"] else "no", one["subject"] or "-")
        for one in found["edits"]
    ]
    _print.table(["prompt", "target", "says now", "already", "subject"], rows)
    for note in found["notes"]:
        click.echo(f"note: {note}", err=True)
