"""Tiny random models of many kinds go through `load_model` and `save_model`, and transformers agrees with us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.nets import resnet20
from torch import nn

from lfm.checkpoint import OutputFolder, open_checkpoint
from lfm.data import Rows
from lfm.errors import AccessError, LfmError, RequestError
from lfm.method import Access
from lfm.models.encode import inputs_of
from lfm.models.handle import Model
from lfm.models.local import byte_tokenizer, load_model, save_model
from lfm.models.ref import ImageSpec, ModelRef
from lfm.models.text import Completion

LLAMA = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
}
BERT = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
KINDS = {
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama-untied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=260, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=256, eos_token_id=256
        )
    ),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=3)),
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT, num_labels=4)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True)),
}


def new(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[kind]().to(dtype).eval()


def saved(kind, folder, dtype=torch.float32, **options):
    module = new(kind, dtype)
    module.save_pretrained(folder, **options)
    if kind not in ("vit",):
        byte_tokenizer().save_pretrained(folder)
    return folder


def load(ref, **options):
    return load_model(ModelRef.model_validate(ref), **options)


def written(model, out, dtype=None):
    with OutputFolder(out, key="test") as folder:
        save_model(model, folder, dtype)
        folder.write_json("lineage.json", {})
        folder.commit()
    return out


def batch_for(module):
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, tf.ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(0, 256, (2, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def transformers_logits(folder, cls, **options):
    module, report = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(report.values()), report
    with torch.no_grad():
        return module.eval()(**batch_for(module)).logits


def same_after_saving(model, cls, tmp_path):
    batch = batch_for(model.module)
    ours = model.logits(batch)
    out = written(model, tmp_path / "out")
    assert torch.equal(transformers_logits(out, cls), ours)
    assert torch.equal(load(out).logits(batch), ours)
    return out


# --- models of transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_what_transformers_computes_before_and_after_it_is_saved(tmp_path, kind):
    folder = saved(kind, tmp_path / "in")
    model = load(folder)
    assert torch.equal(model.logits(batch_for(model.module)), transformers_logits(folder, type(new(kind))))
    out = same_after_saving(model, type(new(kind)), tmp_path)
    assert open_checkpoint(out).digest == open_checkpoint(folder).digest


def test_tied_weights_are_stored_once(tmp_path):
    out = written(load(saved("llama-tied", tmp_path / "in")), tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert [name for name in names if "lm_head" in name or "embed" in name] == ["model.embed_tokens.weight"]
    module = tf.AutoModelForCausalLM.from_pretrained(out)
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_experts_that_are_fused_in_memory_are_apart_on_disk(tmp_path):
    out = written(load(saved("mixtral", tmp_path / "in")), tmp_path / "out")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in open_checkpoint(out).specs


def test_bfloat16_is_computed_in_float32_and_saved_as_it_was(tmp_path):
    folder = saved("llama-tied", tmp_path / "in", torch.bfloat16)
    model = load(folder)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    out = written(model, tmp_path / "out", torch.bfloat16)
    assert open_checkpoint(out).digest == open_checkpoint(folder).digest
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    wide = written(load(folder), tmp_path / "wide")
    assert {spec.dtype for spec in open_checkpoint(wide).specs.values()} == {"F32"}
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"


def test_shards_are_read_as_one_model(tmp_path):
    folder = saved("llama-untied", tmp_path / "in", max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    same_after_saving(load(folder), tf.LlamaForCausalLM, tmp_path)


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    config = tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        RequestError, match=r"is an encoder-decoder \(T5ForConditionalGeneration\), which can be merged"
    ):
        load(tmp_path)
    with pytest.raises(RequestError, match="is an encoder-decoder"):
        load({"ref": str(tmp_path), "task": "causal-lm"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's use of transformers
def test_base_plus_adapter_computes_what_peft_computes(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved("llama-tied", tmp_path / "base")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        tuned = peft.get_peft_model(new("llama-tied"), config).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    batch = batch_for(tuned)
    with torch.no_grad():
        expected = tuned(**batch).logits
    model = load(f"{base}+{tmp_path / 'adapter'}")
    torch.testing.assert_close(model.logits(batch), expected)
    assert model.encoder.tokenizer is not None
    out = written(model, tmp_path / "out")
    torch.testing.assert_close(transformers_logits(out, tf.LlamaForCausalLM), expected)


def test_pickle_is_read_only_when_it_is_allowed(tmp_path):
    folder = saved("llama-untied", tmp_path / "in")
    expected = transformers_logits(folder, tf.LlamaForCausalLM)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="pickle"):
        load(folder)
    model = load(folder, allow_pickle=True)
    assert torch.equal(model.logits(batch_for(model.module)), expected)


def test_a_new_model_is_drawn_from_the_seed_and_from_nothing_else(tmp_path):
    config = {"model_type": "llama", **LLAMA, "architectures": ["LlamaForCausalLM"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    before = torch.random.get_rng_state()
    one = load({"config": config, "tokenizer": "bytes"}, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    same, other = load({"config": str(path)}, seed=1), load({"config": str(path)}, seed=2)
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(tensor, same.module.state_dict()[name])
    assert not torch.equal(one.module.lm_head.weight, other.module.lm_head.weight)
    out = same_after_saving(one, tf.LlamaForCausalLM, tmp_path)
    assert tf.AutoTokenizer.from_pretrained(out)("hi")["input_ids"] == one.encoder.tokenizer("hi")["input_ids"]


def test_a_language_model_becomes_a_classifier_with_the_classes_it_is_given(tmp_path):
    folder = saved("llama-tied", tmp_path / "in")
    classes = {"bad": 0, "good": 1, "odd": 2}
    model = load(folder, task="text-classification", classes=classes, seed=1)
    assert model.encoder.classes == classes
    body = transformers_body(folder)
    for name, tensor in model.module.model.state_dict().items():
        assert torch.equal(tensor, body[name]), name
    out = same_after_saving(model, tf.LlamaForSequenceClassification, tmp_path)
    again = load(out)
    assert again.task == "text-classification"
    assert again.encoder.classes == classes
    assert again.module.config.id2label == {0: "bad", 1: "good", 2: "odd"}


def transformers_body(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder).model.state_dict()


def test_the_classes_of_a_classifier_stay_unless_it_gets_a_new_head(tmp_path):
    folder = saved("bert", tmp_path / "in")
    kept = load(folder, classes={"a": 0, "b": 1})
    assert kept.encoder.classes == {"0": 0, "1": 1, "2": 2}
    renewed = load(folder, classes={"a": 0, "b": 1}, new_head=True, seed=3)
    assert renewed.encoder.classes == {"a": 0, "b": 1}
    assert renewed.module.classifier.weight.shape == (2, 16)
    assert torch.equal(renewed.module.bert.pooler.dense.weight, kept.module.bert.pooler.dense.weight)


def test_a_new_head_is_new_also_where_the_old_one_has_its_shape(tmp_path):
    folder = saved("bert", tmp_path / "in")
    classes = {"a": 0, "b": 1, "c": 2}
    old, one, same = load(folder), *(load(folder, classes=classes, new_head=True, seed=1) for _ in range(2))
    assert not torch.equal(old.module.classifier.weight, one.module.classifier.weight)
    assert torch.equal(same.module.classifier.weight, one.module.classifier.weight)
    assert one.encoder.classes == classes


@pytest.mark.parametrize("kind", ["llama-untied", "gpt2", "bert", "vit"])
def test_weights_that_are_not_there_are_never_made_up(tmp_path, kind):
    folder = saved(kind, tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if ("layer" in name or ".h." in name) and name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, folder / "model.safetensors")
    for options in ({}, {"classes": {"a": 0}, "new_head": True} if kind in ("bert", "vit") else {}):
        with pytest.raises(RequestError, match=r"its weights lack \S+\.weight,"):
            load(folder, **options)
    if kind == "llama-untied":
        with pytest.raises(RequestError, match="its weights lack"):
            load(folder, task="text-classification", classes={"a": 0, "b": 1})


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = saved("llama-untied", tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(RequestError):
        load(folder)
    with pytest.raises(RequestError, match="its weights lack"):
        load(folder, new_head=True)


# --- configs and tokenizers -----------------------------------------------------------------------------------------


def test_a_misspelt_model_type_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match="no model_type 'lama'; did you mean 'llama'"):
        load({"config": {"model_type": "lama"}})
    with pytest.raises(RequestError, match="names no model_type"):
        load({"config": {"hidden_size": 3}})


def test_a_config_that_does_not_say_what_it_is_for_needs_a_task(tmp_path):
    folder = saved("llama-tied", tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"does not say what it is for .*give it a task: causal-lm"):
        load(folder)
    assert load({"ref": str(folder), "task": "causal-lm"}).task == "causal-lm"


def test_weights_without_a_config_ask_for_their_code(tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=r"no config\.json; if it is a plain torch module"):
        load(tmp_path)


def test_a_model_without_a_tokenizer_has_none_until_one_is_named(tmp_path):
    folder = tmp_path / "in"
    new("llama-tied").save_pretrained(folder)
    assert load(folder).encoder.tokenizer is None
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    named = load({"ref": str(folder), "tokenizer": str(tmp_path / "tokenizer")})
    assert named.encoder.tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    with pytest.raises(RequestError, match="this model does not write text"):
        load(folder).complete(["a"])


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', "[]"])
def test_a_corrupted_tokenizer_is_refused(tmp_path, content):
    folder = saved("llama-tied", tmp_path / "in")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(RequestError, match="its tokenizer cannot be loaded"):
        load(folder)


def test_the_chat_template_goes_along(tmp_path):
    folder = saved("llama-tied", tmp_path / "in")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    out = written(load(folder), tmp_path / "out")
    assert tf.AutoTokenizer.from_pretrained(out).chat_template == template
    assert (out / "generation_config.json").is_file()


def test_the_byte_tokenizer_brings_back_any_text(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reloaded = tf.AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "plain",
        "  two  spaces\n\ttab \r\n",
        "Füße — ŝ ∀x∈ℝ",
        "日本語 🙂👩‍👩‍👧",
        "\x00\x7f\u200b\ufeff",
        "é e\u0301",
        " ",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert reloaded(text)["input_ids"] == ids
        assert reloaded.decode(ids) == text
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256


def test_the_image_format_is_saved_as_transformers_reads_it(tmp_path):
    folder = saved("vit", tmp_path / "in")
    spec = ImageSpec(size=8, channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    out = written(load({"ref": str(folder), "image": spec}), tmp_path / "out")
    assert load(out).encoder.image == spec
    pytest.importorskip("PIL")
    from PIL import Image

    from lfm.data import Rows

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
    ours = load(out).encoder.encode(Rows({"image": pixels, "label": ["0"]}, "images"), 8).batch([0])
    processor = tf.AutoImageProcessor.from_pretrained(out)
    theirs = processor(Image.fromarray(pixels[0]), return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])


def test_images_that_are_not_to_be_normalised_are_not(tmp_path):
    folder = saved("vit", tmp_path / "in")
    content = {"size": {"shortest_edge": 8}, "do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    assert load(folder).encoder.image == ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)


def test_broken_weights_are_not_saved(tmp_path):
    model = load(saved("llama-tied", tmp_path / "in"))
    with torch.no_grad():
        model.module.model.norm.weight[3] = torch.nan
    with pytest.raises(LfmError, match=r"'model.norm.weight' holds NaN or Inf"):
        written(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- plain modules --------------------------------------------------------------------------------------------------

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.config = {"not": "transformers'"}
        self.body = nn.Linear(12, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.body(x.flatten(1)))))

def build(classes=3):
    return Net(classes)

def number():
    return 3
"""


