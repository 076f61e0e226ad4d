"""The command `lfm`. stdout is the answer, stderr is everything else; exit codes 0, 1 (failed), 2 (wrong), 130."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from lfm.cli._root import root
from lfm.errors import LfmError, RequestError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bugs, and only they, end in a traceback."""
    try:
        root.main(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="lfm", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LfmError as error:
        click.echo(_message(error), err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # Whoever read the answer has had enough. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _message(error: LfmError) -> str:
    if isinstance(error, RequestError) and len(error.problems) > 1:
        return "\n".join(("error: this cannot be done as asked:", *(f"  {problem}" for problem in error.problems)))
    return f"error: {error}"


def entry() -> None:
    """The console script."""
    sys.exit(main())
