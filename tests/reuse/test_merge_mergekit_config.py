"""What configurations of mergekit mean, and what is wrong with them: read, not run."""

import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lfm.api import from_config
from lfm.errors import RequestError
from lfm.recipe._yaml import parse_yaml
from lfm.recipe.schema import check_recipe, json_schema
from lfm.reuse.merge._mergekit.methods import ALL_PARAMETERS, METHODS
from lfm.reuse.merge._settings import Place, Settings


def steps_of(tmp_path, config):
    (tmp_path / "their.yaml").write_text(config)
    recipe = from_config(tmp_path / "their.yaml")
    return {step.name: step.as_dict() for step in recipe.steps.values()}


def notes_of(tmp_path, config):
    (tmp_path / "their.yaml").write_text(config)
    steps = from_config(tmp_path / "their.yaml").steps.values()
    return [note.removeprefix(f"{tmp_path}/") for step in steps for note in step.notes]


def problems_of(tmp_path, config):
    (tmp_path / "their.yaml").write_text(config)
    with pytest.raises(RequestError) as caught:
        from_config(tmp_path / "their.yaml")
    return [problem.removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


def test_what_defaults_differ_in_is_written_out(tmp_path):
    config = "{merge_method: della, base_model: b, models: [{model: x/a}], parameters: {weight: 1, density: 0.4}}"
    [step] = steps_of(tmp_path, config).values()
    assert step == {
        "merge": "della",
        "models": ["x/a"],
        "base": "b",
        "weights": [1],
        "density": 0.4,
        "epsilon": 0.15,
        "scale": 1.0,
        "normalize": True,
        "rescale": "norm",
        "rules": "mergekit",
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_mergekit_has_one_here(name, tmp_path):
    known = METHODS[name]
    names = ["x/a", "x/b"][: 1 if name in ("passthrough", "nearswap", "arcee_fusion", "slerp") else 2]
    config = {"merge_method": name, "models": [{"model": model} for model in names]}
    config |= {} if known.base == "ordinary" else {"base_model": "x/base"}
    config["parameters"] = {key: 0.5 for key, parameter in known.parameters.items() if parameter.required}
    [step] = steps_of(tmp_path, yaml.safe_dump(config)).values()
    assert step["merge"] == known.ours
    for parameter in known.parameters.values():
        assert parameter.ours in ("", "weight", "unit", "scale") or parameter.ours in step


def test_models_are_named_in_all_ways(tmp_path):
    config = """
    merge_method: linear
    parameters: {weight: 1}
    models:
      - {model: org/a@main+org/lora@v2}
      - model: {model: {path: org/b, revision: main}, lora: ./adapter}
      - model: {model: ./c+d, lora: null}
    """
    [step] = steps_of(tmp_path, config).values()
    assert step["models"] == ["org/a@main+org/lora@v2", "org/b@main+./adapter", "./c+d"]


def test_a_base_that_is_one_model_among_others_still_gives_the_config(tmp_path):
    config = "{merge_method: linear, base_model: x/b, models: [{model: x/a}, {model: x/b}], parameters: {weight: 1}}"
    [step] = steps_of(tmp_path, config).values()
    assert (step["models"], step["base"]) == (["x/a", "x/b"], "x/b")


def test_the_type_of_the_output_is_out_dtype_or_dtype(tmp_path):
    config = "{{merge_method: passthrough, models: [{{model: x/a}}], {}}}"
    for said, meant in (
        ("dtype: torch.float16", "float16"),
        ("dtype: float32, out_dtype: bfloat16", "bfloat16"),
        ("dtype: null", None),
    ):
        [step] = steps_of(tmp_path, config.format(said)).values()
        assert step.get("dtype") == meant
    assert notes_of(tmp_path, config.format("dtype: float32")) == []
    [note] = notes_of(tmp_path, config.format("dtype: bfloat16"))
    assert note.startswith("their.yaml:1: dtype: arithmetic is in float32 here")


TOKENS = """
merge_method: linear
base_model: x/base
models: [{model: x/a}]
parameters: {weight: 1}
chat_template: auto
"""


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: base", "base"),
        ("tokenizer_source: x/a", "x/a"),
        ("tokenizer: {source: {model: {path: x/a}}}", "x/a"),
        ("tokenizer: {}", "union"),
        ("tokenizer: {pad_to_multiple_of: 64}", {"source": "union", "pad_to_multiple_of": 64}),
        (
            "tokenizer: {source: base, tokens: {<a>: {source: x/a, force: true}, <b>: {source: {kind: zero}}, <c>: "
            "{source: {kind: model_token, model: x/base, token: d}}}}",
            {
                "source": "base",
                "tokens": {
                    "<a>": {"source": "x/a", "force": True},
                    "<b>": {"source": {"kind": "zero"}},
                    "<c>": {"source": {"kind": "model_token", "model": "x/base", "token": "d"}},
                },
            },
        ),
    ],
)
def test_what_is_said_of_tokens_means_the_same(said, meant, tmp_path):
    [step] = steps_of(tmp_path, TOKENS + said).values()
    told = step["tokenizer"]
    assert told == meant or (isinstance(meant, str) and told in ({"source": meant}, {"model": meant}))
    assert step["chat_template"] == "auto"