@pytest.fixture
def plain(tmp_path):
    code = tmp_path / "net.py"
    code.write_text(CODE)
    return {"module": f"{code}:build", "image": {"size": 2, "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}}


def test_a_plain_module_is_built_by_the_code_named_and_comes_back_from_its_file(tmp_path, plain):
    model = load({**plain, "arguments": {"classes": 4}}, seed=2)
    assert model.encoder.classes == {"0": 0, "1": 1, "2": 2, "3": 3}
    x = {"pixel_values": torch.ones(2, 3, 2, 2)}
    expected = model.logits(x)
    out = written(model, tmp_path / "out")
    assert not (out / "config.json").exists()
    again = load({**plain, "ref": str(out)})  # built with 3 classes: the weights say 4
    assert torch.equal(again.logits(x), expected)


def test_class_names_of_a_plain_module_are_kept(tmp_path, plain):
    model = load(plain, classes={"5": 0, "7": 1}, new_head=True)
    out = written(model, tmp_path / "out")
    again = load({**plain, "ref": str(out)})
    assert again.encoder.classes == {"5": 0, "7": 1}
    twice = written(again, tmp_path / "twice")
    assert open_checkpoint(twice).digest == open_checkpoint(out).digest
    assert (twice / "config.json").read_text() == (out / "config.json").read_text()


def test_everything_that_does_not_fit_a_plain_module_is_listed(tmp_path):
    module = resnet20()
    tensors = module.state_dict()
    tensors["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    del tensors["layer1.0.bn1.running_mean"], tensors["layer3.2.conv2.weight"]
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    net = Path(__file__).parents[1] / "nets.py"
    with pytest.raises(RequestError) as caught:
        load({"ref": str(tmp_path), "module": f"{net}:resnet20"})
    problems = caught.value.problems
    assert "does not fit the module" in problems[0]
    assert set(problems[1:]) == {
        "the weights lack 'layer1.0.bn1.running_mean'",
        "the weights lack 'layer3.2.conv2.weight'",
        "the module has no 'extra'",
        "'conv1.weight' is [16, 1, 3, 3] in the weights and [16, 3, 3, 3] in the module",
    }
    save_file({"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=r"and \d+ more"):
        load({"ref": str(tmp_path), "module": f"{net}:resnet20"})


def test_batch_norms_without_a_count_of_batches_are_loaded_and_saved_without_one(tmp_path):
    tensors = {name: t for name, t in resnet20().state_dict().items() if not name.endswith("num_batches_tracked")}
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    code = f"{Path(__file__).parents[1] / 'nets.py'}:resnet20"
    model = load({"ref": str(folder), "module": code})
    out = written(model, tmp_path / "out")
    assert open_checkpoint(out).digest == open_checkpoint(folder).digest
    model.module.train()
    model.module(torch.ones(2, 3, 8, 8))
    assert not torch.equal(model.module.bn1.running_mean, tensors["bn1.running_mean"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean has 2 values; give 1 or 3"),
        ({"std": (0.1,) * 4}, "std has 4 values; give 1 or 3"),
        ({"std": (0.1, 0.0, 0.1)}, "std must be above 0"),
    ],
)
def test_an_image_format_has_one_value_for_each_channel(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageSpec(size=8, channels=3, **wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "build"}, "write `path/file.py:function`"),
        ({"module": "no/such.py:build"}, "no such file"),
        ({"module": "no_such_package.code:build"}, "No module named 'no_such_package'"),
        ({"module": "{code}:biuld"}, "has no 'biuld'; did you mean 'build'"),
        ({"module": "{code}:number"}, "returned int, not a torch module"),
        ({"arguments": {"clases": 3}}, "unexpected keyword argument 'clases'"),
    ],
)
def test_what_is_wrong_with_the_code_is_said(tmp_path, plain, change, message):
    code = plain["module"].rpartition(":")[0]
    change = {key: value.format(code=code) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(RequestError, match=message):
        load({**plain, **change})


# --- access ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(saved("llama-tied", tmp_path_factory.mktemp("tiny") / "in"))


def test_each_level_gives_what_it_says_and_no_more(tiny):
    batch = batch_for(tiny.module)
    asked = {
        "labels": (Access.LABELS, lambda model: model.labels(batch)),
        "complete": (Access.LABELS, lambda model: model.complete(["ab"], max_new_tokens=2)),
        "probs": (Access.PROBS, lambda model: model.probs(batch)),
        "log_probs": (Access.PROBS, lambda model: model.log_probs(batch)),
        "logits": (Access.LOGITS, lambda model: model.logits(batch)),
        "module": (Access.WEIGHTS, lambda model: model.module),
    }
    for access in Access:
        model = tiny.restrict(access)
        for name, (needed, ask) in asked.items():
            if access >= needed:
                assert ask(model) is not None, name
            else:
                with pytest.raises(AccessError, match=f"this handle offers {access.name.lower()}"):
                    ask(model)


def test_all_levels_tell_the_same_story(tiny):
    batch = batch_for(tiny.module)
    logits = tiny.logits(batch)
    torch.testing.assert_close(tiny.probs(batch), logits.softmax(-1))
    torch.testing.assert_close(tiny.log_probs(batch), logits.log_softmax(-1))
    assert torch.equal(tiny.labels(batch), logits.argmax(-1))
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert not logits.is_inference()


def test_a_restricted_handle_cannot_be_widened(tiny):
    model = tiny.restrict(Access.PROBS)
    assert model.restrict(Access.WEIGHTS).access == Access.PROBS
    with pytest.raises(AttributeError):
        model.access = Access.WEIGHTS


def test_nothing_public_on_a_restricted_handle_reaches_the_module(tiny):
    model = tiny.restrict(Access.PROBS)
    seen, queue = set(), [model]
    while queue:
        value = queue.pop()
        if id(value) in seen or isinstance(value, (str, int, float, bytes, type(None), type)):
            continue
        seen.add(id(value))
        assert not isinstance(value, (nn.Module, nn.Parameter))
        if isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple, set)):
            queue += value
        elif type(value).__module__.startswith("lfm."):
            for name in dir(value):
                if name.startswith("_"):
                    continue
                try:
                    queue.append(getattr(value, name))
                except AccessError:
                    assert name == "module"
    assert not hasattr(model, "__dict__")


def test_a_handle_cannot_offer_more_than_what_is_behind_it(tiny):
    class Endpoint:
        offers = Access.PROBS

        def logits(self, batch):
            return tiny.logits(batch)

        def labels(self, batch):
            return tiny.labels(batch)

        def write(self, prompts, how, tell):
            return [Completion("") for _ in prompts]

    with pytest.raises(AccessError, match="offers probs, cannot be opened as weights"):
        Model(Endpoint(), Access.WEIGHTS, "causal-lm", tiny.encoder, "endpoint")
    model = Model(Endpoint(), Access.PROBS, "causal-lm", tiny.encoder, "endpoint")
    assert model.probs(batch_for(tiny.module)).shape == (2, 9, 260)
    assert repr(model) == "Model('endpoint', causal-lm, access=probs)"


def test_text_is_completed_greedily_and_without_the_prompt(tiny):
    prompts = ["ab", "The quick"]
    expected = []
    for prompt in prompts:
        ids = tiny.encoder.tokenizer(prompt)["input_ids"]
        made = list(ids)
        for _ in range(5):
            batch = {"input_ids": torch.tensor([made]), "attention_mask": torch.ones(1, len(made)).long()}
            made.append(int(tiny.logits(batch)[0, -1].argmax()))
        expected.append(tiny.encoder.tokenizer.decode(made[len(ids) :], skip_special_tokens=True))
    assert tiny.restrict(Access.LABELS).complete(prompts, max_new_tokens=5) == expected
    with pytest.raises(RequestError, match="an empty prompt"):
        tiny.complete([""])


def test_labels_are_not_shown_to_the_model():
    batch = {"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1)}
    assert inputs_of(batch).keys() == {"input_ids"}


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    folder = saved("llama-tied", tmp_path / "in")
    with pytest.raises(RequestError, match="cannot be moved to cuda"):
        load(folder, device="cuda")


# --- what a checkpoint may bring, and may not -----------------------------------------------------------------------


def changed(folder, file="config.json", **settings):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | settings))
    return folder


def plain_llama(folder, **settings):
    config = tf.LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=256,
        **settings,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_code_that_a_checkpoint_brings_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    own = {"auto_map": {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"}}
    folder = changed(plain_llama(tmp_path), **own, architectures=["CodeForImageClassification"])
    with pytest.raises(RequestError, match="brings code of its own, which is not run"):
        load(folder)
    changed(folder, model_type="code")
    with pytest.raises(RequestError, match=r"no model_type 'code'.*brings code of its own, which is not run"):
        load(folder)
    changed(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert load(folder).task == "causal-lm"
    changed(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}, tokenizer_class="Code")
    with pytest.raises(RequestError, match="its tokenizer cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hidden_size": "wide"}, "expected int, got str"), ({"num_attention_heads": 3}, "not a multiple")],
)
def test_a_config_that_transformers_refuses_is_refused_with_its_reason(tmp_path, settings, message):
    with pytest.raises(RequestError, match=rf"its config is not valid: .*{message}"):
        load(changed(plain_llama(tmp_path), **settings))


