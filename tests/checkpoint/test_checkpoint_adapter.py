"""LoRA adapters: what we add to the base is what PEFT merges, or we refuse by name; what we save PEFT loads."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lfm.checkpoint import Delta, Dense, LowRank, MemoryWeights, Patched, open_checkpoint, read_adapter, save_adapter
from lfm.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of what the tests do on purpose

ATTENTION = ["q_proj", "v_proj", "k_proj"]
SAVED_TABLE = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}


def llama(tied=False, width=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


MAKERS = {"llama": llama, "gpt2": gpt2, "tied": lambda: llama(tied=True)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny models, saved."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, folder in folders.items():
        MAKERS[name]().save_pretrained(folder)
    return folders


def train(base, folder, **options):
    """Save an adapter with random values, as if trained; return the PEFT model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(MAKERS[base](), LoraConfig(**{"r": 3, "lora_alpha": 5, **options})).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        model.save_pretrained(folder)
    return model


def merged(model):
    return model.merge_and_unload().state_dict()


def agrees(ours, theirs):
    for name in ours.specs:
        torch.testing.assert_close(ours.tensor(name), theirs[name], rtol=0, atol=1e-6)
    return True


def refusal(folder, base):
    with pytest.raises(RequestError) as caught:
        read_adapter(folder, open_checkpoint(base).weights)
    return str(caught.value)


