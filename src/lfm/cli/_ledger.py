"""What the ledger of endpoints tells, on stdout and in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lfm.cli import _print
from lfm.errors import LfmError, RequestError, did_you_mean, plural
from lfm.models.ledger import Ledger, default_path, open_ledger


def _existing(path: Path | None) -> Ledger:
    """Open a ledger that is there: looking at one does not make one."""
    place = path or default_path()
    if not place.expanduser().exists():
        raise RequestError(f"{place}: no ledger there; one is made when an endpoint is first asked")
    return open_ledger(path)


def tell_usage(path: Path | None, json_: bool) -> None:
    """Print what each endpoint was asked."""
    ledger = _existing(path)
    found = ledger.usage()
    if json_:
        _print.as_json({"ledger": str(ledger.path), "endpoints": [asdict(usage) for usage in found]})
        return
    head = ["endpoint", "requests", "from ledger", "tokens in", "tokens out", "cost", "unanswered", "interrupted"]
    rows = [
        [
            usage.endpoint,
            *(f"{count:,}" for count in (usage.requests, usage.hits, usage.tokens_in, usage.tokens_out)),
            _print.number(usage.cost),
            *(f"{count:,}" for count in (usage.unanswered, usage.interrupted)),
        ]
        for usage in found
    ]
    _print.table(head, rows, numbers=range(1, len(head)))


def tell_request(path: Path | None, key: str, json_: bool) -> None:
    """Print the one request whose key begins so."""
    found = [request for request in _existing(path).requests() if str(request["key"]).startswith(key)]
    if len(found) != 1:
        raise RequestError(f"{plural(len(found), 'request')} with a key that begins with {key!r}; give the key of one")
    if json_:
        _print.as_json(found[0])
    else:
        _print.table(["", "value"], [(name, _cell(value)) for name, value in found[0].items()])


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def export(path: Path | None, file: Path, endpoint: str | None, json_: bool) -> None:
    """Write requests and answers into a new file."""
    ledger = _existing(path)
    _check_known(ledger, endpoint)
    count = 0
    try:
        with file.open("x", encoding="utf-8") as out:
            for request in ledger.requests(endpoint):
                out.write(json.dumps(request, ensure_ascii=False) + "\n")
                count += 1
    except FileExistsError:
        raise RequestError(f"{file}: exists already; choose another name") from None
    except OSError as error:
        raise LfmError(f"{file}: {error.strerror}") from None
    if json_:
        _print.as_json({"file": str(file), "requests": count})
    else:
        click.echo(f"{file}  {plural(count, 'request')}")


def forget(path: Path | None, endpoint: str, yes: bool, json_: bool) -> None:
    """Remove what is known of an endpoint, after asking."""
    ledger = _existing(path)
    found = _check_known(ledger, endpoint)
    count = sum(usage.requests + usage.unanswered for usage in found)
    if not yes:
        if not sys.stdin.isatty():
            raise RequestError(f"{plural(count, 'request')} would be removed for good; pass --yes to do it")
        click.confirm(f"remove {plural(count, 'request')} to {endpoint} for good?", abort=True, err=True)
    removed = ledger.forget(endpoint)
    if json_:
        _print.as_json({"endpoint": endpoint, "removed": removed})
    else:
        click.echo(f"{endpoint}  {plural(removed, 'request')} removed")


def _check_known(ledger: Ledger, endpoint: str | None) -> Sequence[Any]:
    """Return what is known of an endpoint, or raise RequestError with the nearest name."""
    usage = ledger.usage()
    names = [known.endpoint for known in usage]
    found = [known for known in usage if endpoint in (None, known.endpoint, known.endpoint.partition("#")[0])]
    if endpoint is not None and not found:
        raise RequestError(f"{endpoint}: the ledger knows no such endpoint{did_you_mean(endpoint, names)}")
    return found
