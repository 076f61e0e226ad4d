"""Configurations of mergekit run unchanged, to the numbers that mergekit made of them."""

import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tests.golden.mergekit import golden, inputs
from tests.tokens import CHAT, EMBEDDING, TALE, member

from lfm.cli import main

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


# --- what has no golden numbers


def test_a_filter_sees_the_name_in_the_source_where_slices_renumber_layers(merged, checkpoints):
    config = """
    merge_method: passthrough
    slices:
      - sources: [{model: ./a, layer_range: [2, 3], parameters: {scale: [{filter: layers.2., value: 0.5}]}}]
      - sources: [{model: ./a, layer_range: [0, 1], parameters: {scale: [{filter: layers.1., value: 0.5}]}}]
    """
    found, _ = merged(config)
    source = tensors(checkpoints("tiny") / "a")
    for name in [name for name in found if ".layers." in name]:
        here = name.replace("layers.0.", "layers.2.") if "layers.0." in name else name.replace("layers.1.", "layers.0.")
        np.testing.assert_array_equal(found[name], source[here] * (0.5 if "layers.0." in name else 1))


def test_a_slice_may_be_of_the_base_alone(merged, checkpoints):
    config = """
    merge_method: ties
    base_model: ./base
    slices:
      - sources: [{model: ./a, layer_range: [0, 1]}, {model: ./base, layer_range: [0, 1]}]
      - sources: [{model: ./base, layer_range: [1, 3]}]
    parameters: {weight: 1, density: 0.5}
    """
    found, _ = merged(config)
    base = tensors(checkpoints("tiny") / "base")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found[name], base[name])
    assert not np.array_equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_an_adapter_goes_on_top_of_its_model(merged, checkpoints, tmp_path):
    generator = np.random.default_rng(0)
    name = "model.layers.1.mlp.up_proj"
    down, up = (generator.standard_normal(shape).astype("f4") for shape in ((2, 12), (11, 2)))
    (tmp_path / "lora").mkdir()
    factors = {f"base_model.model.{name}.lora_{key}.weight": value for key, value in (("A", down), ("B", up))}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    models = f"[{{model: ./a+{tmp_path / 'lora'}}}, {{model: {{model: ./a, lora: null}}}}]"
    found, _ = merged(f"{{merge_method: linear, models: {models}, parameters: {{weight: 1}}}}")
    source = tensors(checkpoints("tiny") / "a")
    agree(found, source | {f"{name}.weight": source[f"{name}.weight"] + up @ down})


PARTS = {
    "language_model.model.embed_tokens.weight": (7, 4),
    "language_model.model.layers.0.mlp.weight": (4, 4),
    "language_model.model.layers.1.mlp.weight": (4, 4),
    "vision_tower.vision_model.encoder.layers.0.mlp.weight": (3, 3),
    "multi_modal_projector.linear.weight": (4, 3),
}


def test_modules_are_merged_one_by_one(lfm, tmp_path):
    generator = np.random.default_rng(0)
    models, entries = {}, {}
    for name, weight in {"a": 1, "b": 3, "c": 1}.items():
        (tmp_path / name).mkdir()
        models[name] = {key: generator.standard_normal(shape).astype("f4") for key, shape in PARTS.items()}
        save_file(models[name], tmp_path / name / "model.safetensors")
        entries[name] = f"{{model: {tmp_path / name}, parameters: {{weight: {weight}}}}}"
    config = f"""
    merge_method: linear
    base_model: {tmp_path / "a"}
    modules:
      text_decoder:
        models: [{entries["a"]}, {entries["b"]}]
        parameters: {{normalize: [false, true]}}
      vision_tower: {{models: [{entries["a"]}, {entries["c"]}]}}
    """
    code, out, err = lfm(config, "merge", "--config", "their.yaml", "-o", tmp_path / "out", "-q")
    assert code == 0, err
    assert str(tmp_path / "out" / "merged") in out
    a, b, c = (models[name] for name in "abc")
    divisors = dict(zip(PARTS, (1, 1, 4), strict=False))  # of the text: `normalize` holds in its last layer alone
    expected = {name: (a[name] + 3 * b[name]) / divisor for name, divisor in divisors.items()}
    tower, projector = [*PARTS][3:]
    agree(tensors(tmp_path / "out" / "merged"), expected | {tower: (a[tower] + c[tower]) / 2, projector: a[projector]})
    assert f"modules not named here are those of {tmp_path / 'a'}; mergekit leaves them out" in err


TOKENS = """
merge_method: linear
models: [{{model: {0}/base}}, {{model: {0}/chat}}]
parameters: {{weight: 1}}
tokenizer: {{source: union, tokens: {{<new>: {{source: {{kind: model_token, model: {0}/base, token_id: 3}}}}}}}}
chat_template: chatml
"""


def test_tokens_are_joined_and_ruled_as_the_file_says(lfm, tmp_path):
    generator = np.random.default_rng(0)
    rows = {}
    for name, tokenizer in {"base": TALE, "chat": CHAT}.items():
        size = tokenizer.get_vocab_size()
        member(tmp_path, name, tokenizer, config__json={"vocab_size": size})
        rows[name] = generator.standard_normal((size, 4)).astype("f4")
        content = {EMBEDDING: rows[name], "model.norm.weight": np.ones(4, "f4")}
        save_file(content, tmp_path / name / "model.safetensors")
    code, _, err = lfm(TOKENS.format(tmp_path), "merge", "--config", "their.yaml", "-o", tmp_path / "out", "-q")
    assert code == 0, err
    found = tensors(tmp_path / "out")[EMBEDDING]
    ids = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in ids}
    number = TALE.get_vocab_size()
    np.testing.assert_allclose(found[:number], (rows["base"] + rows["chat"][:number]) / 2, atol=1e-6)
    for token in ("<|im_start|>", "<|im_end|>"):
        np.testing.assert_array_equal(found[ids[token]], rows["chat"][CHAT.token_to_id(token)])
    np.testing.assert_allclose(found[ids["<new>"]], rows["base"][3], atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(found)
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()


# --- in recipes


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
    agree(found, {name: between(one[name], models["c"][name], 0.25) for name in one})


def between(x, y, t):
    """What mergekit's slerp makes of two tensors: it goes straight where they are nearly parallel."""
    cosine = (x * y).sum(dtype="f8") / np.sqrt(np.square(x, dtype="f8").sum() * np.square(y, dtype="f8").sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


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
