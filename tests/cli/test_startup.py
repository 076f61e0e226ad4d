"""Listings answer at once: they import neither torch nor numpy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = (
    "import sys, resource; from lfm.cli import main; code = main(sys.argv[1:]);"
    "heavy = [m for m in ('torch', 'numpy', 'transformers', 'safetensors', 'huggingface_hub') if m in sys.modules];"
    "print(code, ','.join(heavy) or '-', resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
)


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["methods"], ["methods", "ties"], ["advise", "--data", "few"], ["merge", "ties", "-h"]),
        *(["recipes", "ls"], ["recipes", "schema"], ["merge", "ties", "--print-recipe", "a", "b"]),
    ],
)
def test_listings_import_neither_torch_nor_numpy(arguments):
    assert python("-c", CODE, *arguments).stderr.split()[-3:-1] == ["0", "-"]


def test_a_recipe_with_wrong_types_is_refused_without_torch(tmp_path):
    (tmp_path / "r.yaml").write_text("lfm: 1\nsteps:\n  x: {merge: ties, models: [a], density: much}\n")
    done = python("-c", CODE, "validate", str(tmp_path / "r.yaml"))
    assert "steps.x.density: Input should be a valid number" in done.stdout
    assert done.stderr.split()[-3:-1] == ["1", "-"]


def seconds(*arguments):
    """CPU time of a process at its best of three: others on the machine make it longer, never shorter."""
    return min(float(python("-c", *arguments).stderr.split()[-1]) for _ in range(3))


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["advise"]])
def test_listings_take_little_more_than_importing_what_they_need(arguments):
    """About a third of a second on an idle machine; measured against its own imports, so that a busy one passes too."""
    told = "import sys, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
    imports = seconds(f"import click, pydantic, yaml, logging, importlib.metadata; {told}")
    assert seconds(CODE, *arguments) < 8 * imports