FEATURES = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "every linear layer": ("llama", {"target_modules": "all-linear"}),
    "a pattern of modules": ("llama", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "excluded modules": ("llama", {"target_modules": ATTENTION, "exclude_modules": ["k_proj"]}),
    "ranks by module": ("llama", {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 5, r"layers\.1.*v_proj": 1}}),
    "alphas by module": (
        "llama",
        {"target_modules": ATTENTION, "alpha_pattern": {"0.self_attn.q_proj": 7, "^x": 1, "k_.*": 2}},
    ),
    "both patterns, rank-stabilised": (
        "llama",
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q.*": 9}, "use_rslora": True},
    ),
    "rank-stabilised": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "gaussian start": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "orthogonal start": ("llama", {"target_modules": ATTENTION, "r": 4, "init_lora_weights": "orthogonal"}),
    "token table": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "token table, rank-stabilised": ("llama", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "token table that is tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "output layer": ("llama", {"target_modules": ["lm_head"]}),
    "output layer saved": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "token table saved": ("llama", {**SAVED_TABLE}),
    "tied token table saved": ("tied", {**SAVED_TABLE, "ensure_weight_tying": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, flag forgotten": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D, square only": ("gpt2", {"target_modules": r".*attn\.c_proj"}),
    "Conv1D, all biases": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "Conv1D, LoRA's biases": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "Conv1D and token tables": ("gpt2", {"target_modules": ["c_attn", "wte", "wpe"]}),
    "Conv1D, norms saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
}  # fmt: skip


@pytest.mark.parametrize(("base", "options"), FEATURES.values(), ids=FEATURES)
def test_what_peft_merges_is_what_we_read(base, options, bases, tmp_path):
    model = train(base, tmp_path, **copy.deepcopy(options))  # PEFT writes into its config's lists
    opened = open_checkpoint(f"{bases[base]}+{tmp_path}")
    before = open_checkpoint(bases[base]).weights
    assert opened.weights.digest != before.digest
    assert opened.patches == (read_adapter(tmp_path, before).id,)
    assert agrees(opened, merged(model))


def test_the_flag_is_not_trusted_where_modules_of_both_layouts_are_changed(bases, tmp_path):
    # PEFT's flag ends up as the last module's: c_proj is square, so its layout must come from the base.
    model = train("gpt2", tmp_path, target_modules=["c_attn", "c_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    assert agrees(open_checkpoint(f"{bases['gpt2']}+{tmp_path}"), merged(model))


def test_adapters_stack(bases, tmp_path):
    train("llama", tmp_path / "one+", target_modules=["q_proj"])
    train("llama", tmp_path / "two", target_modules=["q_proj"], r=2)
    ours = open_checkpoint(f"{bases['llama']}+{tmp_path / 'one+'}+{tmp_path / 'two'}")
    model = PeftModel.from_pretrained(llama(), tmp_path / "one+").merge_and_unload()
    assert agrees(ours, merged(PeftModel.from_pretrained(model, tmp_path / "two")))
    assert len(ours.patches) == 2


def test_an_adapter_of_the_whole_model_goes_on_its_backbone(bases, tmp_path):
    model = train("llama", tmp_path, target_modules=ATTENTION)
    backbone = dict(llama().model.state_dict())
    patched = Patched(MemoryWeights(backbone), [read_adapter(tmp_path, MemoryWeights(backbone))])
    theirs = {name.removeprefix("model."): tensor for name, tensor in merged(model).items()}
    assert agrees(patched, theirs)


# --- what is refused

REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "target_parameters": {"target_parameters": ["up_proj.weight"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize(("name", "options"), REFUSED.items(), ids=REFUSED)
def test_features_that_are_more_than_a_sum_are_refused_by_name(name, options, bases, tmp_path):
    train("llama", tmp_path, target_modules=ATTENTION, **options)
    assert name in refusal(tmp_path, bases["llama"])


@pytest.fixture
def adapter(tmp_path):
    train("llama", tmp_path / "adapter", target_modules=ATTENTION)
    return tmp_path / "adapter"


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONFIGS = {
    "arrow_config": {"arrow_config": {"x": 1}},
    "a_feature_of_tomorrow": {"a_feature_of_tomorrow": True},
    "a IA3 adapter": {"peft_type": "IA3"},
    "a None adapter": {"peft_type": None},
    "lora_alpha must be": {"lora_alpha": "16"},
    "got None": {"lora_alpha": None},
    "alpha_pattern must map": {"alpha_pattern": {"(": 1}},
    "alpha_pattern must": {"alpha_pattern": ["q_proj"]},
}


@pytest.mark.parametrize(("message", "changes"), CONFIGS.items(), ids=CONFIGS)
def test_configs_we_cannot_honour_are_refused(message, changes, adapter, bases):
    configure(adapter, **changes)
    assert message in refusal(adapter, bases["llama"])


def test_all_that_cannot_be_honoured_is_named_at_once(adapter, bases):
    configure(adapter, use_dora=True, lora_bias=True)
    (adapter / "adapter_model.safetensors").unlink()
    message = refusal(adapter, bases["llama"])
    assert all(word in message for word in ("use_dora", "lora_bias", "is missing"))


def alter(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
DAMAGE = {
    "has no lora_B": lambda tensors: tensors.pop(f"{Q}B.weight"),
    "has no lora_A": lambda tensors: tensors.pop(f"{Q}A.weight"),
    "has no lora_embedding_B": lambda tensors: tensors.update({f"{Q}embedding_A": torch.ones(3, 16)}),
    "factors of": lambda tensors: tensors.update({f"{Q}A.weight": torch.ones(2, 16)}),
    "only matrices": lambda tensors: tensors.update({f"{Q}A.weight": torch.ones(3, 16, 1, 1)}),
    "[16, 0] and [0, 16]": lambda t: t.update({f"{Q}A.weight": torch.ones(0, 16), f"{Q}B.weight": torch.ones(16, 0)}),
    "does not fit": lambda tensors: tensors.update({f"{Q}A.weight": torch.ones(3, 17)}),
    "no tensor of that name": lambda tensors: tensors.update({"base_model.model.extra.weight": torch.ones(1)}),
    "lora_magnitude_vector": lambda tensors: tensors.update({f"{Q}magnitude_vector": torch.ones(16)}),
    "two parts of it change": lambda tensors: tensors.update({Q.replace("lora_", "weight"): torch.ones(16, 16)}),
}


@pytest.mark.parametrize(("message", "change"), DAMAGE.items(), ids=DAMAGE)
def test_damaged_adapters_are_refused(message, change, adapter, bases):
    alter(adapter, change)
    assert message in refusal(adapter, bases["llama"])


def test_an_adapter_of_another_base_is_refused(adapter, bases, tmp_path):
    assert "no tensor of that name" in refusal(adapter, bases["gpt2"])
    llama(width=32).save_pretrained(tmp_path / "wide")
    assert "does not fit" in refusal(adapter, tmp_path / "wide")


def test_a_copy_of_another_token_table_tells_the_wrong_base(bases, tmp_path):
    train("llama", tmp_path, target_modules=["embed_tokens"])
    alter(tmp_path, lambda tensors: tensors["base_model.model.model.embed_tokens.base_layer.weight"].add_(1))
    assert "was trained on another 'model.embed_tokens.weight'" in refusal(tmp_path, bases["llama"])


def test_a_saved_token_table_that_would_be_untied_is_refused(bases, tmp_path):
    train("tied", tmp_path, **SAVED_TABLE)
    assert "ensure_weight_tying" in refusal(tmp_path, bases["tied"])


def test_an_output_layer_that_a_tied_base_does_not_have_is_refused(bases, tmp_path):
    train("tied", tmp_path, target_modules=ATTENTION, modules_to_save=["lm_head"])
    assert "'lm_head.weight'" in refusal(tmp_path, bases["tied"])


def test_what_is_no_adapter_is_refused(adapter, bases, tmp_path):
    assert "not an adapter" in refusal(bases["gpt2"], bases["llama"])
    assert "not an adapter" in refusal(tmp_path / "absent", bases["llama"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickled adapters are not read" in refusal(adapter, bases["llama"])
    (adapter / "adapter_config.json").write_text("[]")
    assert "JSON object" in refusal(adapter, bases["llama"])
    adapter.rename(tmp_path / "adapter.partial")
    assert "unfinished" in refusal(tmp_path / "adapter.partial", bases["llama"])


# --- saving


def low_rank(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, rank, generator=generator) * 0.1, torch.randn(rank, columns, generator=generator))


SAVED = {
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": low_rank(16, 16, 2, 0),
        "model.layers.1.mlp.down_proj.weight": low_rank(16, 24, 5, 1),
        "lm_head.weight": low_rank(32, 16, 1, 2),
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": low_rank(16, 48, 2, 3),
        "transformer.h.1.attn.c_proj.weight": low_rank(16, 16, 2, 4),
        "transformer.h.1.mlp.c_fc.weight": low_rank(16, 64, 3, 5),
    },
}


@pytest.mark.parametrize("base", SAVED)
def test_a_saved_adapter_gives_the_patched_model_in_peft_and_here(base, bases, tmp_path):
    weights = open_checkpoint(bases[base]).weights
    patched = Patched(weights, [Delta(SAVED[base])])
    save_adapter(Delta(SAVED[base]), tmp_path / "a", base_ref=str(bases[base]), transposed=base == "gpt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = PeftModel.from_pretrained(MAKERS[base](), tmp_path / "a").eval()
    ours = MAKERS[base]()
    ours.load_state_dict({name: patched.tensor(name) for name in patched.specs}, strict=False)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(theirs(tokens).logits, ours.eval()(tokens).logits, rtol=0, atol=1e-5)
    assert agrees(open_checkpoint(f"{bases[base]}+{tmp_path / 'a'}"), merged(theirs))


def test_ranks_of_modules_whose_names_end_alike_are_kept_apart(tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = torch.nn.Linear(4, 4), Inner()

        def forward(self, x):
            return self.other.layer(self.layer(x))

    model = Outer()
    made = Delta({"layer.weight": low_rank(4, 4, 1, 0), "other.layer.weight": low_rank(4, 4, 3, 1)})
    patched = Patched(MemoryWeights(copy.deepcopy(model.state_dict())), [made])
    save_adapter(made, tmp_path / "a", base_ref="x", task_type=None)
    assert agrees(patched, merged(PeftModel.from_pretrained(model, tmp_path / "a")))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"w.weight": Dense(torch.ones(2, 2))},
        {"w.bias": low_rank(2, 2, 1, 0)},
        {"model.embed_tokens.weight": low_rank(32, 16, 1, 0)},
        {"transformer.wpe.weight": low_rank(16, 16, 1, 0)},
    ],
)
def test_changes_that_no_adapter_holds_are_not_saved(changes, tmp_path):
    with pytest.raises(RequestError, match="LoRA"):
        save_adapter(Delta(changes), tmp_path / "a", base_ref="x")
    assert list(tmp_path.iterdir()) == []
