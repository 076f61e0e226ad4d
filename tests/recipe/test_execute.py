"""Running recipes: done steps are skipped, changed ones are noticed, nothing is overwritten unasked."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.tiny import LLAMA, write_llama

from lfm import RequestError, Settings, open_checkpoint, run
from lfm.recipe._yaml import parse_yaml
from lfm.recipe.execute import plan, prepare, step_key
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
    assert "ties: exists already, made with other parameters or inputs; pass --overwrite" in caught.value.problems[0]
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
    with pytest.raises(RequestError, match="soup: exists already, and was changed since it was made"):
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
        "  x: {merge: linear, models: [a, b]}\n  y: {merge: model_stock, models: [a]}\n"
        "  z: {merge: linear, models: [x, a]}\n"
    )
    found = plan(check_recipe(parse_yaml(text, "r")), Settings()).problems
    assert any(problem.startswith("step x: ") and "no such folder" in problem for problem in found)
    assert any("step y: ModelStock takes 2 or more models, got 1" in problem for problem in found)
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
    known = {"density": 0.5, "scale": 1.0, "normalize": True, "scope": "global", "rescale": "none", "rules": "paper"}
    assert lineage["parameters"] == known
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


def run_text(text, **how):
    return run(check_recipe(parse_yaml(text, "r.yaml"), text), **how)


def keys(text, **settings):
    """Return each step's key, by name; those of steps that take another's output need it made."""
    made = prepare(check_recipe(parse_yaml(text, "r.yaml"), text), Settings(**settings))
    assert not made.problems
    return {step.name: step_key(step, made.catalogue) for step, _ in made.steps}


def merging(family, *, seed=0, density=0.5, weights="[1, 1]", out="out", models=None):
    a, b = models or (family["a"], family["b"])
    return (
        f"lfm: 1\nseed: {seed}\nsteps:\n"
        f"  x: {{merge: ties, models: ['{a}', '{b}'], base: '{family['base']}', density: {density},\n"
        f"      weights: {weights}}}\n"
        f"out: {out}\n"
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_key_knows_what_decides_the_outcome(family, tmp_path, here):
    text = merging(family)
    before = keys(text)
    for change in ({"seed": 1}, {"density": 0.4}, {"weights": "[1, 2]"}, {"models": (family["b"], family["a"])}):
        assert keys(merging(family, **change)) != before
    assert keys(text) == before
    (tmp_path / "a" / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"x": 0}}}')
    assert keys(text) != before
    (tmp_path / "a" / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    assert keys(text) != before


def test_the_key_does_not_know_how_and_where(family, tmp_path, here):
    before = keys(merging(family))
    assert keys(merging(family), threads=1, quiet=True, memory=10**9) == before
    assert keys(merging(family, out="elsewhere")) == before
    assert keys(merging(family, density="5.0e-1", weights="[1.0, 1]")) == before
    shutil.copytree(family["a"], tmp_path / "moved")
    assert keys(merging(family, models=("moved", family["b"]))) == before
    (tmp_path / "a" / "README.md").write_text("a model")
    assert keys(merging(family)) == before


def test_the_key_knows_data_by_content(tmp_path, here):
    model = "models: {m: {config: {model_type: llama, vocab_size: 300}, tokenizer: bytes, task: causal-lm}}\n"
    text = f"lfm: 1\n{model}steps:\n  x: {{tune: full, model: m, data: text.txt}}\nout: out\n"
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    before = keys(text)
    shutil.copy(tmp_path / "text.txt", tmp_path / "same.txt")
    assert keys(text.replace("text.txt", "same.txt")) == before
    (tmp_path / "text.txt").write_text("one\n\ntwo!\n")
    assert keys(text) != before
    assert keys(text.replace("300", "301").replace("text.txt", "same.txt")) != before


def test_a_run_that_was_interrupted_goes_on_with_the_next_step(family, tmp_path, monkeypatch):
    from lfm.reuse.merge import _engine

    whole = _engine.run

    def interrupted(method, inputs, context, folder):
        if type(method).__name__ == "Slerp":
            raise KeyboardInterrupt
        return whole(method, inputs, context, folder)

    monkeypatch.setattr(_engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(family, tmp_path / "out"))
    assert not (tmp_path / "out" / "both").exists()
    monkeypatch.setattr(_engine, "run", whole)
    assert skipped(run(recipe(family, tmp_path / "out"))) == {"soup": True, "ties": True, "both": False}


def test_what_depends_on_a_step_that_is_missing_is_made_anew_if_asked(family, tmp_path):
    run(recipe(family, tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "soup")
    with pytest.raises(RequestError, match="both: exists already, and 'soup', which it was made from, is made anew"):
        run(recipe(family, tmp_path / "out"))
    assert not (tmp_path / "out" / "soup").exists()
    again = run(recipe(family, tmp_path / "out"), overwrite=True)
    assert skipped(again) == {"soup": False, "ties": True, "both": False}


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"key": 1}'])
def test_a_damaged_lineage_is_no_proof(family, tmp_path, damage):
    run(recipe(family, tmp_path / "out"))
    (tmp_path / "out" / "both" / "lineage.json").write_text(damage)
    with pytest.raises(RequestError, match="both: exists already, made with other parameters or inputs"):
        run(recipe(family, tmp_path / "out"))
    assert skipped(run(recipe(family, tmp_path / "out"), overwrite=True))["both"] is False


@pytest.mark.parametrize("damage", [b"", b"not weights", None])
def test_damaged_weights_are_made_anew_only_if_asked(family, tmp_path, damage):
    run(recipe(family, tmp_path / "out"))
    path = tmp_path / "out" / "both" / "model.safetensors"
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(RequestError, match="both: exists already, and was changed since it was made"):
        run(recipe(family, tmp_path / "out"))
    assert skipped(run(recipe(family, tmp_path / "out"), overwrite=True)) == {"soup": True, "ties": True, "both": False}


def test_nothing_is_written_into_or_over_an_input(family, tmp_path, here):
    step = f"lfm: 1\nsteps:\n  x: {{merge: linear, models: [{family['a']}, {family['b']}]}}\n"
    with pytest.raises(RequestError, match="x: lies in an input of this run"):
        run_text(step + "out: a\n")
    named = "lfm: 1\nmodels: {one: a, two: b}\nsteps:\n  a: {merge: linear, models: [one, two]}\nout: .\n"
    with pytest.raises(RequestError, match="a: is \\(or holds\\) an input of this run"):
        run_text(named, overwrite=True)
    run_text(step + "out: out\n")
    (tmp_path / "out" / "x" / "text.txt").write_text("mine")
    with pytest.raises(RequestError, match="x: is \\(or holds\\) an input"):
        run_text(step + "evaluate: {perplexity: out/x/text.txt}\nout: out\n", overwrite=True)


def test_a_home_is_found(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_text("lfm: 1\nsteps:\n  x: {merge: linear, models: [~/a, ~/b]}\nout: ~/out\n")
    assert (tmp_path / "out" / "x" / "lineage.json").exists()


def test_a_recipe_without_a_place_can_be_planned_but_not_run(family):
    text = f"lfm: 1\nsteps:\n  x: {{merge: linear, models: [{family['a']}]}}\n  y: {{merge: linear, models: [x]}}\n"
    found = check_recipe(parse_yaml(text, "r.yaml"))
    assert not plan(found, Settings()).problems
    with pytest.raises(RequestError, match="where to\\? give the recipe an `out`, or pass -o FOLDER"):
        run(found)


def test_seventy_billion_parameters_are_planned_from_headers(family, tmp_path, monkeypatch):
    from lfm.checkpoint import FileWeights

    layers = {f"model.layers.{n}.mlp.up_proj.weight": (28672, 30000) for n in range(80)}
    header, offset = {}, 0
    for name, (rows, columns) in layers.items():
        size = rows * columns * 2
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    for name in ("big", "other"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)  # a hole, not a byte of which is on the disk
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(FileWeights, "read", None)
    recipe = f"lfm: 1\nsteps:\n  x: {{merge: linear, models: [{tmp_path / 'big'}, {tmp_path / 'other'}]}}\n"
    made = prepare(check_recipe(parse_yaml(recipe, "r")), Settings(threads=2), tmp_path / "out")
    assert not made.problems
    [(_, found)] = made.steps
    assert found.writes == offset > 130e9
    assert found.memory < 1e9


def test_models_can_be_measured_without_a_step(family, tmp_path, monkeypatch):
    from lfm.evaluate import measure

    told = lambda names, spec, context: measure.Measured(notes=[", ".join(names)])  # noqa: E731
    monkeypatch.setattr(measure, "measure", told)
    (tmp_path / "text.txt").write_text("hello")
    text = f"lfm: 1\nmodels: {{a: {family['a']}}}\nevaluate: {{perplexity: {tmp_path / 'text.txt'}}}\n"
    assert run_text(text, out=tmp_path / "out") == []
    assert (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["notes"] == ["a"]


@pytest.mark.parametrize("text", ["lfm: 1\n", "lfm: 1\nmodels: {a: org/a}\n", "lfm: 1\nevaluate: {}\n"])
def test_a_recipe_has_something_to_do(text, tmp_path):
    with pytest.raises(RequestError, match="nothing to do: give the recipe steps, or models and what to evaluate"):
        run_text(text, out=tmp_path / "out")
