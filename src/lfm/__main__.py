"""`python -m lfm` is the command `lfm`."""

from lfm.cli import entry

entry()
