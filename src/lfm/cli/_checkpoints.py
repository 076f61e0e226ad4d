"""`inspect`, `diff`, `verify`: looking at checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lfm.checkpoint import Checkpoint, Weights, combine, open_checkpoint
from lfm.checkpoint.kinship import Kinship, Pair, kinship
from lfm.cli import _print
from lfm.errors import RequestError, plural


def open_all(refs: Iterable[str], allow_pickle: bool) -> list[Checkpoint]:
    """Open several checkpoints, or raise RequestError with what is wrong with each of them."""
    found: list[Checkpoint] = []
    problems: list[str] = []
    for ref in refs:
        try:
            found.append(open_checkpoint(ref, allow_pickle=allow_pickle))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)
    return found


def inspect_models(
    refs: Sequence[str], base: str | None, *, tensors: bool, digest: bool, exact: bool, allow_pickle: bool, json_: bool
) -> None:
    """Print what checkpoints hold and, of two or more, how they are related."""
    refs = refs if base is None or base in refs else [base, *refs]
    models = open_all(refs, allow_pickle)
    found = [describe(model, tensors, digest) for model in models]
    root = None if base is None else models[list(refs).index(base)]
    related = kinship(models, root, everything=exact) if len(models) > 1 else None
    if json_:
        _print.as_json(found if related is None else {"models": found, **asdict(related)})
        return
    tell(found)
    if related is not None:
        tell_kinship(related, refs, base_given=base is not None)


def describe(checkpoint: Checkpoint, tensors: bool, digest: bool) -> dict[str, Any]:
    """Return what a checkpoint's headers and configs say."""
    specs = checkpoint.specs
    found: dict[str, Any] = {
        "model": checkpoint.ref,
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


def tell_kinship(found: Kinship, refs: Sequence[str], *, base_given: bool) -> None:
    """Print how models are related: pair by pair, then their changes from the base."""
    names = _short_names(refs)
    click.echo()
    head = ["pair", "verdict", "cosine", "of matrices", "distance", "equal", "tensors"]
    _print.table(head, [_pair_row(pair, names) for pair in found.pairs], numbers=[2, 3, 4, 5])
    if found.compared < 1:
        click.echo(f"(from {found.compared:.2%} of the weights that they share; --exact compares all)")
    if not found.task_vectors:
        return
    click.echo(f"\nchanges from {found.base}{'' if base_given else ', which looks like the base of the others'}")
    agreement = {tuple(pair.models): f"{_share(pair.sign_conflict)} opposed" for pair in found.task_pairs}
    cosines = {tuple(pair.models): f"cosine {_decimals(pair.cosine)}" for pair in found.task_pairs}
    sources = [vector.model for vector in found.task_vectors]
    rows = []
    for place, vector in enumerate(found.task_vectors):
        met = [(earlier, vector.model) for earlier in sources[:place]]
        cells = [f"{cosines[pair]}, {agreement[pair]}" for pair in met]
        padding = [""] * (len(sources) - 1 - place)
        rows.append([names[vector.model], _print.number(vector.norm), *cells, *padding][: len(sources) + 1])
    _print.table(["source", "size", *(f"and {names[source]}" for source in sources[:-1])], rows, numbers=[1])


def _pair_row(pair: Pair, names: dict[str, str]) -> list[str]:
    one, two = (names[model] for model in pair.models)
    total = pair.shared + pair.other_shape + sum(pair.missing)
    tensors = [f"{pair.shared:,} of {total:,}" if total > pair.shared else f"{total:,}"]
    tensors += [plural(pair.other_shape, "other shape")] * bool(pair.other_shape)
    tensors += [f"{_share(pair.unrelated)} of the matrices unrelated"] * (0 < (pair.unrelated or 0) < 1)
    numbers = [_decimals(pair.cosine), _decimals(pair.matrix_cosine), _print.number(pair.distance), _share(pair.equal)]
    return [f"{one}, {two}", pair.verdict, *numbers, ", ".join(tensors)]


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _short_names(refs: Sequence[str]) -> dict[str, str]:
    """Return the shortest ends of references that tell them apart."""
    parts = {ref: ref.rstrip("/").split("/") for ref in refs}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {ref: "/".join(part[-depth:]) for ref, part in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {ref: ref for ref in refs}


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