MODULES = """
merge_method: ties
base_model: x/base
modules:
  text_decoder: {models: [{model: x/a, parameters: {weight: 1}}, {model: x/b, parameters: {weight: 2}}]}
  vision_tower: {models: [{model: x/base}]}
parameters: {density: 0.5}
dtype: float32
"""


def test_a_module_is_merged_and_the_others_are_taken_over(tmp_path):
    [step] = steps_of(tmp_path, MODULES).values()
    assert (step["merge"], step["models"], step["rest"]) == ("ties", ["x/a", "x/b"], "x/base")
    assert "model.language_model.*" in step["only"]
    [note, *_] = notes_of(tmp_path, MODULES)
    assert note == "their.yaml:4: modules: modules not named here are those of x/base; mergekit leaves them out"


def test_several_modules_are_merged_one_after_the_other(tmp_path):
    merged = MODULES.replace("[{model: x/base}]", "[{model: x/c, parameters: {weight: 1}}]")
    first, second = steps_of(tmp_path, merged).items()
    assert (first[0], first[1]["rest"]) == ("merged-text_decoder", "x/base")
    assert (second[0], second[1]["rest"], second[1]["models"]) == ("merged", "merged-text_decoder", ["x/c"])
    assert "vision_tower.*" in second[1]["only"]
    slices = "[{sources: [{model: x/a, layer_range: [0, 2]}]}]"
    stacked = f"{{merge_method: passthrough, modules: {{vision_tower: {{slices: {slices}}}}}}}"
    [problem] = problems_of(tmp_path, stacked)
    assert problem.startswith("their.yaml:1: modules.vision_tower: slices make whole models here")


MULTI = """
name: one
merge_method: linear
models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: 3}}]
dtype: float32
---
merge_method: slerp
base_model: one
models: [{model: ./c}]
parameters: {t: 0.25}
dtype: float32
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("---\n", "---\nname: one\n", "their.yaml:7: name: 'one' is the name of another result"),
        ("name: one", "name: ../one", "their.yaml:2: name: '../one' cannot name a folder"),
        ("name: one\n", "", "their.yaml:6: a second document without `name`; only one can be the result"),
        ("base_model: one", "base_model: one+x/lora", "'one' is the result of another document, and takes neither"),
    ],
)
def test_documents_have_names_of_their_own(before, after, message, tmp_path):
    assert any(message in problem for problem in problems_of(tmp_path, MULTI.replace(before, after)))


# --- what is wrong, all at once, each with its line


def test_all_problems_are_told_with_their_lines(tmp_path):
    config = """\
merge_metod: ties
merge_method: ties
base_model: x/base
models:
  - model: x/a
    parameters: {weight: heavy, normalize: true}
  - model: x/a
    parametres: {weight: 1}
  - model: {path: x/b}
    parameters: {weight: [{filter: mlp, value: 1}], densty: 0.5}
