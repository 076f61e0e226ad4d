"""Methods of other packages: one file and one entry point make a method like all others; broken ones harm nobody."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.merging import load, near, save, tensors

from lfm.method import ENTRY_POINTS, read_card

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(MEDIAN,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)  # what we tell people to write is what is tested
COMMANDS = """
import contextlib, io, json, sys
from lfm.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps([answers, sorted(set(sys.modules) & {"torch", "somebodys", "somebodys.median"})]))
"""


def install(folder, entry="median = somebodys.median", **files):
    """Put a distribution there that announces a method, as an installer would."""
    info = folder / "somebodys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lfm.methods]\n{entry}\n")
    package = folder / "somebodys"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nobody needs to import this to know what there is')")
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    return folder


def python(site, code, *arguments, cwd):
    path = os.pathsep.join(map(str, (site, ROOT / "src", ROOT)))
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, cwd=cwd, capture_output=True, text=True)


def commands(site, *lines, cwd):
    """Run commands in one process; returns (exit code, stdout, stderr) of each, and which modules were imported."""
    done = python(site, COMMANDS, json.dumps(lines), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = install(tmp_path_factory.mktemp("site"), median=MEDIAN)
    (folder / "somebodys" / "__init__.py").write_text("")
    return folder


def test_a_method_of_another_package_is_listed_everywhere_and_not_imported(site, tmp_path):
    lines = (
        ["methods"],
        ["methods", "merge", "median"],
        ["merge", "--help"],
        ["merge", "median", "--help"],
        ["recipes", "schema"],
        ["advise", "--sources", "3"],
    )
    answers, imported = commands(site, *lines, cwd=tmp_path)
    for code, out, err in answers:
        assert (code, err) == (0, "")
        assert "median" in out
        assert "Element-wise median" in out
    assert "--scale" in answers[3][1]
    assert imported == []


def test_a_method_of_another_package_runs_from_command_and_recipe(site, tmp_path):
    models = [near(tensors(0), seed) for seed in (1, 2, 3)]
    paths = [str(save(tmp_path / f"m{seed}", model)) for seed, model in enumerate(models)]
    steps = {"middle": {"merge": "median", "models": paths, "scale": 0.5}, "typo": {"merge": "medain", "models": paths}}
    for name, step in steps.items():
        recipe = {"lfm": 1, "steps": {name: step}, "out": str(tmp_path / "run")}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
    (direct, recipe, typo), _ = commands(
        site,
        ["merge", "median", *paths, "-o", "out"],
        ["run", "middle.yaml"],
        ["run", "typo.yaml"],
        cwd=tmp_path,
    )
    assert direct[0] == recipe[0] == 0, direct[2] + recipe[2]
    assert typo[0] == 2
    assert "did you mean 'median'?" in typo[2]
    for name in models[0]:
        expected = torch.stack([model[name] for model in models]).median(0).values
        assert torch.equal(load(tmp_path / "out")[name], expected)
        assert torch.equal(load(tmp_path / "run" / "middle")[name], expected / 2)


def test_a_method_of_another_package_passes_the_checks_that_ours_pass(site, tmp_path):
    code = (
        "import lfm; from tests.conformance.checks import check_card\n"
        "check_card(lfm.cards()['merge', 'median']); print('fine')"
    )
    done = python(site, code, cwd=tmp_path)
    assert done.stdout == "fine\n", done.stderr


def test_the_guide_announces_a_method_as_we_read_it():
    group, name = re.findall(r'entry-points\."(.+?)"\]\n(\w+) = "\w+\.median"', GUIDE)[0]
    assert (group, name) == (ENTRY_POINTS, "median")


@pytest.mark.parametrize(
    "imported", ["Whole\nfrom lfm.reuse.merge._contract import Tensorwise as Contract", "Tensorwise as Contract, Whole"]
)
def test_a_contract_may_be_imported_under_another_name(imported, tmp_path):
    path = tmp_path / "median.py"
    path.write_text(MEDIAN.replace("Tensorwise, Whole", imported).replace("(Tensorwise)", "(Contract)"))
    assert read_card("median", path).class_name == "Median"


BAD_HEADER = MEDIAN.replace("needs = Needs(sources=(3, None),", "needs = Needs(sources=SOURCES,")
BROKEN = {
    "a module that is not there": ("median = nowhere.median", {}, "there is no module 'nowhere.median'"),
    "a file that is not there": ("median = somebodys.median", {}, "there is no module 'somebodys.median'"),
    "no needs": (
        "median = somebodys.median",
        {"median": MEDIAN.replace("needs = Needs", "wants = dict")},
        "states `needs = Needs(...)`",
    ),
    "needs that are not literal": ("median = somebodys.median", {"median": BAD_HEADER}, "must be literal"),
    "needs that nobody knows": (
        "median = somebodys.median",
        {"median": MEDIAN.replace("same_tokenizer", "same_teacher")},
        "same_teacher",
    ),
    "not Python": ("median = somebodys.median", {"median": MEDIAN + "\n)"}, "SyntaxError: unmatched ')'"),
    "not text": ("median = somebodys.median", {"median": MEDIAN + "\0"}, "null bytes"),
    "no method in it": ("median = somebodys.median", {"median": '"""Nothing."""'}, "holds one class"),
    "an entry that is none": ("median = some bodys!", {"median": MEDIAN}, "'median' (some bodys!)"),
    "a name that is taken": (
        "ties = somebodys.median",
        {"median": MEDIAN},
        "merge ties is the name of lfm.reuse.merge",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plug_in_is_named_and_left_out_and_the_rest_goes_on(case, tmp_path):
    entry, files, message = BROKEN[case]
    site = install(tmp_path / "site", entry, **files)
    answers, imported = commands(
        site, ["--help"], ["merge", "median", "--help"], ["merge", "ties", "--help"], ["methods"], cwd=tmp_path
    )
    (code, out, err), asked_for, ties, listed = answers
    assert (code, ties[0], listed[0]) == (0, 0, 0)
    assert "merge" in out
    assert err.startswith("warning: the plug-in method")
    assert message in err
    assert len(err.splitlines()) == 1
    assert asked_for[0] == 2
    assert "no such command 'median'" in asked_for[2]
    assert "Trim each task vector" in ties[1]
    assert "median" not in listed[1]
    assert imported == []
