"""The command line: answers on stdout, everything else on stderr, exit codes, no traceback for a user's mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny import write_llama

from lfm.cli import main
from lfm.cli._recipes import shipped
from lfm.method import Access, cards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    return [str(write_llama(root / name, seed)) for seed, name in enumerate(("base", "a", "b"))]


def test_help_lists_every_command_and_verb(lfm):
    code, out, _ = lfm("--help")
    assert code == 0
    for word in (
        "merge",
        "tune",
        "run",
        "validate",
        "methods",
        "advise",
        "inspect",
        "diff",
        "verify",
        "recipes",
        "env",
    ):
        assert f"\n  {word} " in out


@pytest.mark.parametrize(("verb", "name"), cards())
def test_every_method_has_a_help_page_with_its_options(lfm, verb, name):
    code, out, _ = lfm(verb, name, "-h")
    assert code == 0
    for parameter in cards()[verb, name].parameters.model_fields:
        assert f"--{parameter.replace('_', '-')}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrge"], "error: no such command 'mrge'; did you mean 'merge'?"),
        (["merge", "tie"], "error: no such command 'tie'; did you mean 'ties'?"),
        (["merge", "ties", "--densty", "1"], "error: no such option --densty; did you mean '--density'?"),
        (["methods", "mrge"], "error: unknown verb or method 'mrge'; did you mean 'merge'?"),
        (["methods", "merge", "tis"], "error: unknown method merge 'tis'; did you mean 'ties'?"),
        (["recipes", "show", "digit"], "error: no shipped recipe 'digit'; did you mean 'digits'?"),
        (["advise", "--access", "all"], "error: unknown access level 'all': use one of labels, probs"),
        (["inspect", "nowhere"], "error: 'nowhere': no such folder or file"),
        (["run", "nowhere.yaml"], "error: nowhere.yaml: no such recipe, here or among the shipped"),
        (["run", "digit"], "error: digit: no such recipe, here or among the shipped; did you mean 'digits'?"),
        (["validate", "nowhere.yaml"], "error: nowhere.yaml: no such recipe"),
        (["evaluate", "nowhere"], "error: what to measure?"),
        (["evaluate"], "which models?"),
        (["inspect"], "error: missing argument 'MODEL...'"),
        (["merge", "linear", "a", "--weights", "1,x", "-o", "x"], "error: --weights.1: Input should be a valid number"),
        (
            ["merge", "linear", "a", "--weights", "nan", "-o", "x"],
            "error: --weights.0: Input should be a finite number",
        ),
        (["merge", "linear", "a", "--perplexity", "{pth: x}", "-o", "x"], "--perplexity.data.pth: unknown key"),
        (["merge", "linear", "a", "b", "-o", "x", "--weights", "[1"], "not valid YAML"),
    ],
)
def test_a_mistake_ends_with_exit_code_two_and_says_what_to_do(lfm, arguments, message):
    code, out, err = lfm(*arguments)
    assert code == 2
    assert out == ""
    assert message in err


def test_all_problems_of_a_command_are_told_at_once(lfm):
    code, out, err = lfm("merge", "ties", "--density", "3", "--scale", "big")
    assert (code, out) == (2, "")
    for part in (
        "  MODELS: is missing: the models to merge",
        "  --density: Input should be less than or equal to 1 (got '3')",
        "  --scale: Input should be a valid",
        "pass -o FOLDER",
    ):
        assert part in err


def test_merge_tells_what_it_made_and_json_holds_the_same(lfm, family, tmp_path):
    base, a, b = family
    code, out, _ = lfm("merge", "ties", a, b, "--base", base, "--density", "0.3", "-o", tmp_path / "m")
    assert code == 0
    assert f"{tmp_path / 'm'}  merge ties" in out
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        *("README.md", "config.json", "lineage.json", "model.safetensors", "report.html", "results.json"),
    }
    code, out, _ = lfm("merge", "ties", a, b, "--base", base, "--density", "0.3", "-o", tmp_path / "m", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["steps"][0]["skipped"] is True
    assert answer["steps"][0]["lineage"]["parameters"]["density"] == 0.3
    code, _, err = lfm("merge", "linear", a, b, "-o", tmp_path / "m")
    assert code == 2
    assert "exists already" in err
    assert lfm("merge", "linear", a, b, "-o", tmp_path / "m", "--overwrite")[0] == 0


def test_a_dry_run_writes_nothing(lfm, family, tmp_path):
    base, a, b = family
    code, out, _ = lfm("merge", "ties", a, b, "--base", base, "-o", tmp_path / "m", "-n")
    assert code == 0
    assert "merge ties" in out
    assert not list(tmp_path.iterdir())
    code, out, err = lfm("merge", "model_stock", a, "-o", tmp_path / "m", "--dry-run", "--json")
    assert code == 2
    assert "takes 2 or more models, got 1" in err
    assert len(json.loads(out)["problems"]) == 2


def test_the_printed_recipe_does_the_same(lfm, family, tmp_path):
    base, a, b = family
    arguments = ["merge", "dare_linear", a, b, "--base", base, "--density", "0.3", "--seed", "5"]
    (tmp_path / "r.yaml").write_text(lfm(*arguments, "-o", tmp_path / "x", "--print-recipe")[1])
    assert lfm(*arguments, "-o", tmp_path / "x")[0] == 0
    assert lfm("run", tmp_path / "r.yaml", "-o", tmp_path / "runs")[0] == 0
    assert lfm("diff", tmp_path / "x", tmp_path / "runs" / "x")[:2] == (0, "same weights\n")


def test_inspect_says_which_models_belong_together(lfm, family, tmp_path):
    base, a, b = family
    code, out, _ = lfm("inspect", a, b, base)
    assert code == 0
    assert re.search(r"^a, b  +siblings  +0\.96\d  +0\.96\d  ", out, re.MULTILINE)
    assert f"changes from {base}, which looks like the base of the others" in out
    assert re.search(r"^b  +0\.\d+  cosine -?0\.0\d\d, (49|50|51)% opposed$", out, re.MULTILINE)
    assert lfm("inspect", a, b, "--base", base)[1].endswith(out[out.index("source") :])
    found = json.loads(lfm("inspect", a, b, "--base", base, "--json")[1])
    assert list(found) == ["models", "pairs", "base", "task_vectors", "task_pairs", "compared"]
    assert [model["model"] for model in found["models"]] == [base, a, b]
    assert (found["base"], found["compared"]) == (base, 1)
    assert [pair["verdict"] for pair in found["pairs"]] == ["siblings"] * 3
    assert [vector["model"] for vector in found["task_vectors"]] == [a, b]
    assert json.loads(lfm("inspect", a, b, "--json")[1])["base"] is None
    other = write_llama(tmp_path / "a", 3)
    (tmp_path / "a" / "model.safetensors").unlink()
    save_file({"lm_head.weight": torch.ones(4, 4)}, tmp_path / "a" / "model.safetensors")
    row = next(line for line in lfm("inspect", a, other)[1].splitlines() if "other architecture" in line)
    assert row.split("  ")[0] == f"{Path(a).parent.name}/a, {tmp_path.name}/a"
    assert row.endswith("0 of 21")


def test_inspect_tells_what_is_wrong_with_each_model(lfm, family):
    code, out, err = lfm("inspect", "nowhere", family[0], "elsewhere", "--base", "somewhere")
    assert (code, out) == (2, "")
    assert all(f"{name!r}: no such folder or file" in err for name in ("nowhere", "elsewhere", "somewhere"))


def test_inspect_diff_and_verify(lfm, family, tmp_path):
    base, a, b = family
    code, out, _ = lfm("inspect", base)
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "pair" not in out
    found = json.loads(lfm("inspect", base, "--tensors", "--digest", "--json")[1])[0]
    assert found["specs"]["model.norm.weight"] == {"dtype": "F32", "shape": [16]}
    code, out, _ = lfm("diff", base, a)
    assert code == 1
    assert "model.layers.0" in out
    assert json.loads(lfm("diff", a, a, "--json")[1])["same"] is True
    assert lfm("merge", "linear", a, b, "-o", tmp_path / "m")[0] == 0
    assert lfm("verify", tmp_path / "m")[0] == 0
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    stat = path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, out, _ = lfm("verify", tmp_path / "m")
    assert code == 1
    assert "digest differs" in out
    code, _, err = lfm("verify", a)
    assert code == 2
    assert "no lineage.json" in err


def test_validate_tells_problems_on_stdout_and_exits_with_one(lfm, tmp_path):
    (tmp_path / "r.yaml").write_text("lfm: 1\nsteps:\n  x: {merge: tis, models: [a]}\n")
    code, out, err = lfm("validate", tmp_path / "r.yaml")
    assert (code, err) == (1, "")
    assert "r.yaml:3: steps.x.merge: unknown method 'tis'; did you mean 'ties'?" in out
    assert json.loads(lfm("validate", tmp_path / "r.yaml", "--json")[1])["problems"]


def test_advise_answers_from_what_methods_need(lfm):
    answers = json.loads(lfm("advise", "--access", "probs", "--data", "few", "--json")[1])
    assert {(answer["verb"], answer["method"]) for answer in answers} == set(cards())
    short = [answer for answer in answers if cards()[answer["verb"], answer["method"]].needs.access is Access.WEIGHTS]
    assert len(short) > 30
    assert all("needs weights of the models, you have probs" in answer["missing"] for answer in short)
    code, out, _ = lfm("advise", "--no-train")
    assert code == 0
    assert out.splitlines()[2].startswith("yes  ensemble")


@pytest.mark.parametrize(
    "arguments",
    [["methods"], ["methods", "merge", "ties"], ["env"], ["recipes", "ls"], ["recipes", "schema"], ["advise"]],
)
def test_json_answers_are_json_and_tables_fit_the_screen(lfm, arguments):
    code, out, err = lfm(*arguments)
    assert (code, err) == (0, "")
    if arguments in (["methods"], ["advise"], ["recipes", "ls"]):
        assert max(map(len, out.splitlines())) <= 100
    json.loads(out if "schema" in arguments else lfm(*arguments, "--json")[1])


def test_recipes_can_be_shown_and_copied_but_not_over_a_file(lfm, tmp_path):
    assert lfm("recipes", "show", "digits")[1] == shipped()["digits"].read_text()
    assert lfm("recipes", "cp", "digits", tmp_path / "mine.yaml")[0] == 0
    code, _, err = lfm("recipes", "cp", "digits", tmp_path / "mine.yaml")
    assert code == 2
    assert "exists already" in err


def run(arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(arguments, capture_output=True, text=True, env=env, check=False)


def test_completion_knows_commands_and_methods():
    assert "_LFM_COMPLETE" in run([sys.executable, "-m", "lfm", "completion", "bash"]).stdout
    words = {"_LFM_COMPLETE": "bash_complete", "COMP_WORDS": "lfm merge t", "COMP_CWORD": "2"}
    found = run([sys.executable, "-c", "import sys; sys.argv[0] = 'lfm'; from lfm.cli import entry; entry()"], **words)
    assert {line.partition(",")[2] for line in found.stdout.split()} == {"ties", "task_arithmetic", "tsv_m"}


def test_a_reader_that_leaves_early_is_no_error():
    done = run(["bash", "-c", f"{sys.executable} -m lfm recipes schema | head -1; exit ${{PIPESTATUS[0]}}"])
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_answer_that_cannot_be_written_ends_with_a_message():
    done = run(["bash", "-c", f"{sys.executable} -m lfm methods > /dev/full"])
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    from lfm.cli import _recipes

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_recipes, "find_recipe", interrupt)
    assert main(["run", "digits"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_folder_that_cannot_be_written_ends_with_a_message(lfm, family, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = lfm("merge", "linear", *family[1:], "-o", tmp_path / "file" / "out")
    assert code in (1, 2)
    assert err.startswith("error: ")


def test_the_help_lists_every_command(lfm):
    from lfm.cli._root import root

    listed = {line.split()[0] for line in lfm("--help")[1].splitlines() if line.startswith("  ") and line.strip()}
    assert set(root.list_commands(None)) <= listed


def test_the_bare_command_shows_its_help_on_stderr(lfm):
    code, out, err = lfm()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: lfm")


@pytest.mark.parametrize("words", [[], ["merge"], ["tune", "full"], ["run"], ["recipes"], ["recipes", "cp"]])
def test_every_command_takes_short_and_long_help(lfm, words):
    assert lfm(*words, "-h") == lfm(*words, "--help")
    assert max(map(len, lfm("merge", "-h")[1].splitlines())) <= 100


@pytest.mark.parametrize(("verb", "name"), cards())
def test_the_example_of_every_help_page_is_a_right_command(lfm, verb, name):
    example = next(line for line in lfm(verb, name, "-h")[1].splitlines() if line.startswith(f"  lfm {verb} {name} "))
    code, out, err = lfm(*example.split()[1:], "--print-recipe")
    assert (code, err) == (0, "")
    assert f"{verb}: {name}" in out


def test_a_method_is_found_without_its_verb(lfm):
    assert lfm("methods", "ties") == lfm("methods", "merge", "ties")
    assert "Needs: 1 or more models, weights of the models, no data, no training, the base" in lfm("methods", "ties")[1]


def test_lists_are_written_with_commas(lfm, family, tmp_path):
    _, a, b = family
    assert lfm("merge", "linear", a, b, "--weights", "1,3", "-o", tmp_path / "x")[0] == 0
    assert lfm("merge", "linear", a, b, "--weights", "[1, 3]", "-o", tmp_path / "y")[0] == 0
    assert lfm("diff", tmp_path / "x", tmp_path / "y")[0] == 0


def test_an_output_may_be_called_like_an_input_elsewhere(lfm, family, tmp_path):
    _, a, b = family
    assert lfm("merge", "linear", a, b, "-o", tmp_path / "deep" / "a")[0] == 0
    code, _, err = lfm("merge", "linear", a, b, "-o", a, "--overwrite")
    assert code == 2
    assert "is (or holds) an input of this run" in err
    code, _, err = lfm("merge", "linear", a, b, "-o", f"{a}/merged")
    assert code == 2
    assert "lies in an input of this run" in err


def test_a_dry_run_ends_as_the_run_would(lfm, family, tmp_path):
    _, a, b = family
    command = ["merge", "linear", a, b, "--dry-run"]
    code, out, err = lfm(*command)
    assert (code, err) == (2, "error: where to? pass -o FOLDER\n")
    assert "merge linear" in out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    code, _, err = lfm(*command, "-o", tmp_path / "mine")
    assert code == 2
    assert "exists already" in err
    assert lfm(*command[:-1], "-o", tmp_path / "x")[0] == 0
    code, _, err = lfm(*command, "-o", tmp_path / "x")
    assert code == 0
    assert "skipped if it is what would be made again" in err


def test_done_before_keeps_the_report(lfm, family, tmp_path):
    _, a, b = family
    assert lfm("merge", "linear", a, b, "-o", tmp_path / "x")[0] == 0
    (tmp_path / "x" / "report.html").write_text("with measures")
    code, out, _ = lfm("merge", "linear", a, b, "-o", tmp_path / "x")
    assert code == 0
    assert "done before" in out
    assert (tmp_path / "x" / "report.html").read_text() == "with measures"


def test_json_has_no_word_for_infinity(capsys):
    from lfm.cli import _print

    _print.as_json({"perplexity": float("inf"), "loss": float("nan"), "x": 1.5, "where": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "loss": None, "x": 1.5, "where": "a"}


def test_a_full_disk_ends_with_a_message(lfm, family, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code, out, err = lfm("merge", "linear", *family[1:], "-o", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (1, "")
    assert "could not be written: File too large; nothing was changed" in err
    assert not (tmp_path / "x").exists()


def test_a_report_that_cannot_be_written_ends_with_a_message(lfm, family, tmp_path):
    _, a, b = family
    (tmp_path / "r.yaml").write_text(
        f"lfm: 1\nsteps:\n  x: {{merge: linear, models: [{a}, {b}]}}\nout: {tmp_path / 'out'}\n"
    )
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    code, _, err = lfm("run", tmp_path / "r.yaml")
    assert code == 1
    assert "the report could not be written: Is a directory" in err


def test_tables_wrap_their_last_column(capsys):
    from lfm.cli import _print

    _print.table(["name", "what"], [("a", "word " * 40), ("b", "")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[3].startswith("      word")