parameters: {lambda: [], rescale: perhaps, gamma: 1}
dtype: bfloat
tokenizer_source: x/c
"""
    assert sorted(problems_of(tmp_path, config)) == sorted(
        [
            "their.yaml:1: merge_metod: unknown key; did you mean 'merge_method'?",
            "their.yaml:6: models.0.parameters.weight: 'heavy' is no number",
            "their.yaml:6: models.0.parameters.normalize: is one value for all models, and mergekit ignores it here; "
            "move it to the `parameters` of the slice or of the whole file",
            "their.yaml:7: models.1: 'x/a' stands here twice",
            "their.yaml:7: models.1: ties needs `weight`, of its own or for all models, and it is not given",
            "their.yaml:8: models.1.parametres: unknown key; did you mean 'parameters'?",
            "their.yaml:9: models.2.model.path: unknown key of a model",
            "their.yaml:9: models.2.model.model: names a model: a folder or a hub name; got None",
            "their.yaml:10: models.2.parameters.densty: ties has no such parameter; did you mean 'density'?",
            "their.yaml:9: models.2: ties needs `weight` for every tensor, and it is given for those that filters "
            "match; add an entry without `filter` as the last",
            "their.yaml:11: parameters.rescale: 'perhaps' is neither true nor false",
            "their.yaml:12: dtype: 'bfloat' is none of float32, bfloat16, float16, float64; did you mean 'bfloat16'?",
            "their.yaml:13: tokenizer_source: 'x/c' is none of the models that are merged; did you mean 'x/a'?",
        ]
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "their.yaml: holds nothing"),
        ("[1]", "their.yaml:1: a configuration is a mapping with the key merge_method; this is not one"),
        ("{lfm: 1, steps: {}}", "their.yaml:1: this is a recipe, and no configuration of mergekit; run it: `lfm run`"),
        ("{merge_method: linear}", "their.yaml:1: give one of models, slices and modules; got none"),
        ("{models: [{model: x/a}]}", "their.yaml:1: merge_method: is missing: the method"),
        (
            "{merge_method: karcher, models: [{model: {model: x/a, override_architecture: L}}]}",
            "their.yaml:1: models.0.model.override_architecture: models are matched by the names of their tensors "
            "here, whatever their architecture; leave it out",
        ),
        (
            "{merge_method: slerp, base_model: x/a, models: [{model: x/b}], parameters: {t: 7}}",
            "their.yaml:1: parameters.t: Input should be less than or equal to 2 (got 7)",
        ),
        (
            "{merge_method: ties, base_model: x/a, models: [{model: x/b}], parameters: {weight: 1, density: [2, 0.5]}}",
            "their.yaml:1: parameters.density: goes beyond 0 to 1 within a list by layer: [2, 0.5]",
        ),
        (
            "{merge_method: passthrough, slices: [{sources: [{model: x/a, layer_range: [3, 1]}]}]}",
            "their.yaml:1: slices.0.sources.0.layer_range: is the first layer and the one after the last, got [3, 1]",
        ),
    ],
)
def test_a_mistake_is_named_where_it_is(config, message, tmp_path):
    assert message in problems_of(tmp_path, config)


def test_what_has_no_effect_is_said(tmp_path):
    config = """\
