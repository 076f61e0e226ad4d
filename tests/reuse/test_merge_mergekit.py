"""Configurations of mergekit run unchanged, to the numbers that mergekit made of them."""

import json
import re

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.golden.mergekit import golden, inputs

from lfm.api import from_config
from lfm.cli import main
from lfm.errors import RequestError
from lfm.reuse.merge._mergekit_methods import ALL_PARAMETERS, METHODS

CASES = list(golden.cases())
# What mergekit gets wrong, or cannot do, and we do; each has a test of its own.
WRONG = {"slices-fewer-sources-first"}
BETTER = {"multislerp-frozen", "della-wide"}
# Results in bfloat16: a number right between two of them may be rounded to either.
ROUNDED = {"linear-bf16-throughout", "slerp-bf16-throughout"}


def of(kind, leave_out=frozenset()):
    found = [case for case in CASES if case.kind == kind and case.name not in leave_out]
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, assets):
    """A function that gives the folder in which a set of checkpoints lies."""
    root, written = tmp_path_factory.mktemp("mergekit"), {}

    def folder(name):
        if name not in written:
            written[name] = root / name
            inputs.write(name, root / name, assets)
            assert inputs.fingerprint(name, assets) == golden.fingerprints()[name]
        return written[name]

    return folder


@pytest.fixture
def lfm(checkpoints, tmp_path, monkeypatch, capsys):
    """A function that runs a command where checkpoints lie, `their.yaml` standing for a configuration."""

    def call(config, *arguments, at="tiny"):
        monkeypatch.chdir(checkpoints(at))
        (tmp_path / "their.yaml").write_text(config)
        words = [str(tmp_path / "their.yaml") if word == "their.yaml" else str(word) for word in arguments]
        code = main(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def merged(lfm, tmp_path):
    """A function that runs a configuration, and gives what came out and was said."""

    def run(config, at="tiny", folder="out"):
        arguments = ("--config", "their.yaml", "-o", tmp_path / "out", "-q", "--threads", "1")
        code, _, err = lfm(config, "merge", *arguments, at=at)
        assert code == 0, err
        return tensors(tmp_path / folder), err

    return run


def tensors(folder):
    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def shapes(model):
    return {name: value.shape for name, value in model.items()}


def agree(found, expected, atol=2e-6):
    assert shapes(found) == shapes(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


# --- the numbers of mergekit


@of("exact", WRONG | ROUNDED)
def test_every_element_is_as_mergekit_made_it(case, merged):
    found, _ = merged(case.config, case.inputs)
    agree(found, case.expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ROUNDED], ids=lambda case: case.name)
def test_results_in_bfloat16_differ_where_mergekit_rounds_twice(case, merged):
    found, _ = merged(case.config, case.inputs)
    assert shapes(found) == shapes(case.expected)
    pairs = [(found[name].ravel(), value.ravel()) for name, value in case.expected.items()]
    ours, theirs = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    np.testing.assert_allclose(ours, theirs, rtol=2**-7)
    assert (ours != theirs).mean() < 0.01


@of("sampled")
def test_a_real_model_is_as_mergekit_made_it(case, merged):
    found, _ = merged(case.config, case.inputs)
    assert set(found) == set(case.expected)
    for name, value in case.expected.items():
        np.testing.assert_allclose(inputs.sample(name, found[name]), value, rtol=1e-6, atol=2e-6, err_msg=name)


def statistics(found, models):
    """What make.py took of a merge of one source into its base."""
    base, source = models["base"], models["a"]
    pairs = [(source[name].astype("f8") - base[name], found[name].astype("f8") - base[name]) for name in sorted(base)]
    before, after = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    large = (np.abs(before) > 0.02) & (after != 0)
    by_tensor = [np.abs(y).sum() / np.abs(x).sum() for x, y in pairs]
    return {
        "kept": (after != 0).mean(),
        "kept_by_rank": kept_by_rank(pairs),
        "l1_ratio": np.abs(after).sum() / np.abs(before).sum(),
        "l1_ratio_of_tensor": [min(by_tensor), max(by_tensor)],
        "factor": np.mean(after[large] / before[large]),
        "mean": after.mean(),
        "second_moment": np.square(after).mean(),
    }


def kept_by_rank(pairs):
    counts = np.zeros((2, 5))
    for change, left in pairs:
        size = np.abs(np.atleast_2d(change))
        rank = np.argsort(np.argsort(size, axis=1, kind="stable"), axis=1)
        for part in range(5):
            here = rank * 5 // size.shape[1] == part
            counts[:, part] += (np.atleast_2d(left)[here] != 0).sum(), here.sum()
    return counts[0] / counts[1]


@of("statistics")
def test_random_masks_keep_and_rescale_as_those_of_mergekit(case, merged):
    found, err = merged(case.config, case.inputs)
    ours, theirs = statistics(found, inputs.models(case.inputs)), case.expected
    # Four standard errors of the difference of two shares, for all elements and for a fifth of them.
    np.testing.assert_allclose(ours["kept"], theirs["kept"], atol=0.012)
    np.testing.assert_allclose(ours["kept_by_rank"], theirs["kept_by_rank"], atol=0.026)
    rescaled = "rescale: false" not in case.config
    np.testing.assert_allclose(ours["l1_ratio"], theirs["l1_ratio"], rtol=1e-5 if rescaled else 0.03)
    if rescaled:
        np.testing.assert_allclose(ours["l1_ratio_of_tensor"], theirs["l1_ratio_of_tensor"], rtol=1e-5)
    np.testing.assert_allclose(ours["factor"], theirs["factor"], rtol=0.05)
    np.testing.assert_allclose(ours["second_moment"], theirs["second_moment"], rtol=0.08)
    assert abs(ours["mean"] - theirs["mean"]) < 4 * np.sqrt(2 * theirs["second_moment"] / theirs["elements"])
    assert "random masks are other ones than mergekit's" in err


@of("refused", BETTER)
def test_what_mergekit_refuses_is_refused(case, lfm, tmp_path):
    code, _, err = lfm(case.config, "merge", "--config", "their.yaml", "-o", tmp_path / "out", at=case.inputs)
    assert code == 2
    assert re.search(r"their\.yaml:\d+: ", err) or case.name == "slices-too-deep", err
    assert not (tmp_path / "out").exists()


# --- where mergekit is wrong


def case_of(name):
    return next(case for case in CASES if case.name == name)


def test_no_source_is_left_out_of_what_follows_the_layers(merged, checkpoints):
    case = case_of("slices-fewer-sources-first")
    found, _ = merged(case.config)
    models = {name: tensors(checkpoints("tiny") / name) for name in "bc"}
    after = {name: (models["b"][name] + models["c"][name]) / 2 for name in ("model.norm.weight", "lm_head.weight")}
    agree(found, case.expected | after)
    for name in after:
        np.testing.assert_array_equal(case.expected[name], models["b"][name])  # what mergekit makes of it


def test_tensors_that_no_source_changed_stay_as_they_are(merged, checkpoints):
    found, _ = merged(case_of("multislerp-frozen").config)
    frozen = next(iter(inputs.FROZEN))
    np.testing.assert_array_equal(found[frozen], tensors(checkpoints("tiny") / "base")[frozen])


def test_an_epsilon_that_is_too_wide_is_narrowed(merged):
    _, err = merged(case_of("della-wide").config)
    assert "epsilon 0.15 is more than density 0.9 leaves room for: 0.1 counts" in err


# --- what a configuration means


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
    assert [*steps_of(tmp_path, config.format("dtype: torch.float16")).values()][0]["dtype"] == "float16"
    assert [*steps_of(tmp_path, config.format("dtype: float32, out_dtype: bfloat16")).values()][0][
        "dtype"
    ] == "bfloat16"
    assert "dtype" not in [*steps_of(tmp_path, config.format("dtype: null")).values()][0]
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
    [*_, note] = notes_of(tmp_path, MODULES)
    assert note == "their.yaml:4: modules: modules not named here are those of x/base; mergekit leaves them out"


def test_several_modules_are_merged_one_after_the_other(tmp_path):
    merged = MODULES.replace("[{model: x/base}]", "[{model: x/c, parameters: {weight: 1}}]")
    first, second = steps_of(tmp_path, merged).items()
    assert (first[0], first[1]["rest"]) == ("merged-text_decoder", "x/base")
    assert (second[0], second[1]["rest"], second[1]["models"]) == ("merged", "merged-text_decoder", ["x/c"])
    assert "vision_tower.*" in second[1]["only"]
    stacked = "{merge_method: passthrough, modules: {vision_tower: {slices: [{sources: [{model: x/a, layer_range: [0, 2]}]}]}}}"
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


def test_documents_of_one_file_take_each_others_results(merged, checkpoints, tmp_path):
    found, _ = merged(MULTI, folder="out/merged")
    models = {name: tensors(checkpoints("tiny") / name) for name in "abc"}
    one = tensors(tmp_path / "out" / "one")
    agree(one, {name: (models["a"][name] + 3 * models["b"][name]) / 4 for name in one})
    angles = {name: angle(one[name], models["c"][name]) for name in one}
    agree(
        found,
        {
            name: np.sin(0.75 * a) / np.sin(a) * one[name] + np.sin(0.25 * a) / np.sin(a) * models["c"][name]
            for name, a in angles.items()
        },
        atol=1e-4,  # mergekit goes straight where vectors are nearly parallel
    )


def angle(x, y):
    x, y = x.ravel().astype("f8"), y.ravel().astype("f8")
    return np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("---\n", "---\nname: one\n", "their.yaml:7: name: 'one' is the name of another result"),
        ("name: one", "name: ../one", "their.yaml:2: name: '../one' cannot name a folder"),
        ("name: one\n", "", "their.yaml:5: a second document without `name`; only one can be the result"),
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
            "their.yaml:9: models.2: ties needs `weight` for every tensor, and it is given for those that filters match; "
            "add an entry without `filter` as the last",
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
            "{merge_method: linear, parameters: {weight: 1}, models: [{model: {model: x/a, override_architecture: L}}]}",
            "their.yaml:1: models.0.model.override_architecture: models are matched by the names of their tensors here, "
            "whatever their architecture; leave it out",
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
GROUP = st.fixed_dictionaries(
    {}, optional={"models": st.lists(SOURCE, max_size=3), "slices": st.lists(SLICE, max_size=2)}
)
CONFIG = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(sorted(METHODS))},
    optional={
        "base_model": st.just("x/base"),
        "parameters": SETTINGS,
        "models": st.lists(SOURCE, max_size=3),
        "slices": st.lists(SLICE, max_size=2),
        "modules": st.dictionaries(st.sampled_from(["default", "text_decoder", "vision_tower"]), GROUP, max_size=2),
        "dtype": THINGS,
        "tokenizer_source": THINGS,
        "tokenizer": THINGS,
    },
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=CONFIG | THINGS)
def test_no_configuration_ends_in_a_traceback(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(config))
    try:
        recipe = from_config(path)
    except RequestError as error:
        assert error.problems
        assert all(problem.startswith(f"{path}") for problem in error.problems), error.problems
    else:
        assert yaml.safe_load(recipe.text)["steps"]


