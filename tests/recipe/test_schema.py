"""Recipes: everything wrong is said at once, with its line; nothing ends in a traceback."""

import re
import string
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm.cli._recipes import shipped
from lfm.errors import RequestError
from lfm.method import cards
from lfm.recipe._yaml import parse_yaml
from lfm.recipe.schema import check_recipe, in_order, json_schema, load_recipe

GOOD = """\
lfm: 1
seed: 3
models:
  base: {ref: org/base}
  a: org/a
  b: org/b
steps:
  merged: {merge: ties, base: base, models: [a, b], density: 0.3}
  again: {merge: linear, models: [merged, a], weights: [1, 2]}
evaluate: {perplexity: text.txt, compare: [base, merged]}
out: runs/x
"""


# Each line repeats the one before ten times: a million values in 400 bytes.
LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        check_recipe(parse_yaml(text, "r.yaml"))
    return caught.value.problems


def test_a_good_recipe_is_read_whole():
    recipe = check_recipe(parse_yaml(GOOD, "r.yaml"))
    assert list(recipe.steps) == ["merged", "again"]
    assert recipe.steps["merged"].parameters == {"density": 0.3}
    assert recipe.steps["again"].inputs.weights == [1, 2]
    assert recipe.seed == 3
    assert recipe.out == Path("runs/x")
    assert list(recipe.evaluate.perplexity) == ["text"]


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("densty: 0.3", "density: 0.3", "r.yaml:8: steps.merged.densty: unknown key; did you mean 'density'?"),
        ("density: fast", "density: 0.3", "r.yaml:8: steps.merged.density: Input should be a valid number"),
        ("density: 1.5", "density: 0.3", "r.yaml:8: steps.merged.density: Input should be less than or equal to 1"),
        ("density: .nan", "density: 0.3", "r.yaml:8: steps.merged.density:"),
        ("merge: tie,", "merge: ties,", "r.yaml:8: steps.merged.merge: unknown method 'tie'; did you mean 'ties'?"),
        ("mrge: ties,", "merge: ties,", "did you mean 'merge'?"),
        ("seeds: 3", "seed: 3", "r.yaml:2: seeds: unknown key; did you mean 'seed'?"),
        ("lfm: 2", "lfm: 1", "r.yaml:1: lfm: Input should be less than or equal to 1"),
        (
            "base: bse,",
            "base: base,",
            "r.yaml:8: steps.merged.base: 'bse' is no model or step of this recipe; did you mean",
        ),
        (
            "compare: [base, mergd]",
            "compare: [base, merged]",
            "'mergd' is no model or step of this recipe; did you mean",
        ),
        ("models: [a, b], d", "models: a, d", "r.yaml:8: steps.merged.models: Input should be a valid list"),
        ("perplexty: text.txt", "perplexity: text.txt", "r.yaml:10: evaluate.perplexty: unknown key; did you mean"),
        ("  merged: {", "  base: {", "'base' is the name of a model too"),
        ("  again: {", "  ../up: {", "'../up' cannot name a folder"),
    ],
)
def test_a_mistake_is_told_with_its_line(wrong, right, message):
    text = GOOD.replace(wrong, right) if message.endswith("valid list") else GOOD.replace(right, wrong)
    if "name of a model too" in message or "cannot name" in message:
        text = GOOD.replace(wrong, right)
    assert any(message in problem for problem in problems_of(text)), problems_of(text)


def test_all_mistakes_are_told_at_once():
    text = (
        GOOD.replace("density: 0.3", "densty: 0.3").replace("weights: [1, 2]", "weights: [x, 2]").replace("seed", "sed")
    )
    assert len(problems_of(text)) == 3


def test_steps_that_wait_for_each_other_are_refused():
    text = "lfm: 1\nsteps:\n  a: {merge: linear, models: [b]}\n  b: {merge: linear, models: [a]}\n"
    assert "these steps wait for each other: a, b" in problems_of(text)[0]
    assert "its own output" in problems_of("lfm: 1\nsteps:\n  a: {merge: linear, models: [a]}\n")[0]


def test_steps_run_after_what_they_take():
    text = "lfm: 1\nsteps:\n  late: {merge: linear, models: [early]}\n  early: {merge: linear, models: [org/a]}\n"
    assert [step.name for step in in_order(check_recipe(parse_yaml(text, "r")).steps)] == ["early", "late"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping"),
        ("- 1\n- 2\n", "a recipe is a mapping"),
        ("lfm: 1\nlfm: 1\n", "r.yaml:2: the key 'lfm' stands here twice"),
        ("lfm: 1\nno: 2\n", "the key 'no' is not text; put it in quotes"),
        ("lfm: [1\n", "not valid YAML"),
        ("lfm: 1\n\tsteps: {}\n", "r.yaml:2: not valid YAML"),
        ("lfm: !!python/object/apply:os.system [echo]\n", "r.yaml:1: not valid YAML here: the tag"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("{" * 2000, "r.yaml: "),
        (LAUGHS, "more than 100,000 values"),
    ],
)
def test_text_that_is_no_recipe_is_refused(text, message):
    with pytest.raises(RequestError) as caught:
        check_recipe(parse_yaml(text, "r.yaml"))
    assert message in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"lfm: \xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RequestError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


words = st.sampled_from(
    [
        "lfm",
        "steps",
        "models",
        "merge",
        "ties",
        "linear",
        "tune",
        "full",
        "base",
        "weights",
        "data",
        "density",
        "a",
        "ref",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=4), inner, max_size=5),
    max_leaves=25,
)


@given(st.dictionaries(words, values, max_size=6))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_structure_ends_in_a_traceback(structure):
    survives(yaml.safe_dump({"lfm": 1, **structure}))


