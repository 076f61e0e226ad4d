"""Listings answer at once: they import neither torch nor numpy."""

import os
import subprocess
import sys
import time
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


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["advise"]])
def test_listings_take_less_than_half_a_second(arguments):
    started = time.perf_counter()
    python("-c", "pass")
    if time.perf_counter() - started > 0.1:
        pytest.skip("this machine is too busy to be timed")
    assert min(float(python("-c", CODE, *arguments).stderr.split()[-1]) for _ in range(3)) < 0.5
