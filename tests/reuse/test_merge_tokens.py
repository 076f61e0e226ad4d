"""Models with different tokenizers, merged: the engine brings the rows of tokens into one order."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.merging import load
from tests.reuse.test_merge_layout import refused, run
from tests.tiny import LLAMA

WORDS = {
    "base": ["<unk>", "a", "b", "c", "d"],
    "more": ["<unk>", "c", "a", "b", "d", "e"],
    "less": ["<unk>", "a", "b", "c"],
}
WIDTH = 16


def model(folder, words, seed, shift=0.0):
    """Write a one-layer Llama whose rows say which token they are: row k is seed + the token's letter."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    content = {"model.norm.weight": torch.ones(WIDTH)}
    for name, shape in (("q_proj", (16, 16)), ("k_proj", (8, 16)), ("v_proj", (8, 16)), ("o_proj", (16, 16))):
        content[f"model.layers.0.self_attn.{name}.weight"] = torch.randn(shape, generator=generator)
    for name, shape in (("gate_proj", (24, 16)), ("up_proj", (24, 16)), ("down_proj", (16, 24))):
        content[f"model.layers.0.mlp.{name}.weight"] = torch.randn(shape, generator=generator)
    for name in ("input_layernorm", "post_attention_layernorm"):
        content[f"model.layers.0.{name}.weight"] = torch.ones(WIDTH)
    rows = [float(ord(word[0])) + shift for word in words]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        content[name] = torch.tensor(rows)[:, None].repeat(1, WIDTH)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**LLAMA, "num_hidden_layers": 1, "vocab_size": len(words), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture
def models(tmp_path):
    made = {name: model(tmp_path / name, words, seed) for seed, (name, words) in enumerate(WORDS.items())}
    made["moved"] = model(tmp_path / "moved", WORDS["more"], 3, shift=10.0)
    return {name: str(folder) for name, folder in made.items()}


def rows(found):
    """What each token's rows hold, by the table."""
    return {name: found[name][:, 0].tolist() for name in ("model.embed_tokens.weight", "lm_head.weight")}


def test_models_whose_tokenizers_differ_are_refused_with_the_way_out(models, tmp_path):
    lines = refused({"merge": "linear", "models": [models["base"], models["more"]]}, tmp_path / "out")
    assert any("its tokenizer is not that of" in line and "`tokenizer: base`, `union`" in line for line in lines)


@pytest.mark.parametrize("policy", ["base", "union", "more"])
def test_rows_are_matched_by_their_tokens(policy, models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step = {"merge": "linear", "models": [models["base"], models["more"], models["less"]]}
    out = tmp_path / "out"
    found = run({**step, "tokenizer": models[policy] if policy == "more" else policy}, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    vocabulary = tokenizer.get_vocab()
    words = {"base": WORDS["base"], "union": [*WORDS["base"], "e"], "more": WORDS["more"]}[policy]
    assert vocabulary == {word: index for index, word in enumerate(words)}
    for table in rows(found).values():
        assert table == pytest.approx([float(ord(word[0])) for word in words])  # all agree on each token
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(words)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded(torch.tensor([tokenizer.encode("a b c")])).logits.shape[-1] == len(words)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "della", "iso_c", "magmax"])
def test_a_token_that_a_source_lacks_keeps_the_rows_of_those_that_have_it(method, models, tmp_path):
    step = {"merge": method, "base": models["base"], "models": [models["moved"], models["less"]], "tokenizer": "union"}
    step |= {"scale": 1.0} if method in ("task_arithmetic", "magmax") else {}
    step |= {"density": 1.0} if method in ("ties", "dare_linear", "della") else {}
    found = run(step, tmp_path / "out")["model.embed_tokens.weight"][:, 0]
    # d: only the base and `moved` have it; e: only `moved` has it, so no task vector moves its row
    assert found[5].item() == pytest.approx(ord("e") + 10, abs=1e-3)
    if method in ("task_arithmetic", "ties", "dare_linear", "magmax"):
        assert found[4].item() == pytest.approx(ord("d") + 10, abs=1e-3)


def test_the_size_of_a_chunk_does_not_show(models, tmp_path, monkeypatch):
    from lfm.reuse.merge import _engine

    step = {"merge": "ties", "base": models["base"], "models": [models["moved"], models["less"]], "tokenizer": "union"}
    one = run(step, tmp_path / "one")
    monkeypatch.setattr(_engine, "CHUNK", 32)
    monkeypatch.setattr(_engine, "KEEP", 0)
    two = run(step, tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rules_for_single_tokens_and_padding(models, tmp_path):
    rules = {"source": "base", "tokens": {"a": {"source": models["moved"], "force": True}}, "pad_to_multiple_of": 8}
    found = run({"merge": "linear", "models": [models["base"], models["moved"]], "tokenizer": rules}, tmp_path / "out")
    table = found["model.embed_tokens.weight"][:, 0]
    assert len(table) == 8
    assert table[1].item() == ord("a") + 10


def test_rules_that_make_no_sense_are_told(models, tmp_path):
    step = {"merge": "linear", "models": [models["base"], models["more"]]}
    for policy, told in (
        ("unoin", "none of"),
        ({"source": "union", "toknes": {}}, "tokenizer.toknes"),
        ({"source": "union", "model": models["base"]}, "not both"),
    ):
        lines = refused({**step, "tokenizer": policy}, tmp_path / "out")
        assert any(told in line for line in lines), lines


def test_a_chat_template_is_written(models, tmp_path):
    step = {"merge": "linear", "models": [models["base"], models["base"]], "chat_template": "chatml"}
    run(step, tmp_path / "out")
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    (line,) = refused({**step, "chat_template": "chatmll"}, tmp_path / "out2")
    assert "chatmll" in line


def test_a_merge_of_one_tokenizer_copies_it_as_it_is(models, tmp_path):
    run({"merge": "linear", "models": [models["more"], models["moved"]]}, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()
    assert set(load(tmp_path / "out")) == set(load(tmp_path / "more"))