@given(st.text(alphabet=string.printable + "é\u2028\x00\x85", max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_ends_in_a_traceback(text):
    survives(text)


@given(st.integers(0, len(GOOD)), st.integers(0, 10), st.text(alphabet=string.printable, max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_damaged_recipe_ends_in_a_traceback(place, length, inserted):
    survives(GOOD[:place] + inserted + GOOD[place + length :])


def survives(text: str) -> None:
    problems = ["r.yaml"]
    try:
        check_recipe(parse_yaml(text, "r.yaml"))
    except RequestError as error:
        problems = error.problems
    assert problems
    assert all(problem.startswith("r.yaml") for problem in problems)


def test_the_json_schema_takes_what_is_right_and_refuses_what_is_not():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for text in (GOOD, *(path.read_text(encoding="utf-8") for path in shipped().values())):
        check.validate(yaml.safe_load(text))
    for wrong, right in (("densty", "density"), ("density: 3", "density: 0.3"), ("merge: tis", "merge: ties")):
        with pytest.raises(jsonschema.ValidationError):
            check.validate(yaml.safe_load(GOOD.replace(right, wrong)))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_are_right(name):
    assert load_recipe(shipped()[name]).steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("'': {merge: linear, models: [a]}", "r.yaml:4: steps.: '' cannot name a folder of the run"),
        (".hidden: {merge: linear, models: [a]}", "r.yaml:4: steps..hidden: '.hidden' cannot name a folder of the run"),
        ("x/y: {merge: linear, models: [a]}", "r.yaml:4: steps.x/y: 'x/y' cannot name a folder of the run"),
        ('"x\\ny": {merge: linear, models: [a]}', "r.yaml:4: steps.'x\\ny': 'x\\ny' cannot name a folder of the run"),
        ("results.json: {merge: linear, models: [a]}", "'results.json' cannot name a folder of the run"),
        ("a: {merge: linear, models: [b]}", "r.yaml:4: steps.a: 'a' is the name of a model too"),
        (
            "X: {merge: linear, models: [a]}\n  x: {merge: linear, models: [a]}",
            "r.yaml:5: steps.x: 'x' and 'X' are one folder on some systems; give one another name",
        ),
        ("x: {merge: linear}", "r.yaml:4: steps.x.models: is missing: the models to merge (the sources)"),
        (
            "x: {models: [a]}",
            "r.yaml:4: steps.x: a step has one of the keys tune, distill, ensemble, merge, edit; got none",
        ),
        (
            "x: {merge: linear, tune: full, models: [a]}",
            "one of the keys tune, distill, ensemble, merge, edit; got merge and tune",
        ),
        ("x: {merge: [linear], models: [a]}", "r.yaml:4: steps.x.merge: unknown method ['linear']"),
        ("x: 3", "r.yaml:4: steps.x: Input should be a valid dictionary (got 3)"),
        ("x: {merge: ties, models: [a], scale: .inf}", "steps.x.scale: Input should be a finite number (got inf)"),
        ("x: {merge: linear, models: [a], weights: [.nan]}", "steps.x.weights.0: Input should be a finite number"),
        ("x: {merge: linear, models: [{rf: a}]}", "r.yaml:4: steps.x.models.0.rf: unknown key; did you mean 'ref'?"),
        (
            "x: {tune: full, model: a, data: {path: t, prt: train}}",
            "r.yaml:4: steps.x.data.prt: unknown key; did you mean 'part'?",
        ),
    ],
)
def test_a_step_that_cannot_be_is_told_with_its_line(steps, message):
    found = problems_of(f"lfm: 1\nmodels: {{a: org/a, b: org/b}}\nsteps:\n  {steps}\nout: x\n")
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("name", ["a b", "été", "模型", "x+y", "x@1", "a.b", "~x"])
def test_a_step_may_have_any_name_that_a_folder_can_have(name):
    recipe = check_recipe(parse_yaml(f"lfm: 1\nsteps:\n  {name}: {{merge: linear, models: [org/a]}}\n", "r.yaml"))
    assert list(recipe.steps) == [name]


def test_wrong_types_do_not_hide_wrong_names():
    text = GOOD.replace("density: 0.3", "density: 3").replace("compare: [base", "compare: [bse")
    assert problems_of(text) == (
        "r.yaml:8: steps.merged.density: Input should be less than or equal to 1 (got 3)",
        "r.yaml:10: evaluate.compare.0: 'bse' is no model or step of this recipe; did you mean 'base'?",
    )


def test_models_name_no_other_models():
    text = "lfm: 1\nmodels: {a: org/a, b: a}\nsteps:\n  x: {merge: linear, models: [a, b]}\n"
    assert problems_of(text) == (
        "r.yaml:2: models.b: 'a' is a name of this recipe; a model here is a folder or a hub name",
    )


def test_the_version_is_asked_for():
    assert "r.yaml:1: lfm: is missing: version of the recipe language: 1" in problems_of("steps: {}\n")


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/models.md"])
def test_the_json_schema_takes_the_recipes_of_the_guide(page):
    check = jsonschema.Draft202012Validator(json_schema())
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        check.validate({"lfm": 1, **yaml.safe_load(block)})


def test_the_json_schema_describes_every_method_and_key():
    alternatives = json_schema()["properties"]["steps"]["additionalProperties"]["oneOf"]
    titles = [f"{verb} {name}" for verb, name in cards()]
    assert [item["title"] for item in alternatives] == [*titles, "merge, from a file"]
    for item, card in zip(alternatives, cards().values(), strict=False):
        expected = {card.verb.name, "controls", *card.verb.inputs.model_fields, *card.parameters.model_fields}
        assert set(item["properties"]) == expected
