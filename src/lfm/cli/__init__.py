"""The command `lfm`. stdout is the answer, stderr is everything else; exit codes 0, 1 (failed), 2 (wrong), 130."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Sequence

import click

from lfm.checkpoint._write import DISK_ERRORS
from lfm.cli._root import root
from lfm.errors import LfmError, RequestError, did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bugs, and only they, end in a traceback."""
    gc.set_threshold(100_000)  # headers of many tensors are many objects, and none of them is garbage
    try:
        # A command that ends by `ctx.exit(code)` gives its code; the others give nothing.
        code = root.main(list(sys.argv[1:] if arguments is None else arguments), prog_name="lfm", standalone_mode=False)
    except click.ClickException as error:
        click.echo(_usage(error), err=True)
        return error.exit_code
    except LfmError as error:
        click.echo(_message(error), err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, *DISK_ERRORS):
            raise
        _give_up_stdout()
        if error.errno != errno.EPIPE:  # otherwise whoever read the answer has had enough
            click.echo(f"error: {error.strerror}{': ' + str(error.filename) if error.filename else ''}", err=True)
        return 1
    return int(code or 0)


def _give_up_stdout() -> None:
    """Let what is left of the answer go nowhere; Python would complain when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: click.ClickException) -> str:
    """Return a complaint about the command line in the form of all others."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.message
    if isinstance(error, click.NoSuchOption):
        text = f"no such option {error.option_name}{did_you_mean(error.option_name, error.possibilities or ())}"
    else:
        text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    hint = f"\ntry `{context.command_path} --help`" if context is not None else ""
    return f"error: {text[:1].lower()}{text[1:]}{hint}"


def _message(error: LfmError) -> str:
    if isinstance(error, RequestError) and len(error.problems) > 1:
        return "\n".join(("error: this cannot be done as asked:", *(f"  {problem}" for problem in error.problems)))
    return f"error: {error}"


def entry() -> None:
    """The console script."""
    sys.exit(main())
