"""Every method, and the rules of the house that a test can check."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conformance.checks import checks_for

from lfm.method import PARADIGMS, cards

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lfm"
FILES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
CASES = [(check, card) for card in cards().values() for check in checks_for(card)]


@pytest.mark.parametrize(
    ("check", "card"), CASES, ids=[f"{card.verb.name}-{card.name}-{check.__name__}" for check, card in CASES]
)
def test_every_method_conforms(check, card):
    check(card)


def imported(tree):
    """Yield the name of everything a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES)
def test_paradigms_do_not_import_each_other_nor_the_core_a_paradigm(file):
    home = file.split("/")[0]
    paradigms = {name.split(".")[1] for name in imported(FILES[file]) if name.startswith("lfm.")} & set(PARADIGMS)
    allowed = {home} if home in PARADIGMS else set()
    if file == "__init__.py":  # the package puts its verbs under the names of their paradigms
        return
    assert paradigms <= allowed


def functions(tree):
    """Yield the functions that a file offers: those of the module and of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (part for part in node.body if isinstance(part, ast.FunctionDef))


def private(file):
    """Whether a file is its package's own; contracts are written for everybody who adds a method."""
    return Path(file).name.startswith("_") and Path(file).name not in ("__init__.py", "_contract.py")


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("cli/") and not private(file)])
def test_public_signatures_name_what_they_take(file):
    public = [node for node in functions(FILES[file]) if not node.name.startswith("_")]
    assert [node.name for node in public if node.args.kwarg is not None] == []


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("cli/")])
def test_nothing_prints_but_the_command_line(file):
    calls = [node.func for node in ast.walk(FILES[file]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_nothing_is_called_utils():
    names = {part for file in FILES for part in Path(file).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


IMPORT_ALL = """
import importlib, os, pkgutil, random, sys, threading, warnings
import numpy, torch
def state():
    generators = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return generators, torch.get_num_threads(), threading.active_count(), dict(os.environ)
before = state()
import lfm
count = 0
for module in pkgutil.walk_packages(lfm.__path__, "lfm."):
    if module.name != "lfm.__main__":
        importlib.import_module(module.name)
        count += 1
assert state() == before
assert count > 40
print("as before", sorted({"transformers", "accelerate", "peft"} & set(sys.modules)))
"""


def test_importing_has_no_effect(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("as before []\n", "")
    assert list(tmp_path.iterdir()) == []