def test_weights_are_computed_in_float32_whatever_the_config_says(tmp_path):
    folder = plain_llama(tmp_path)
    exact = {name: tensor.clone() for name, tensor in load(folder).module.state_dict().items()}
    found = load(changed(folder, dtype="bfloat16")).module.state_dict()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in found.items())


def test_weights_without_a_place_are_told(tmp_path, caplog):
    folder = plain_llama(tmp_path)
    changed(folder, num_hidden_layers=1)
    load(folder)
    assert "weights without a place in the model: model.layers.1.input_layernorm.weight" in caplog.text
    assert "and 1 more" in caplog.text


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = load(plain_llama(tmp_path / "model"))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with OutputFolder(tmp_path / "out", key="") as folder:
        save_model(model, folder, torch.bfloat16)
        folder.commit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved.lm_head.weight, before["lm_head.weight"].bfloat16())


def test_how_a_model_generates_is_kept_also_under_an_adapter(tmp_path):
    folder = plain_llama(tmp_path / "model")
    changed(folder, "generation_config.json", eos_token_id=[256, 10], temperature=0.5, do_sample=True)
    weights = {"q_proj": torch.zeros(2, 16), "o": torch.zeros(16, 2)}
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    (tmp_path / "adapter").mkdir()
    adapter = {f"{prefix}A.weight": weights["q_proj"], f"{prefix}B.weight": weights["o"]}
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    for name, ref in (("alone", str(folder)), ("under", f"{folder}+{tmp_path / 'adapter'}")):
        with OutputFolder(tmp_path / name, key="") as out:
            save_model(load(ref), out, None)
            out.commit()
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert (kept["eos_token_id"], kept["temperature"], kept["do_sample"]) == ([256, 10], 0.5, True)


