"""`read`: from a spec to rows. Find the format, read, name the columns, select, transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lfm.data._check import listed, refuse
from lfm.data._columns import conform
from lfm.data._images import read_folder, read_npz, transformed
from lfm.data._library import BUILTINS, HUB, read_builtin, read_datasets
from lfm.data._rows import Rows
from lfm.data._spec import DataSpec, Format
from lfm.data._text import read_csv, read_json, read_jsonl, read_label_text, read_text
from lfm.errors import RequestError, did_you_mean

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".npz": "npz",
}
UNTYPED: tuple[Format, ...] = ("csv", "tsv", "label-text", "images")
SAVED_DATASETS = ("dataset_info.json", "dataset_dict.json")  # one of them is in what `save_to_disk` writes


def read(spec: DataSpec | str) -> Rows:
    """Return the rows that `spec` asks for; a string is a path.

    In this order: the file's split, our names for its columns, `classes`, `part`, `limit`, then `rotate` and `invert`.
    Raises RequestError with all that is wrong with the file, and where.
    """
    spec = DataSpec.model_validate(spec)
    kind = _format(spec)
    refuse(_unused_keys(spec, kind))
    try:
        rows = _rows(spec, kind)
    except OSError as error:
        raise RequestError(f"{spec.path}: cannot be read: {error.strerror or error}") from error
    rows = conform(rows, spec.columns, untyped=kind in UNTYPED)
    if not len(rows):
        raise RequestError(f"{spec.path}: no rows; it should hold one or more")
    if spec.classes is not None:
        rows = _of_classes(rows, spec.classes)
    rows = rows.part(spec.part, spec.held_out)
    if spec.limit is not None and spec.limit < len(rows):
        rows = rows.take(range(spec.limit))
    return transformed(rows, spec.rotate, spec.invert)


def _rows(spec: DataSpec, kind: Format) -> Rows:
    path = Path(spec.path)
    match kind:
        case "jsonl":
            return read_jsonl(path)
        case "json":
            return read_json(path)
        case "csv" | "tsv":
            return read_csv(path, "," if kind == "csv" else "\t")
        case "text":
            return read_text(path, spec.separator)
        case "label-text":
            return read_label_text(path)
        case "npz":
            return read_npz(path, spec.split)
        case "images":
            return read_folder(path)
        case "datasets":
            return read_datasets(spec.path, spec.split)
        case _:
            return read_builtin(spec.path)


def _format(spec: DataSpec) -> Format:
    """Return the format to read, once it is sure that there is something to read."""
    if spec.path.startswith(HUB):
        return _only(spec, "datasets")
    if spec.format == "builtin" or spec.path.startswith(tuple(f"{name.partition(':')[0]}:" for name in BUILTINS)):
        return _only(spec, "builtin")
    path = Path(spec.path)
    _must_exist(spec.path, path)
    kind = spec.format if spec.format != "auto" else _guess(path)
    if path.is_dir() != (kind in ("images", "datasets")):
        expected, got = ("a file", "a folder") if path.is_dir() else ("a folder", "a file")
        raise RequestError(f"{spec.path}: format: {kind} is read from {expected}, this is {got}; name {expected}")
    return kind


def _only(spec: DataSpec, kind: Format) -> Format:
    if spec.format not in ("auto", kind):
        raise RequestError(f"{spec.path}: its format is {kind}, got format: {spec.format}; leave it out")
    return kind


def _must_exist(name: str, path: Path) -> None:
    if not name:
        raise RequestError("path is empty; name a file, a folder, or data such as sklearn:digits")
    try:
        if path.exists():
            return
        parent = path.parent
        siblings = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else None
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}: cannot be read: {error}") from error
    if siblings is None:
        raise RequestError(f"{name}: no such file, nor is there a folder {parent}")
    raise RequestError(f"{name}: no such file or folder{did_you_mean(path.name, siblings)}")


def _guess(path: Path) -> Format:
    if path.is_dir():
        return "datasets" if any((path / name).exists() for name in SAVED_DATASETS) else "images"
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(f"{name} ({suffix})" for suffix, name in SUFFIXES.items())
        raise RequestError(
            f"{path}: cannot tell the format from {path.suffix or 'a name without suffix'!r}; "
            f"give format: one of {known}, label-text"
        )
    return SUFFIXES[path.suffix.lower()]


def _unused_keys(spec: DataSpec, kind: Format) -> list[str]:
    """Return a line for each key that this format would ignore."""
    problems = []
    if spec.separator is not None and kind != "text":
        problems.append(f"{spec.path}: separator is for format: text, this is {kind}; leave it out")
    if spec.split is not None and kind not in ("npz", "datasets"):
        problems.append(
            f"{spec.path}: split is for npz and datasets, this is {kind}; name another file, or use part: train"
        )
    return problems


def _of_classes(rows: Rows, classes: list[int | str]) -> Rows:
    """Return the rows whose label is among `classes`. Labels are all numbers or all text, so `"1"` can stand for 1."""
    present = {str(label): label for label in rows.classes}
    refuse(
        [
            f"{rows.origin}: no row is of class {wanted!r}, the labels are {listed(present)}"
            f"{did_you_mean(str(wanted), present)}"
            for wanted in classes
            if str(wanted) not in present
        ]
    )
    return rows.take(np.flatnonzero(np.isin(rows.columns["label"], [present[str(wanted)] for wanted in classes])))
