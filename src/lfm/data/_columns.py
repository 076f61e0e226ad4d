"""The column conventions: names, Alpaca's three columns, and what text and labels may be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lfm.data._check import described, listed, refuse, shortened
from lfm.data._rows import Column, Rows
from lfm.errors import did_you_mean

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TEXTS = ("text", "prompt", "completion")
WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # what surely fits into 64 bits
SURROGATE = re.compile("[\ud800-\udfff]")


def conform(rows: Rows, names: Mapping[str, str], untyped: bool) -> Rows:
    """Return rows with our names for columns and checked texts and labels.

    `untyped` says that the file holds nothing but text, so labels become whole numbers if all of them read as such.
    Raises RequestError for a column that is not there, text or images that are none, and labels that are neither text
    nor whole numbers.
    """
    rows = replace(rows, columns=_renamed(rows, names))
    rows = _from_alpaca(rows)
    labels = _labels(rows, untyped)
    problems = [problem for name in TEXTS for problem in _text_problems(rows, name)]
    refuse(problems + _image_problems(rows) + _label_problems(rows, labels))
    return replace(rows, columns={**rows.columns, "label": _as_column(labels)}) if labels else rows


def _labels(rows: Rows, untyped: bool) -> Sequence[Any]:
    """Return the labels, empty if there are none; of an untyped file as numbers if each is written as one."""
    column = rows.columns.get("label", ())
    labels = column.tolist() if isinstance(column, np.ndarray) else column
    whole = untyped and all(isinstance(label, str) and WHOLE.fullmatch(label) for label in labels)
    return [int(label) for label in labels] if whole else labels


def _renamed(rows: Rows, names: Mapping[str, str]) -> dict[str, Column]:
    """Return the columns under our names; one that a renamed column replaces is dropped."""
    refuse(
        [
            f"{rows.origin}: no column {theirs!r} to use as {ours!r}, it has {listed(rows.columns)}"
            f"{did_you_mean(theirs, rows.columns)}"
            for ours, theirs in names.items()
            if theirs not in rows.columns
        ]
    )
    taken = {*names.keys(), *names.values()}
    others = {name: column for name, column in rows.columns.items() if name not in taken}
    return {**{ours: rows.columns[theirs] for ours, theirs in names.items()}, **others}


def _from_alpaca(rows: Rows) -> Rows:
    """Return rows with `prompt` and `completion` in place of Alpaca's `instruction`, `input` (if any) and `output`."""
    columns = dict(rows.columns)
    if not {"instruction", "output"} <= columns.keys() or columns.keys() & {"prompt", "completion"}:
        return rows
    refuse([problem for name in ("instruction", "input", "output") for problem in _text_problems(rows, name)])
    instructions, outputs = columns.pop("instruction"), columns.pop("output")
    inputs = columns.pop("input", [""] * len(rows))
    prompts = [_alpaca_prompt(*pair) for pair in zip(instructions, inputs, strict=True)]
    return replace(rows, columns={"prompt": prompts, "completion": outputs, **columns})


def _alpaca_prompt(instruction: str, given: str) -> str:
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA
    return template.format(instruction=instruction, input=given)


def _text_problems(rows: Rows, name: str) -> list[str]:
    """Return a line for every value of a column that is not text; none if there is no such column."""
    problems = []
    for index, value in enumerate(rows.columns.get(name, ())):
        if not isinstance(value, str):
            problems.append(f"{rows.where(index)}: {name}: expected text, got {described(value)}")
        elif broken := SURROGATE.search(value):
            problems.append(
                f"{rows.where(index)}: {name}: half of a surrogate pair (U+{ord(broken[0]):04X}) at character "
                f"{broken.start()}; write the whole character"
            )
    return problems


def _image_problems(rows: Rows) -> list[str]:
    remedy = "pictures are read from npz files and folders of images"
    return [
        f"{rows.where(index)}: image: expected a picture, got {described(value)}; {remedy}"
        for index, value in enumerate(rows.columns.get("image", ()))
        if not isinstance(value, np.ndarray)
    ]


def _label_problems(rows: Rows, labels: Sequence[Any]) -> list[str]:
    problems = []
    for index, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            got = described(label)
            problems.append(f"{rows.where(index)}: label: expected a whole number or text, got {got}")
        elif isinstance(label, int) and not -(2**63) <= label < 2**63:
            problems.append(f"{rows.where(index)}: label: {shortened(str(label))} does not fit into 64 bits; use text")
        elif isinstance(label, str) and SURROGATE.search(label):
            problems.append(f"{rows.where(index)}: label: half of a surrogate pair; write the whole character")
    return problems or _mixed(rows, labels)


def _mixed(rows: Rows, labels: Sequence[Any]) -> list[str]:
    """Return a problem if some labels are numbers and some are text: 1 and "1" would be two classes."""
    types = [type(label) for label in labels]
    odd = next((index for index, kind in enumerate(types) if kind is not types[0]), None)
    if odd is None:
        return []
    first, other = described(labels[0]), described(labels[odd])
    return [f"{rows.where(odd)}: label: got {other}, but {first} in {rows.where(0)}; use one kind in all rows"]


def _as_column(labels: Sequence[Any]) -> Column:
    return np.asarray(labels, dtype=np.int64) if isinstance(labels[0], int) else labels