def test_half_of_an_encoder_decoder_is_not_taken_for_a_language_model(tmp_path):
    config = tf.BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=1,
    )
    tf.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="is an encoder-decoder"):
        load({"ref": str(tmp_path), "task": "causal-lm"})


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(RequestError, match="its tokenizer has 257 tokens, and its vocab_size is 100"):
        load({"config": config | small, "tokenizer": "bytes"})


def test_positions_that_begin_behind_padding_count_less(tmp_path):
    config = tf.RobertaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=34,
    )
    tf.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    encoder = load(tmp_path).encoder
    rows = Rows({"text": ["a" * 40], "label": [0]}, "rows")
    assert encoder.encode(rows, 32).batch([0])["input_ids"].shape == (1, 32)
    with pytest.raises(RequestError, match="the model takes 32"):
        encoder.encode(rows, 34)


def test_code_that_fails_is_told_in_one_line_and_code_that_looks_itself_up_works(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Settings:\n"
        "    width: int = 3\n"
        "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(Settings().width, 2))\n"
        "def broken(): return 1 / 0\n"
    )
    image = {"size": 1, "channels": 3}
    assert load({"module": f"{file}:net", "image": image}).module[1].in_features == 3
    with pytest.raises(RequestError, match=r"net\.py:broken: ZeroDivisionError: division by zero"):
        load({"module": f"{file}:broken", "image": image})
    file.write_text("def net(:")
    with pytest.raises(RequestError, match=r"net\.py: SyntaxError"):
        load({"module": f"{file}:net", "image": image})
