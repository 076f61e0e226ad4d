"""What the README shows is run, in order, and prints what the README says it prints."""

import re
import shlex
from pathlib import Path

import pytest

from lfm.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What differs from run to run and from machine to machine: times, and the last digits of trained models.
NUMBER = re.compile(r"\d+(\.\d+)?")


def sessions():
    """Yield (command, shown lines) of every console block."""
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def test_every_command_runs_and_answers_as_shown(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command, shown in sessions():
        program, *arguments = shlex.split(command)
        assert program == "lfm"
        code = main(arguments)
        out, err = capsys.readouterr()
        assert code == (2 if any(line.startswith("error:") for line in shown) else 0), err
        told = [NUMBER.sub("#", " ".join(line.split())) for line in (out + err).splitlines()]
        place = 0
        for line in shown:
            wanted = NUMBER.sub("#", " ".join(line.split()))
            if wanted == "..." or set(wanted) <= {"-", " "}:
                continue
            assert wanted in told[place:], f"{command}: does not print {line!r} here:\n" + "\n".join(told[place:])
            place = told.index(wanted, place) + 1
    merged_is_better_than_both_specialists(folder)


def merged_is_better_than_both_specialists(folder):
    import json

    tables = json.loads((folder / "runs" / "digits" / "results.json").read_text())["tables"]
    rows = next(table["rows"] for table in tables if table["title"] == "Accuracy")
    accuracy = {name: row["accuracy all %"]["value"] for name, row in rows.items()}
    for merge in (
        "linear",
        "slerp",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "magmax",
        "model_stock",
    ):
        assert accuracy[merge] > max(accuracy["even"], accuracy["odd"]), accuracy
    assert accuracy["base"] > 90 > accuracy["even"]


def test_the_python_example_runs(folder, monkeypatch, capsys):
    if not (folder / "runs" / "digits").exists():
        pytest.skip("needs what the commands of the README have made")
    monkeypatch.chdir(folder)
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "accuracy" in capsys.readouterr().out


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_make_commands_of_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", ["docs/recipes.md", "docs/models.md", "docs/merging.md", "docs/editing.md"])
def test_yaml_in_the_guide_is_a_right_recipe(page):
    from lfm.recipe._yaml import parse_yaml
    from lfm.recipe.schema import check_recipe

    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        check_recipe(parse_yaml(block if "lfm: 1" in block else f"lfm: 1\n{block}", page))


def test_commands_in_the_guide_are_right():
    from click.testing import CliRunner

    from lfm.cli._root import root

    for page in (ROOT / "docs").glob("*.md"):
        for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                if line.startswith("lfm "):
                    words = shlex.split(re.split(r"\s{2,}", line)[0])[1:]
                    path = [word for word in words[:2] if not word.startswith("-") and "." not in word]
                    result = CliRunner().invoke(root, [*path[: 2 if path[0] in ("merge", "tune") else 1], "--help"])
                    assert result.exit_code == 0, line
                    assert all(word in result.output for word in words if word.startswith("--")), line
