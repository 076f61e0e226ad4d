"""Running recipes: done steps are skipped, changed ones are noticed, nothing is overwritten unasked."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.tiny import write_llama

from lfm import RequestError, Settings, open_checkpoint, run
from lfm.recipe._yaml import parse_yaml
from lfm.recipe.execute import plan
from lfm.recipe.schema import check_recipe


@pytest.fixture
def family(tmp_path):
    return {name: str(write_llama(tmp_path / name, seed)) for seed, name in enumerate(("base", "a", "b"))}


def recipe(family, out, density=0.5, seed=0):
    text = yaml.safe_dump(
        {
            "lfm": 1,
            "seed": seed,
            "models": family,
            "steps": {
                "soup": {"merge": "linear", "models": ["a", "b"]},
                "ties": {"merge": "ties", "models": ["a", "b"], "base": "base", "density": density},
                "both": {"merge": "slerp", "models": ["soup", "ties"]},
            },
            "out": str(out),
        },
        sort_keys=False,
    )
    return check_recipe(parse_yaml(text, "r.yaml"), text)


def skipped(runs):
    return {item.step.name: item.skipped for item in runs}


def test_a_second_run_does_nothing_again_and_reports_all_the_same(family, tmp_path):
    first = run(recipe(family, tmp_path / "out"))
    (tmp_path / "out" / "report.html").unlink()
    second = run(recipe(family, tmp_path / "out"), settings=Settings(threads=1))
    assert skipped(first) == dict.fromkeys(("soup", "ties", "both"), False)
    assert skipped(second) == dict.fromkeys(("soup", "ties", "both"), True)
    assert (tmp_path / "out" / "report.html").exists()


def test_what_is_missing_is_made_from_what_is_there(family, tmp_path):
    first = run(recipe(family, tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "both")
    second = run(recipe(family, tmp_path / "out"))
    assert skipped(second) == {"soup": True, "ties": True, "both": False}
    assert first[2].lineage["output"] == second[2].lineage["output"]


def test_a_changed_parameter_is_refused_or_replaces_what_depends_on_it(family, tmp_path):
    run(recipe(family, tmp_path / "out"))
    changed = recipe(family, tmp_path / "out", density=0.9)
    with pytest.raises(RequestError) as caught:
        run(changed)
    assert len(caught.value.problems) == 2
    assert "ties: was made with other parameters or inputs; pass --overwrite" in caught.value.problems[0]
    assert skipped(run(changed, overwrite=True)) == {"soup": True, "ties": False, "both": False}


def test_a_changed_input_is_noticed_by_its_content(family, tmp_path):
    run(recipe(family, tmp_path / "out"))
    shutil.rmtree(family["b"])
    write_llama(tmp_path / "b", 7)
    with pytest.raises(RequestError, match="other parameters or inputs"):
        run(recipe(family, tmp_path / "out"))


def test_moving_inputs_changes_nothing(family, tmp_path):
    run(recipe(family, tmp_path / "out"))
    shutil.move(family["a"], tmp_path / "moved")
    moved = {**family, "a": str(tmp_path / "moved")}
    assert all(skipped(run(recipe(moved, tmp_path / "out"))).values())


def test_an_output_that_was_tampered_with_is_not_taken_for_done(family, tmp_path):
    run(recipe(family, tmp_path / "out"))
    path = tmp_path / "out" / "soup" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RequestError, match="soup: was made with other parameters or inputs"):
        run(recipe(family, tmp_path / "out"))
    again = run(recipe(family, tmp_path / "out"), overwrite=True)
    assert skipped(again)["soup"] is False
    assert open_checkpoint(tmp_path / "out" / "soup").digest == again[0].lineage["output"]["digest"]


def test_a_plan_reads_headers_and_writes_nothing(family, tmp_path):
    made = plan(recipe(family, tmp_path / "out"), Settings())
    assert not made.problems
    size = open_checkpoint(family["a"]).weights.nbytes
    assert [(found.reads, found.writes) for _, found in made.steps] == [
        (2 * size, size),
        (3 * size, size),
        (2 * size, size),
    ]
    assert not (tmp_path / "out").exists()


def test_a_plan_tells_the_problems_of_all_steps(family, tmp_path):
    text = (
        f"lfm: 1\nmodels: {{a: {family['a']}, b: {tmp_path / 'nowhere'}}}\nout: {tmp_path / 'out'}\nsteps:\n"
        "  x: {merge: linear, models: [a, b]}\n  y: {merge: ties, models: [a]}\n  z: {merge: linear, models: [x, a]}\n"
    )
    found = plan(check_recipe(parse_yaml(text, "r")), Settings()).problems
    assert any(problem.startswith("step x: ") and "no such folder" in problem for problem in found)
    assert any("step y: Ties takes 2 or more models, got 1" in problem for problem in found)
    assert any(problem.startswith("step z: 'x' cannot be made") for problem in found)


def test_an_input_is_never_the_output(family, tmp_path):
    text = f"lfm: 1\nout: {tmp_path}\nsteps:\n  a: {{merge: linear, models: [{family['a']}, {family['b']}]}}\n"
    with pytest.raises(RequestError, match="is \\(or holds\\) an input of this run"):
        run(check_recipe(parse_yaml(text, "r")), overwrite=True)
    assert open_checkpoint(family["a"]).digest


def test_a_folder_of_the_users_is_not_overwritten(family, tmp_path):
    (tmp_path / "out" / "soup").mkdir(parents=True)
    (tmp_path / "out" / "soup" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="was not made by lfm"):
        run(recipe(family, tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "soup" / "thesis.txt").read_text() == "years of work"


def test_lineage_and_card_tell_where_a_checkpoint_comes_from(family, tmp_path):
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "b" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    run(recipe(family, tmp_path / "out"))
    lineage = json.loads((tmp_path / "out" / "ties" / "lineage.json").read_text())
    assert [(parent["role"], parent["name"]) for parent in lineage["parents"]] == [
        ("models", "a"),
        ("models", "b"),
        ("base", "base"),
    ]
    assert lineage["parents"][0]["digest"] == open_checkpoint(family["a"]).digest
    assert lineage["output"]["digest"] == open_checkpoint(tmp_path / "out" / "ties").digest
    assert lineage["parameters"] == {"density": 0.5, "scale": 1.0, "scope": "model"}
    both = json.loads((tmp_path / "out" / "both" / "lineage.json").read_text())
    assert both["parents"][1]["made_by"]["method"] == "ties"
    card = ModelCard.load(tmp_path / "out" / "ties" / "README.md")
    assert card.data.base_model == ["a", "b", "base"]
    assert card.data.base_model_relation == "merge"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["lfm", "reuse", "ties"]
    assert card.data.pipeline_tag == "text-generation"
    assert "arxiv.org/abs/2306.01708" in card.text
    assert str(tmp_path) not in (tmp_path / "out" / "ties" / "README.md").read_text()
