"""Commands about the ledger of endpoints; what they do is in `_ledger`."""

from __future__ import annotations

from pathlib import Path

import click

from lfm.cli import _options as options
from lfm.cli._verbs import Suggesting


@click.group(cls=Suggesting, invoke_without_command=True)
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
@click.pass_context
def ledger(ctx: click.Context, ledger: Path | None, json_: bool) -> None:
    """What endpoints were asked and what it cost: list, show, export, forget. Alone, it lists."""
    if ctx.invoked_subcommand is None:
        from lfm.cli._ledger import tell_usage

        tell_usage(ledger, json_)
    elif json_ or ledger:
        ctx.default_map = {name: {"ledger": ledger, "json_": json_} for name in ("list", "show", "export", "forget")}


@ledger.command("list")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def list_endpoints(ledger: Path | None, json_: bool) -> None:
    """List the endpoints: requests, answers from the ledger, tokens, cost, what stayed unanswered."""
    from lfm.cli._ledger import tell_usage

    tell_usage(ledger, json_)


@ledger.command("show")
@click.argument("key")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def show_request(key: str, ledger: Path | None, json_: bool) -> None:
    """Print one request with its answer; KEY is the beginning of its key, as `export` tells it."""
    from lfm.cli._ledger import tell_request

    tell_request(ledger, key, json_)


@ledger.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--endpoint", metavar="URL", help="Of this endpoint alone: http://host/v1, or http://host/v1#model.")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def export_ledger(file: Path, endpoint: str | None, ledger: Path | None, json_: bool) -> None:
    """Write every request with its answer into FILE, a JSON object a line."""
    from lfm.cli._ledger import export

    export(ledger, file, endpoint, json_)


@ledger.command("forget")
@click.option("--endpoint", metavar="URL", required=True, help="http://host/v1, or http://host/v1#model.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.ledger_option
@click.option("--json", "json_", is_flag=True, help="Answer in JSON.")
def forget_endpoint(endpoint: str, yes: bool, ledger: Path | None, json_: bool) -> None:
    """Remove what an endpoint was asked and what it answered; it will be asked, and paid, again."""
    from lfm.cli._ledger import forget

    forget(ledger, endpoint, yes, json_)
