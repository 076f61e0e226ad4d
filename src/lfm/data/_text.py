"""Files of text: jsonl, json, csv, tsv, text, label-text. All are UTF-8, with or without a byte order mark."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lfm.data._check import described, listed, refuse, shortened
from lfm.data._rows import Rows
from lfm.errors import RequestError, did_you_mean, plural

BOM = b"\xef\xbb\xbf"
DEPTH = 64  # deeper than any row worth reading, and shallow enough for whatever walks over it later


def read_jsonl(path: Path) -> Rows:
    """Return one row for each line: an object of columns, or a string, which is its `text`.

    Raises RequestError with file and line for what is not JSON and for rows that differ in their columns.
    """
    text = decoded(path)
    values: list[Any] = []
    lines: list[int] = []
    problems: list[str] = []
    for line, content in _filled_lines(text):
        try:
            values.append(_parsed(path, content, line))
            lines.append(line)
        except RequestError as error:
            problems += error.problems
    if problems and text.lstrip().startswith("["):
        problems.insert(0, f"{path}: looks like one JSON list, not one object a line; try format: json")
    columns = _table(values, lambda row: f"{path}:{lines[row]}", problems)
    return Rows(columns, str(path), lines=lines)


def read_json(path: Path) -> Rows:
    """Return one row for each entry of a list of objects or strings, or of such a list under `data`.

    Raises RequestError as `read_jsonl` does, naming rows by their place in the list: `rows.json[12]`.
    """
    value = _parsed(path, decoded(path))
    entries = value.get("data") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        got = f"an object with {listed(value)}" if isinstance(value, dict) else described(value)
        raise RequestError(f'{path}: expected a list of rows, or {{"data": [...]}}, got {got}')
    return Rows(_table(entries, lambda row: f"{path}[{row}]", []), str(path))


def read_csv(path: Path, delimiter: str) -> Rows:
    """Return one row for each record after the header, all values as text.

    Raises RequestError for records that are longer or shorter than the header, and for quotes that do not close.
    """
    records = _records(path, decoded(path), delimiter)
    _, header = records.pop(0)
    refuse(_header_problems(path, header))
    refuse(
        [
            f"{path}:{line}: expected {plural(len(header), 'field')} as in the header, got {len(fields)}"
            for line, fields in records
            if len(fields) != len(header)
        ]
    )
    columns = {name: [fields[place] for _, fields in records] for place, name in enumerate(header)}
    return Rows(columns, str(path), lines=[line for line, _ in records])


def read_text(path: Path, separator: str | None) -> Rows:
    """Return one row for each piece of text: the paragraphs, or what stands between `separator`s.

    A paragraph is a run of lines that are not blank. Pieces between separators keep every character, so joining them
    gives the file again; blank pieces are left out.
    """
    text = _with_newlines(decoded(path))
    cut = None if separator is None else _with_newlines(separator)
    pieces = list(_paragraphs(text) if cut is None else _pieces(text, cut))
    lines, texts = [line for line, _ in pieces], [piece for _, piece in pieces]
    return Rows({"text": texts}, str(path), lines=lines, joined="\n\n" if cut is None else cut)


def read_label_text(path: Path) -> Rows:
    """Return one row for each line: a label, blanks, and the text.

    Raises RequestError for lines that lack one of the two.
    """
    rows = [(line, content[:1].isspace(), content.split(None, 1)) for line, content in _filled_lines(decoded(path))]
    refuse(
        [
            f"{path}:{line}: no {'label' if indented else 'text'}; expected a label, a blank and the text, "
            f"got {shortened(' '.join(words))!r}"
            for line, indented, words in rows
            if indented or len(words) < 2
        ]
    )
    columns = {"text": [words[1].rstrip() for *_, words in rows], "label": [words[0] for *_, words in rows]}
    return Rows(columns, str(path), lines=[line for line, *_ in rows])


def decoded(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark. Raises RequestError if it is another or empty."""
    raw = path.read_bytes()
    skipped = len(BOM) if raw.startswith(BOM) else 0
    try:
        text = raw[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = skipped + error.start
        line = raw.count(b"\n", 0, offset) + 1
        guess = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise RequestError(
            f"{path}:{line}: not UTF-8: byte 0x{raw[offset]:02x} at offset {offset:,}{guess}; save the file as UTF-8"
        ) from error
    if not text.strip():
        raise RequestError(f"{path}: the file is empty; it should hold one row or more")
    return text


def _filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and content of the lines that are not blank.

    Only newlines end a line: `str.splitlines` would also cut at characters that JSON and prose may hold.
    """
    return ((line, content) for line, content in enumerate(_with_newlines(text).split("\n"), 1) if content.strip())


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    lines = enumerate(text.split("\n"), 1)
    for filled, group in groupby(lines, key=lambda numbered: bool(numbered[1].strip())):
        if filled:
            numbers, contents = zip(*group, strict=True)
            yield numbers[0], "\n".join(contents)


def _pieces(text: str, separator: str) -> Iterator[tuple[int, str]]:
    line = 1
    for piece in text.split(separator):
        if piece.strip():
            blank = len(piece) - len(piece.lstrip())
            yield line + piece.count("\n", 0, blank), piece
        line += piece.count("\n") + separator.count("\n")


def _parsed(path: Path, content: str, line: int | None = None) -> Any:
    """Return what JSON text holds: a whole file, or the content of one line of it."""
    place = str(path) if line is None else f"{path}:{line}"
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{line or error.lineno}: not JSON: {error.msg}, at column {error.colno}") from error
    except RecursionError as error:
        raise RequestError(f"{place}: nested too deeply; a row may hold {DEPTH} levels") from error
    except ValueError as error:  # Python reads no number of thousands of digits
        raise RequestError(f"{place}: a number has too many digits; write it as text") from error


def _table(values: Sequence[Any], place: Callable[[int], str], problems: list[str]) -> dict[str, list[Any]]:
    """Return the columns of rows given as objects or strings; raise RequestError for `problems` and all new ones."""
    rows = [{"text": value} if isinstance(value, str) else value for value in values]
    first = next((row for row in rows if isinstance(row, dict)), {})
    for index, row in enumerate(rows):
        problem = _row_problem(row, first)
        if problem:
            problems.append(f"{place(index)}: {problem}")
    refuse(problems)
    return {name: [row[name] for row in rows] for name in first}


def _row_problem(row: object, first: dict[str, Any]) -> str:
    """Return what is wrong with a row, compared with the first one, or an empty string."""
    if not isinstance(row, dict):
        return f"expected an object or a text, got {described(row)}"
    if not row:
        return "an object without columns"
    if _too_deep(row):
        return f"nested too deeply; a row may hold {DEPTH} levels"
    lacking = [name for name in first if name not in row]
    extra = [name for name in row if name not in first]
    parts = [f"lacks {listed(lacking)}"] if lacking else []
    parts += [f"has {listed(extra)} in addition"] if extra else []
    hint = did_you_mean(extra[0], lacking) if lacking and extra else ""
    return f"columns differ from those of the first row: it {' and '.join(parts)}{hint}" if parts else ""


def _too_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(DEPTH):
        nested = [value for value in level if isinstance(value, (dict, list))]
        level = [child for value in nested for child in (value.values() if isinstance(value, dict) else value)]
    return bool(level)


def _records(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the records of a CSV file, each with the line on which it starts."""
    records, line = [], 1
    # The limit protects from quotes that never close; `strict` does that better, and a document may be long.
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        remedy = "close each quote, and write a quote inside quotes twice"
        raise RequestError(f"{path}:{line}: a record that cannot be read: {error}; {remedy}") from error
    finally:
        csv.field_size_limit(limit)
    if len(records) < 2:
        raise RequestError(f"{path}: no rows; expected a header line and one record or more")
    return records


def _header_problems(path: Path, header: Sequence[str]) -> list[str]:
    repeated = sorted({name for name in header if header.count(name) > 1})
    return [f"{path}:1: the header names {name!r} twice; name each column once" for name in repeated]
