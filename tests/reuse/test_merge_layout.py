"""Which tensors go into which: parts of models, models within models, layers from slices, what varies."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.merging import load, near, save, tensors
from tests.tiny import LLAMA, llama_tensors, write_llama

import lfm
from lfm.errors import LfmError, RequestError
from lfm.reuse.merge import _engine

QUIET = lfm.Settings(threads=2, quiet=True)


def run(step, out, **options):
    """Run one step as a recipe would hold it; returns the tensors that come out."""
    from lfm.api import one_step

    [(verb, method)] = [(key, value) for key, value in step.items() if key == "merge"]
    keys = {key: value for key, value in step.items() if key != verb}
    lfm.run(one_step(verb, method, keys, out=out), settings=options.get("settings", QUIET))
    return load(out)


def refused(step, out):
    with pytest.raises(RequestError) as caught:
        run(step, out)
    assert not out.exists()
    return caught.value.problems


def deep_llama(folder, seed, layers=4, **config):
    """Write a Llama of some layers, each different."""
    folder.mkdir()
    whole = llama_tensors(seed)
    content = {name: tensor for name, tensor in whole.items() if ".layers." not in name}
    for layer in range(layers):
        generator = torch.Generator().manual_seed(100 * seed + layer)
        for name, tensor in whole.items():
            if ".layers.0." in name:
                content[name.replace(".layers.0.", f".layers.{layer}.")] = torch.randn(
                    tensor.shape, generator=generator
                )
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": layers, **config}))
    return folder


def layer(model, number):
    return {n.partition(f"layers.{number}.")[2]: t for n, t in model.items() if f".layers.{number}." in n}


def same(one, two):
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


# --- parts of models


def test_only_some_tensors_are_merged_and_the_rest_comes_from_the_base_or_from_where_one_says(tmp_path):
    models = [tensors(0), *(near(tensors(0), seed) for seed in (1, 2, 3))]
    base, a, b, c = (str(save(tmp_path / f"m{i}", model)) for i, model in enumerate(models))
    step = {"merge": "task_arithmetic", "models": [a, b], "base": base, "only": ["layer.*"], "scale": 1.0}
    whole = run({**step, "only": []}, tmp_path / "whole")
    for rest, donor in ((None, models[0]), (c, models[3])):
        found = run({**step, **({"rest": rest} if rest else {})}, tmp_path / f"out-{rest is None}")
        for name, tensor in found.items():
            assert torch.equal(tensor, whole[name] if name.startswith("layer.") else donor[name])


def test_a_pattern_that_fits_nothing_and_a_rest_of_nothing_are_told(tmp_path):
    model = str(save(tmp_path / "m", tensors(0)))
    step = {"merge": "linear", "models": [model, model]}
    (line,) = refused({**step, "only": ["text.*"]}, tmp_path / "out")
    assert line == f"only: no tensor of {model} is called so; it has embed, head, layer, scale ..."
    (line,) = refused({**step, "rest": model}, tmp_path / "out")
    assert line.startswith("rest: says where tensors come from that `only` leaves out")


VISION = {"model.vision.patch.weight": (4, 3), "model.projector.weight": (16, 4)}


def vision_language(seed):
    """A model with a language model inside, as its names are in transformers."""
    text = llama_tensors(seed)
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
    return {**inside, **tensors(seed, shapes=VISION)}


def test_the_language_model_of_a_vision_language_model_is_merged_with_a_plain_one(tmp_path):
    one, text = vision_language(1), llama_tensors(2)
    whole, plain = save(tmp_path / "vlm", one), save(tmp_path / "llm", text)
    step = {"merge": "linear", "models": [str(whole), str(plain)], "only": ["model.language_model.*"]}
    found = run(step, tmp_path / "out")
    assert set(found) == set(one)
    for name in one:
        if name in VISION:
            assert torch.equal(found[name], one[name])
        else:
            mean = (one[name] + text[name.replace("language_model.", "")]) / 2
            torch.testing.assert_close(found[name], mean)
    notes = lfm.open_checkpoint(tmp_path / "out").lineage["notes"]
    assert notes == [f"{plain}: its model.* is matched with model.language_model.* of {whole}"]


def test_without_saying_so_a_vision_tower_is_not_lost(tmp_path):
    whole, plain = save(tmp_path / "vlm", vision_language(1)), save(tmp_path / "llm", llama_tensors(2))
    lines = refused({"merge": "linear", "models": [str(whole), str(plain)]}, tmp_path / "out")
    assert [line for line in lines if "'model.vision.patch.weight' is missing" in line]
    lines = refused({"merge": "linear", "models": [str(plain), str(whole)]}, tmp_path / "out")
    assert [line for line in lines if "'model.vision.patch.weight' is not in" in line]


def test_an_output_layer_that_is_the_embedding_is_found_there(tmp_path):
    stored = {**llama_tensors(1), "lm_head.weight": llama_tensors(1)["model.embed_tokens.weight"].clone()}
    untied = save(tmp_path / "untied", stored)
    (untied / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": False}))
    tied = write_llama(tmp_path / "tied", 2)
    found = run({"merge": "linear", "models": [str(untied), str(tied)]}, tmp_path / "out")
    expected = (stored["lm_head.weight"] + llama_tensors(2)["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], expected)
    lines = refused({"merge": "linear", "models": [str(tied), str(untied)]}, tmp_path / "out2")
    assert "'lm_head.weight' is not in" in lines[0]


# --- BatchNorm


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "wise_ft"])
def test_statistics_of_batchnorm_are_averaged_never_negative_and_counters_kept(method, tmp_path):
    def model(shift):
        return {
            "bn.weight": torch.ones(3) + shift,
            "bn.running_mean": torch.ones(3) * shift,
            "bn.running_var": torch.full((3,), 0.1) + shift,
            "bn.num_batches_tracked": torch.tensor(7),
        }

    base, a, b = (str(save(tmp_path / f"m{shift}", model(shift))) for shift in (5.0, 0.0, 1.0))
    step = {"merge": method, "models": [a] if method == "wise_ft" else [a, b]}
    step |= {} if method == "linear" else {"base": base}
    step |= {"scale": 2.0} if method == "task_arithmetic" else {}
    found = run(step, tmp_path / "out")
    assert found["bn.num_batches_tracked"].item() == 7
    expected = {"wise_ft": 2.5}.get(method, 0.5)  # half-way back to the base, or the mean of the two
    torch.testing.assert_close(found["bn.running_mean"], torch.full((3,), expected))
    torch.testing.assert_close(found["bn.running_var"], torch.full((3,), 0.1 + expected))
    notes = lfm.open_checkpoint(tmp_path / "out").lineage["notes"]
    assert any("BatchNorm averaged" in note for note in notes) == (method != "wise_ft")


# --- layers from slices


def test_slices_stack_layers_of_several_models_and_the_result_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    a, b = deep_llama(tmp_path / "a", 1), deep_llama(tmp_path / "b", 2)
    slices = [{"model": str(a), "layers": [0, 3]}, {"model": str(b), "layers": [1, 4]}]
    out = tmp_path / "out"
    found = run({"merge": "passthrough", "models": [str(a), str(b)], "slices": slices}, out)
    for number, (donor, of) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        assert same(layer(found, number), layer(load(donor), of))
    assert torch.equal(found["model.embed_tokens.weight"], load(a)["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], load(b)["model.norm.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config == {**LLAMA, "num_hidden_layers": 6}
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_slices_of_one_model_repeat_its_layers_scaled_where_asked(tmp_path):
    a = deep_llama(tmp_path / "a", 1, layer_types=["x", "y", "z", "w"])
    part = {"model": str(a), "layers": [1, 3], "parameters": {"scale": {"o_proj": 0.5, "default": 1.0}}}
    slices = [{"model": str(a), "layers": [0, 2]}, part, {"model": str(a), "layers": [3, 4]}]
    step = {"merge": "passthrough", "models": [str(a)], "slices": slices}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "config_problems", lambda *_: ([], []))  # no Llama has such layer types
        found = run(step, tmp_path / "out")
    given = load(a)
    assert same(layer(found, 1), layer(given, 1))
    for name, tensor in layer(found, 2).items():
        assert torch.equal(tensor, layer(given, 1)[name] * (0.5 if "o_proj" in name else 1.0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["x", "y", "y", "z", "w"]


def test_slices_are_merged_with_weights_of_their_own(tmp_path):
    a, b = deep_llama(tmp_path / "a", 1), deep_llama(tmp_path / "b", 2)

    def both(weight, first):
        layers = [first, first + 2]
        return {"sources": [{"model": str(m), "layers": layers, "weight": w} for m, w in ((a, 1.0), (b, weight))]}

    found = run({"merge": "linear", "models": [str(a), str(b)], "slices": [both(0.0, 0), both(3.0, 1)]}, tmp_path / "o")
    assert same(layer(found, 1), layer(load(a), 1))
    mixed = {name: (tensor + 3 * layer(load(b), 2)[name]) / 4 for name, tensor in layer(load(a), 2).items()}
    torch.testing.assert_close(layer(found, 3), mixed)


@pytest.mark.parametrize(
    ("slices", "told"),
    [
        ([{"model": "A", "layers": [0, 5]}], "slices.0: A has 4 layers, of which [0, 5] is no slice"),
        ([{"model": "A", "layers": [2, 2]}], "slices.0: A has 4 layers, of which [2, 2] is no slice"),
        ([{"model": "C", "layers": [0, 2]}], "slices.0: 'C' is none of the step's models"),
        (
            [{"sources": [{"model": "A", "layers": [0, 2]}, {"model": "B", "layers": [0, 3]}]}],
            "slices.0: sources with different numbers of layers: [2, 3]",
        ),
        (
            [{"sources": [{"model": "A", "layers": [0, 2]}, {"model": "B", "layers": [0, 2]}]}],
            "slices.0: Passthrough does not take 2 sources",
        ),
    ],
)
def test_slices_that_make_no_sense_are_told(slices, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("AB"):
        deep_llama(tmp_path / name, seed)
    lines = refused({"merge": "passthrough", "models": ["A", "B"], "slices": slices}, tmp_path / "out")
    assert told in lines


def test_a_model_without_one_stack_of_layers_has_no_slices(tmp_path):
    content = {"encoder.block.0.w": torch.ones(2), "decoder.block.0.w": torch.ones(2)}
    model = str(save(tmp_path / "m", content))
    step = {"merge": "passthrough", "models": [model], "slices": [{"model": model, "layers": [0, 1]}]}
    (line,) = refused(step, tmp_path / "out")
    assert line.startswith("slices: which layers? A model with one stack of layers is needed, got decoder.block.* (1)")


# --- what varies


def test_a_list_runs_along_the_layers_and_a_mapping_along_the_names(tmp_path):
    base, a = deep_llama(tmp_path / "base", 0), deep_llama(tmp_path / "a", 1)
    scale = {"o_proj": 1.0, "mlp": [0.0, 1.0], "default": 0.5}
    step = {"merge": "task_arithmetic", "models": [str(a)], "base": str(base), "scale": scale}
    found, before, after = run(step, tmp_path / "out"), load(base), load(a)
    for name, tensor in found.items():
        number = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
        share = 1.0 if "o_proj" in name else number / 3 if "mlp" in name else 0.5
        torch.testing.assert_close(tensor, before[name] + share * (after[name] - before[name]), rtol=1e-5, atol=1e-6)


def test_weights_and_densities_may_differ_by_model_and_layer(tmp_path):
    base = tensors(0)
    sources = [{name: tensor + size for name, tensor in base.items()} for size in (1.0, 4.0)]
    paths = [str(save(tmp_path / f"m{i}", model)) for i, model in enumerate((base, *sources))]
    step = {"merge": "task_arithmetic", "models": paths[1:], "base": paths[0], "scale": 1.0}
    found = run({**step, "weights": [1.0, {"embed": 0.0, "default": 0.5}]}, tmp_path / "out")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, base[name] + (1.0 if "embed" in name else 3.0))
    both = {"merge": "ties", "models": paths[1:], "base": paths[0], "scope": "tensor"}
    one, two = (
        run({**both, "density": density}, tmp_path / f"d{index}")
        for index, density in enumerate((0.3, {"per_model": [0.3, {"default": 0.3}]}))
    )
    assert same(one, two)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"scale": [0.5, "x"]}, "scale: Input should be a valid number, unable to parse string as a number (got 'x')"),
        ({"density": [0.5, 2.0]}, "density: Input should be less than or equal to 1 (got 2.0)"),
        ({"density": {"per_model": [0.5]}}, "density: per_model takes a list with one value for each of the 2 models"),
        ({"scale": {"per_model": [1.0, 1.0]}}, "scale: cannot differ between models"),
        ({"weights": [1.0, {"mlp": "x"}]}, "weights.1: Input should be a valid number (got 'x')"),
        ({"weights": [1.0, []]}, "Input should be a number, a list of numbers, or a mapping"),
        ({"vary": {"densty": [1]}}, "densty: Ties has no such parameter"),
    ],
)
def test_values_that_make_no_sense_are_told(keys, told, tmp_path):
    model = str(save(tmp_path / "m", tensors(0)))
    lines = refused({"merge": "ties", "models": [model, model], "base": model, **keys}, tmp_path / "out")
    assert any(told in line for line in lines), lines


# --- memory


def test_a_budget_changes_no_byte_and_one_that_is_too_small_is_told_before_anything_is_read(tmp_path):
    shapes = {"w": (1000, 1000), "v": (70_001,)}
    base = tensors(0, shapes=shapes)
    paths = [str(save(tmp_path / f"m{i}", near(base, i) if i else base)) for i in range(3)]
    step = {"merge": "ties", "models": paths[1:], "base": paths[0]}
    free = run(step, tmp_path / "free")
    tight = run(step, tmp_path / "tight", settings=lfm.Settings(threads=2, quiet=True, memory=95_000_000))
    assert same(free, tight)
    with pytest.raises(RequestError, match=r"--memory: Ties needs \d+MB at least"):
        run(step, tmp_path / "none", settings=lfm.Settings(quiet=True, memory=1_000_000))


# --- rounding


def test_stochastic_rounding_keeps_small_changes_on_average(tmp_path):
    base = {"w": torch.ones(64, 1024).bfloat16()}
    source = {"w": (torch.ones(64, 1024) * 1.0078125).bfloat16()}  # the next number after 1
    paths = [str(save(tmp_path / f"m{i}", model)) for i, model in enumerate((base, source))]
    step = {"merge": "task_arithmetic", "models": paths[1:], "base": paths[0], "scale": 0.25}
    nearest, stochastic = (run({**step, "rounding": how}, tmp_path / how)["w"] for how in ("nearest", "stochastic"))
    assert (nearest == 1).all()
    assert set(stochastic.unique().tolist()) == {1.0, 1.0078125}
    assert stochastic.double().mean().item() == pytest.approx(1 + 0.25 * 0.0078125, abs=1e-4)


# --- after writing


def test_a_merge_that_would_not_load_is_not_left_behind(tmp_path):
    a = deep_llama(tmp_path / "a", 1, hidden_size=32)
    step = {"merge": "passthrough", "models": [str(a)], "slices": [{"model": str(a), "layers": [0, 2]}]}
    with pytest.raises(LfmError, match=r"the merged model would not load: tensor 'model\.embed_tokens\.weight' is"):
        run(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_nobody_knows_is_noted(tmp_path):
    a = deep_llama(tmp_path / "a", 1, model_type="unheard-of")
    step = {"merge": "passthrough", "models": [str(a)], "slices": [{"model": str(a), "layers": [0, 2]}]}
    run(step, tmp_path / "out")
    assert "not checked whether it loads" in lfm.open_checkpoint(tmp_path / "out").lineage["notes"][-1]


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    paths = [str(save(tmp_path / f"m{i}", near(tensors(0), i))) for i in range(3)]
    step = {"merge": "ties", "models": paths[1:], "base": paths[0], "scope": "tensor"}
    one = run({**step, "density": [0.5], "weights": [1e-3, 1]}, tmp_path / "one")
    two = run({**step, "density": ["5e-1"], "weights": ["1e-3", {"default": "1"}]}, tmp_path / "two")
    assert same(one, two)
