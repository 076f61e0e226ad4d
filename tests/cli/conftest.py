"""What the tests of the command line share."""

import pytest

from lfm.cli import main


@pytest.fixture
def lfm(capsys):
    """Return a function that runs a command and gives (exit code, stdout, stderr)."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call
