"""`inspect`, `diff`, `verify`: looking at checkpoints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from lfm.checkpoint import Checkpoint, Weights, combine, open_checkpoint
from lfm.cli import _print
from lfm.errors import RequestError, plural


def describe(ref: str, tensors: bool, digest: bool, allow_pickle: bool) -> dict[str, Any]:
    """Return what a checkpoint's headers and configs say."""
    checkpoint = open_checkpoint(ref, allow_pickle=allow_pickle)
    specs = checkpoint.specs
    found: dict[str, Any] = {
        "model": ref,
        "architecture": ", ".join((checkpoint.config or {}).get("architectures") or ()) or None,
        "parameters": sum(spec.size for spec in specs.values() if spec.floating),
        "bytes": checkpoint.weights.nbytes,
        "tensors": len(specs),
        "types": dict(Counter(spec.dtype for spec in specs.values())),
        "files": len({spec.path for spec in specs.values()}),
        "vocabulary": len(checkpoint.vocabulary) if checkpoint.vocabulary else None,
        "made by": _origin(checkpoint),
    }
    if digest:
        found["digest"] = checkpoint.digest
    if tensors:
        found["specs"] = {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in specs.items()}
    return found


def _origin(checkpoint: Checkpoint) -> str | None:
    lineage = checkpoint.lineage
    if lineage is None:
        return None
    parents = ", ".join(str(parent["name"]) for parent in lineage.get("parents", ()))
    return f"{lineage.get('verb')} {lineage.get('method')} of {parents}"


def tell(found: list[dict[str, Any]]) -> None:
    """Print descriptions side by side, then the tensors of each."""
    shown = [key for key in found[0] if key not in ("model", "specs")]
    rows = []
    for key in shown:
        values = [item[key] for item in found]
        rows.append([key, *(_cell(key, value) for value in values)])
    _print.table(["", *(str(item["model"]) for item in found)], rows)
    for item in found:
        if "specs" in item:
            click.echo(f"\n{item['model']}")
            _print.table(["tensor", "type", "shape"], [(n, s["dtype"], s["shape"]) for n, s in item["specs"].items()])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "bytes":
        return _print.size(value)
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def compare(before: str, after: str, allow_pickle: bool, json_: bool) -> bool:
    """Print how two checkpoints differ; returns whether they do."""
    from lfm.evaluate.change import moved_tensors, relative_change

    one, two = (open_checkpoint(ref, allow_pickle=allow_pickle).weights for ref in (before, after))
    tensors = moved_tensors(one, two)
    blocks = relative_change(one, two) if tensors else {}
    if json_:
        _print.as_json({"same": not tensors, "tensors": tensors, "relative_change": blocks})
    elif not tensors:
        click.echo("same weights")
    else:
        _print.table(["tensor", "difference"], tensors.items())
        click.echo()
        _print.table(
            ["part", "|after - before| / |before|"], [(k, _print.number(v)) for k, v in blocks.items()], numbers=[1]
        )
    return bool(tensors)


def verify_folder(folder: Path, json_: bool) -> bool:
    """Print whether a folder's weights are those that its lineage names, and finite; returns whether they are."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.lineage is None:
        raise RequestError(f"{folder}: no lineage.json to verify against; lfm did not make it")
    expected = checkpoint.lineage["output"]["digest"]
    # The remembered digest would hide a change of bytes that left size and time alone.
    found = combine(checkpoint.specs, Weights.tensor_digests(checkpoint.weights))
    bad = _not_finite(checkpoint.weights)
    if json_:
        _print.as_json({"intact": found == expected, "digest": found, "expected": expected, "not_finite": bad})
    else:
        click.echo(f"digest {'as written' if found == expected else f'differs: {found}, written as {expected}'}")
        click.echo(f"numbers {'finite' if not bad else 'not finite in ' + plural(len(bad), 'tensor') + f': {bad[:5]}'}")
    return found == expected and not bad


def _not_finite(weights: Weights) -> list[str]:
    import torch

    return [
        name
        for name, spec in weights.specs.items()
        if spec.floating and not all(bool(torch.isfinite(part).all()) for _, part in weights.chunks(name, 1 << 20))
    ]
