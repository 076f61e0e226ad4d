"""Configurations of other programs on the command line: `lfm merge --config`, `lfm convert-config`."""

import json

import pytest
import yaml
from tests.tiny import write_llama

CONFIG = "merge_method: linear\nmodels: [{{model: {0}/a}}, {{model: {0}/b}}]\nparameters: {{weight: 1}}\n"


@pytest.fixture
def lfm(lfm, tmp_path):
    """Return a function that runs a command and gives (exit code, stdout, stderr), beside a configuration."""
    (tmp_path / "their.yaml").write_text(CONFIG.format(tmp_path))
    return lfm


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate("ab"):
        write_llama(tmp_path / name, seed)


@pytest.mark.usefixtures("models")
def test_a_configuration_takes_the_options_of_a_merge(lfm, tmp_path):
    arguments = ("-o", tmp_path / "out", "--seed", "3", "--json", "--threads", "1", "-q")
    code, out, err = lfm("merge", *arguments, "--config", tmp_path / "their.yaml")
    assert code == 0, err
    [step] = json.loads(out)["steps"]
    assert (step["folder"], step["lineage"]["method"], step["lineage"]["seed"]) == (str(tmp_path / "out"), "linear", 3)
    code, out, _ = lfm("merge", f"--config={tmp_path / 'their.yaml'}", *arguments)
    assert json.loads(out)["steps"][0]["skipped"]


@pytest.mark.usefixtures("models")
def test_a_dry_run_of_a_configuration_writes_nothing(lfm, tmp_path):
    code, out, _ = lfm("merge", "--config", tmp_path / "their.yaml", "-o", tmp_path / "out", "-n")
    assert code == 0
    assert "merge linear" in out
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_a_configuration_is_printed(lfm, tmp_path):
    code, out, _ = lfm("merge", "--config", tmp_path / "their.yaml", "-o", tmp_path / "merged", "--print-recipe")
    converted = lfm("convert-config", tmp_path / "their.yaml")[1]
    assert code == 0
    assert yaml.safe_load(out)["steps"] == yaml.safe_load(converted)["steps"]
    assert converted.startswith(f"# What {tmp_path / 'their.yaml'} says, as a recipe.\nlfm: 1\n")


def test_help_tells_of_configurations(lfm):
    assert "lfm merge --config theirs.yaml -o out" in lfm("merge", "--help")[1]
    assert "--config" not in lfm("tune", "--help")[1]
    code, out, _ = lfm("merge", "--config", "their.yaml", "--help")
    assert code == 0
    assert "mergekit" in out
    assert "--memory" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "--config"], "error: option '--config' requires an argument"),
        (["merge", "--config", "none.yaml", "-o", "out"], "error: none.yaml: No such file or directory"),
        (
            ["merge", "ties", "a", "--config", "x"],
            "error: the file that --config names says the method, too; leave",
        ),
        (["merge", "--config", "{}"], "where to? pass -o FOLDER"),
        (["tune", "--config", "x.yaml"], "error: no such option --config"),
        (["convert-config", "none.yaml"], "error: none.yaml: No such file or directory"),
    ],
)
def test_a_mistake_with_a_configuration_ends_with_two_and_says_what_to_do(arguments, message, lfm, tmp_path):
    arguments = [str(tmp_path / "their.yaml") if word == "{}" else word for word in arguments]
    code, out, err = lfm(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_recipe_is_not_written_where_that_is_not_possible(lfm, tmp_path):
    code, _, err = lfm("convert-config", tmp_path / "their.yaml", "-o", tmp_path / "none" / "recipe.yaml")
    assert (code, err) == (1, f"error: {tmp_path / 'none' / 'recipe.yaml'}: No such file or directory\n")