# --- in recipes


def test_a_recipe_takes_a_configuration_as_a_step(lfm, tmp_path):
    config = case_of("ties").config.replace("./a", "one")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"lfm: 1\nsteps:\n  one: {{merge: passthrough, models: [./a]}}\n  two: {{merge: {tmp_path / 'their.yaml'}}}\n"
    )
    code, _, err = lfm(config, "run", recipe, "-o", tmp_path / "run", "-q")
    assert code == 0, err
    agree(tensors(tmp_path / "run" / "two"), case_of("ties").expected)
    lineage = json.loads((tmp_path / "run" / "two" / "lineage.json").read_text())
    assert any("at the cut" in note for note in lineage["notes"])
    recipe.write_text(recipe.read_text().replace("their.yaml}", "their.yaml, density: 1}"))
    code, _, err = lfm(config.replace("ties", "tis"), "run", recipe, "-o", tmp_path / "run")
    assert code == 2
    assert "steps.two.density: unknown key;" in err
    assert "their.yaml:1: merge_method: 'tis' is no method of mergekit; did you mean 'ties'?" in err


def test_the_converted_recipe_makes_the_same(lfm, merged, tmp_path):
    case = case_of("passthrough-scale")
    code, out, _ = lfm(case.config, "convert-config", "their.yaml", "-o", tmp_path / "recipe.yaml")
    assert (code, out) == (0, f"{tmp_path / 'recipe.yaml'}\n")
    assert lfm(case.config, "run", tmp_path / "recipe.yaml", "-o", tmp_path / "run", "-q")[0] == 0
    agree(tensors(tmp_path / "run" / "merged"), case.expected)
    code, _, err = lfm(case.config, "convert-config", "their.yaml", "-o", tmp_path / "recipe.yaml")
    assert code == 2
    assert "exists already" in err


def test_the_text_of_a_recipe_tells_what_differs(lfm):
    code, out, err = lfm(case_of("ties").config, "convert-config", "their.yaml")
    assert (code, err) == (0, "")
    assert out.startswith("# What ")
    assert "\n# - " in out
    assert yaml.safe_load(out)["steps"]["merged"]["rules"] == "mergekit"


def test_notes_stand_in_the_plan(lfm, tmp_path):
    arguments = ("merge", "--config", "their.yaml", "-o", tmp_path / "out", "--dry-run", "--json")
    code, out, err = lfm(case_of("ties").config, *arguments)
    assert code == 0
    assert any("at the cut" in note for note in json.loads(out)["steps"][0]["notes"])
    assert "at the cut" in err
    assert not (tmp_path / "out").exists()