merge_method: model_stock
base_model: x/base
models: [{model: x/a, parameters: {weight: 1}}, {model: x/b}, {model: x/base, parameters: {weight: 1}}]
parameters: {int8_mask: true, normalize: false}
"""
    assert notes_of(tmp_path, config) == [
        "their.yaml:4: parameters.int8_mask: model_stock has no such parameter, so it has no effect",
        "their.yaml:3: models.2.parameters: model_stock looks at none of this for the base",
    ]


# --- in recipes


def test_the_step_of_the_guide_is_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("their.yaml").write_text("{merge_method: karcher, models: [{model: x/a}, {model: x/b}]}")
    page = (Path(__file__).parents[2] / "docs" / "mergekit.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipe = parse_yaml(f"lfm: 1\n{block}", "page")
    assert [step.card.name for step in check_recipe(recipe).steps.values()] == ["karcher"]
    jsonschema.validate(recipe.value, json_schema())


def test_several_steps_of_a_file_have_names_of_their_own_in_a_recipe(tmp_path):
    (tmp_path / "their.yaml").write_text(MULTI)
    steps = {"one": {"merge": "linear", "models": ["x/a"]}, "two": {"merge": f"{tmp_path / 'their.yaml'}"}}
    recipe = yaml.safe_dump({"lfm": 1, "steps": {"two": steps["two"]}})
    assert list(check_recipe(parse_yaml(recipe, "recipe.yaml")).steps) == ["one", "two"]
    with pytest.raises(RequestError, match=r"recipe\.yaml:\d: steps\.two: makes 'one', as another step does"):
        check_recipe(parse_yaml(yaml.safe_dump({"lfm": 1, "steps": steps}, default_flow_style=None), "recipe.yaml"))


# --- whatever the file holds

KEYS = [
    *("merge_method", "models", "slices", "modules", "parameters", "base_model", "dtype", "out_dtype", "tokenizer"),
    *("tokenizer_source", "chat_template", "model", "lora", "path", "revision", "sources", "layer_range", "value"),
    *("filter", "source", "tokens", "kind", "force", "name", "default", "text_decoder", *sorted(ALL_PARAMETERS)),
]
SCALARS = st.sampled_from([None, True, 0, 1, 0.5, -1, 2**40, "", "x/a", "x/b", "union", "1e-3", "float16", *METHODS])
THINGS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
SETTINGS = st.dictionaries(st.sampled_from(sorted(ALL_PARAMETERS)), THINGS | st.floats(0, 1), max_size=4)
SOURCE = st.fixed_dictionaries(
    {"model": st.sampled_from(["x/a", "x/b", "x/base"]) | THINGS},
    optional={"parameters": SETTINGS, "layer_range": st.just([0, 2]) | THINGS},
)
SLICE = st.fixed_dictionaries({"sources": st.lists(SOURCE, max_size=3)}, optional={"parameters": SETTINGS})
MODELS, SLICES = st.lists(SOURCE, max_size=3), st.lists(SLICE, max_size=2)
GROUP = st.fixed_dictionaries({}, optional={"models": MODELS, "slices": SLICES})
CONFIG = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(sorted(METHODS))},
    optional={
        "base_model": st.just("x/base"),
        "parameters": SETTINGS,
        "models": MODELS,
        "slices": SLICES,
        "modules": st.dictionaries(st.sampled_from(["default", "text_decoder", "vision_tower"]), GROUP, max_size=2),
        "dtype": THINGS,
        "tokenizer_source": THINGS,
        "tokenizer": THINGS,
    },
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=CONFIG | THINGS)
def test_no_configuration_ends_in_a_traceback(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(config))
    problems = []
    try:
        assert yaml.safe_load(from_config(path).text)["steps"]
    except RequestError as error:
        problems = error.problems
    assert [problem for problem in problems if not problem.startswith(f"{path}")] == []


# --- parameters that vary, against the rule of mergekit written down once more

NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
SHARE = st.sampled_from([0, 0.25, 0.5, 1, "5e-1", True])
VARIED = SHARE | st.lists(SHARE, min_size=1, max_size=4)
ENTRY = st.fixed_dictionaries({"value": VARIED}, optional={"filter": st.sampled_from(["mlp", "layers.1.", "*", None])})
GIVEN = st.dictionaries(
    st.sampled_from(["weight", "density", "lambda"]), VARIED | ENTRY | st.lists(ENTRY, max_size=3), max_size=3
)


def by_their_rule(name, levels, tensor, depth):
    """What mergekit takes for a parameter: None where no level says anything of this tensor."""
    for level in levels:
        setting = level.get(name, [])
        entries = [setting] if isinstance(setting, dict) else setting
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            entries = [{"value": setting}]
        for entry in entries:
            part = entry.get("filter")
            if part is None or part == "*" or part in tensor:
                value = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
                return np.interp(depth * (len(value) - 1), range(len(value)), [float(number) for number in value])
    return None


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(own=st.tuples(GIVEN, GIVEN), module=GIVEN, whole=GIVEN, depth=st.sampled_from([0, 0.25, 0.5, 0.9, 1]))
def test_parameters_are_found_as_mergekit_finds_them(own, module, whole, depth, tmp_path_factory):
    own = [{name: value for name, value in level.items() if name != "lambda"} for level in own]
    whole = {**whole, "weight": [*(whole["weight"] if _is_entries(whole.get("weight")) else []), {"value": 0.75}]}
    models = [{"model": model, "parameters": level} for model, level in zip(["x/a", "x/b"], own, strict=True)]
    config = {"merge_method": "ties", "base_model": "x/base", "parameters": whole}
    config["modules"] = {"default": {"models": models, "parameters": module}}
    path = tmp_path_factory.getbasetemp() / "varied.yaml"
    path.write_text(yaml.safe_dump(config))
    [step] = from_config(path).steps.values()
    found = Settings(step.method, step.inputs)
    for tensor in NAMES:
        resolved = found.resolve(Place(tensor, (tensor, tensor), depth))
        levels = [[level, module, whole] for level in own]
        weights = [by_their_rule("weight", each, tensor, depth) for each in levels]
        densities = [by_their_rule("density", each, tensor, depth) for each in levels]
        scale = by_their_rule("lambda", [module, whole], tensor, depth)
        np.testing.assert_allclose(resolved.weights, weights)
        np.testing.assert_allclose(resolved.values["density"], [1 if one is None else one for one in densities])
        np.testing.assert_allclose(resolved.method.scale, 1 if scale is None else scale)


def _is_entries(setting):
    return isinstance(setting, list) and all(isinstance(entry, dict) for entry in setting)
