"""The anatomy of random tiny models, name by name, and that zeroing the ways out leaves nothing of a block."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.nets import resnet, resnet20, resnet56
from torch import nn

from lfm.errors import RequestError
from lfm.models.anatomy import Anatomy, Part, anatomy

ASSETS = Path(os.environ.get("LFM_ASSETS", Path(__file__).parents[2] / ".." / "shared" / "assets"))

TEXT = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {**TEXT, **SPECIAL, "intermediate_size": 48}
GROUPED = {**BASE, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
CLIP_VISION = {**VISION, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
OPT = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DISTIL = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
CLIP = {
    "text_config": {**BASE},
    "vision_config": CLIP_VISION,
    "projection_dim": 24,
}
QWEN_MOE = {
    **GROUPED,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "decoder_sparse_step": 2,
}
OLD_GATED = {**T5, "feed_forward_proj": "gated-gelu"}


def build(model: str, **config: object) -> nn.Module:
    """A random model by the name of its class; its config's class follows from it."""
    kind = getattr(tf, model)
    torch.manual_seed(0)
    return kind(kind.config_class(**config)).eval()


@dataclass(frozen=True)
class Expected:
    """What one architecture must give; block names are relative to the block."""

    model: str
    config: dict
    stack: str
    head: str | None
    embeddings: tuple[str, ...]
    final_norms: tuple[str, ...]
    attention: str = ""  # "in in > out"
    mlp: str = ""
    cross: str = ""
    experts: str = ""
    others: str = ""
    norms: str = ""
    tied: bool = False
    first: int = 0  # the block that is compared
    count: int = 2
    also: dict = field(default_factory=dict)


QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj > self_attn.o_proj"
OUT_PROJ = "self_attn.q_proj self_attn.k_proj self_attn.v_proj > self_attn.out_proj"
GATED = "mlp.gate_proj mlp.up_proj > mlp.down_proj"
LLAMA_NORMS = "input_layernorm post_attention_layernorm"
QK_NORMS = "input_layernorm self_attn.q_norm self_attn.k_norm post_attention_layernorm"
GEMMA_NORMS = "post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
BERT_ATTENTION = "attention.self.query attention.self.key attention.self.value > attention.output.dense"
BERT_MLP = "intermediate.dense > output.dense"
BERT_NORMS = "attention.output.LayerNorm output.LayerNorm"
BERT_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
LLAMA = {
    "stack": "model.layers",
    "head": "lm_head",
    "embeddings": ("model.embed_tokens",),
    "final_norms": ("model.norm",),
    "attention": QKVO,
    "mlp": GATED,
    "norms": LLAMA_NORMS,
}
BERT = {
    "stack": "bert.encoder.layer",
    "embeddings": tuple(f"bert.embeddings.{name}" for name in BERT_TABLES),
    "final_norms": (),
    "attention": BERT_ATTENTION,
    "mlp": BERT_MLP,
    "norms": BERT_NORMS,
}
ROBERTA = {
    **BERT,
    "stack": "roberta.encoder.layer",
    "embeddings": tuple(f"roberta.embeddings.{BERT_TABLES[i]}" for i in (0, 2, 1)),
}
T5_BLOCK = "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v > layer.0.SelfAttention.o"
BART_MODEL = {
    "head": "lm_head",
    "tied": True,
    "embeddings": ("model.shared", "model.encoder.embed_positions", "model.decoder.embed_positions"),
    "final_norms": (),
    "attention": OUT_PROJ,
    "mlp": "fc1 > fc2",
    "count": 4,
}
T5_MODEL = {
    "head": "lm_head",
    "embeddings": ("shared",),
    "final_norms": ("encoder.final_layer_norm", "decoder.final_layer_norm"),
    "attention": T5_BLOCK,
    "tied": True,
    "count": 4,
}
CLIP_MODEL = {
    "head": None,
    "embeddings": (
        "text_model.embeddings.token_embedding",
        "text_model.embeddings.position_embedding",
        "vision_model.embeddings.position_embedding",
        "vision_model.embeddings.patch_embedding",
    ),
    "final_norms": ("vision_model.post_layernorm", "text_model.final_layer_norm"),
    "attention": OUT_PROJ,
    "mlp": "mlp.fc1 > mlp.fc2",
    "norms": "layer_norm1 layer_norm2",
    "count": 5,
}

MODELS = [
    Expected(
        "GPT2LMHeadModel",
        GPT2,
        "transformer.h",
        "lm_head",
        ("transformer.wte", "transformer.wpe"),
        ("transformer.ln_f",),
        attention="attn.c_attn > attn.c_proj",
        mlp="mlp.c_fc > mlp.c_proj",
        norms="ln_1 ln_2",
        tied=True,
    ),
    Expected("LlamaForCausalLM", {**GROUPED, "head_dim": 16}, **LLAMA),
    Expected("LlamaForSequenceClassification", GROUPED, **{**LLAMA, "head": "score"}),
    Expected("LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 1, "intermediate_size": 32}, count=1, **LLAMA),
    Expected("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}, tied=True, **LLAMA),
    Expected("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, **{**LLAMA, "norms": QK_NORMS}),
    Expected("MistralForCausalLM", GROUPED, **LLAMA),
    Expected(
        "Gemma2ForCausalLM",
        {**GROUPED, "head_dim": 16},
        tied=True,
        **{**LLAMA, "norms": f"input_layernorm {GEMMA_NORMS}"},
    ),
    Expected(
        "Gemma3ForCausalLM",
        {**GROUPED, "head_dim": 16},
        tied=True,
        **{**LLAMA, "norms": f"input_layernorm self_attn.q_norm self_attn.k_norm {GEMMA_NORMS}"},
    ),
    Expected(
        "Phi3ForCausalLM",  # with half as many keys and values as queries, q k v fused are as wide as gate and up
        GROUPED,
        **{
            **LLAMA,
            "attention": "self_attn.qkv_proj > self_attn.o_proj",
            "mlp": "mlp.gate_up_proj > mlp.down_proj",
        },
    ),
    Expected(
        "GPTNeoXForCausalLM",
        BASE,
        "gpt_neox.layers",
        "lm_head",
        ("gpt_neox.embed_in",),
        ("gpt_neox.final_layer_norm",),
        attention="attention.query_key_value > attention.dense",
        mlp="mlp.dense_h_to_4h > mlp.dense_4h_to_h",
        norms="input_layernorm post_attention_layernorm",
    ),
    Expected(
        "OPTForCausalLM",
        {**OPT, "word_embed_proj_dim": 16},
        "model.decoder.layers",
        "lm_head",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        ("model.decoder.final_layer_norm",),
        attention=OUT_PROJ,
        mlp="fc1 > fc2",
        norms="self_attn_layer_norm final_layer_norm",
        tied=True,
        also={"model.decoder.project_in": 0.0, "model.decoder.project_out": 1.0},
    ),
    Expected(
        "PhiForCausalLM",
        BASE,
        "model.layers",
        "lm_head",
        ("model.embed_tokens",),
        ("model.final_layernorm",),
        attention="self_attn.q_proj self_attn.k_proj self_attn.v_proj > self_attn.dense",
        mlp="mlp.fc1 > mlp.fc2",
        norms="input_layernorm",
    ),
    Expected(
        "T5ForConditionalGeneration",
        OLD_GATED,
        "encoder.block",
        mlp="layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wi_1 > layer.1.DenseReluDense.wo",
        norms="layer.0.layer_norm layer.1.layer_norm",
        also={"encoder.final_layer_norm": 0.4, "decoder.embed_tokens": 0.0},
        **T5_MODEL,
    ),
    Expected(
        "T5ForConditionalGeneration",
        T5,
        "decoder.block",
        cross=T5_BLOCK.replace("0.SelfAttention", "1.EncDecAttention"),
        mlp="layer.2.DenseReluDense.wi > layer.2.DenseReluDense.wo",
        norms="layer.0.layer_norm layer.1.layer_norm layer.2.layer_norm",
        first=2,
        **T5_MODEL,
    ),
    Expected(
        "BartForConditionalGeneration",
        BART,
        "model.decoder.layers",
        cross=OUT_PROJ.replace("self_attn", "encoder_attn"),
        norms="self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
        first=2,
        also={"model.decoder.layernorm_embedding": 0.0},
        **BART_MODEL,
    ),
    Expected("BertForMaskedLM", BASE, head="cls.predictions.decoder", tied=True, **BERT),
    Expected("BertForSequenceClassification", BASE, head="classifier", **BERT),
    Expected("RobertaForMaskedLM", BASE, head="lm_head.decoder", tied=True, **ROBERTA),
    Expected("RobertaForSequenceClassification", BASE, head="classifier.out_proj", **ROBERTA),
    Expected(
        "DistilBertForSequenceClassification",
        DISTIL,
        "distilbert.transformer.layer",
        "classifier",
        ("distilbert.embeddings.word_embeddings", "distilbert.embeddings.position_embeddings"),
        (),
        attention="attention.q_lin attention.k_lin attention.v_lin > attention.out_lin",
        mlp="ffn.lin1 > ffn.lin2",
        norms="sa_layer_norm output_layer_norm",
        also={"distilbert.embeddings.LayerNorm": 0.0, "pre_classifier": 1.0},
    ),
    Expected(
        "ViTForImageClassification",
        VISION,
        "vit.layers",
        "classifier",
        ("vit.embeddings.patch_embeddings.projection",),
        ("vit.layernorm",),
        attention="attention.q_proj attention.k_proj attention.v_proj > attention.o_proj",
        mlp="mlp.fc1 > mlp.fc2",
        norms="layernorm_before layernorm_after",
        also={"vit.embeddings": 0.0},
    ),
    Expected("CLIPModel", CLIP, "vision_model.encoder.layers", also={"visual_projection": 1.0}, **CLIP_MODEL),
    Expected("CLIPModel", CLIP, "text_model.encoder.layers", first=3, also={"text_projection": 1.0}, **CLIP_MODEL),
    Expected(
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4},
        experts="mlp.experts.gate_up_proj mlp.experts.down_proj",
        others="mlp.gate",
        **{**LLAMA, "mlp": ""},
    ),
    Expected("Qwen2MoeForCausalLM", QWEN_MOE, **LLAMA),
    Expected(
        "Qwen2MoeForCausalLM",
        QWEN_MOE,
        experts="mlp.experts.gate_up_proj mlp.experts.down_proj",
        others="mlp.gate mlp.shared_expert_gate",
        first=1,
        **{**LLAMA, "mlp": "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj > mlp.shared_expert.down_proj"},
    ),
    Expected(
        "MambaForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "backbone.layers",
        "lm_head",
        ("backbone.embeddings",),
        ("backbone.norm_f",),
        others="mixer.conv1d mixer.dt_proj mixer.in_proj mixer.out_proj mixer.x_proj",
        norms="norm",
        tied=True,
    ),
]


def names(parts: tuple[Part, ...], prefix: str) -> list[str]:
    assert all(part.weight.startswith(part.name) for part in parts)
    return [part.weight.removeprefix(f"{prefix}.").removesuffix(".weight") for part in parts]


def path(ins: tuple[Part, ...], out: Part | None, prefix: str) -> str:
    return f"{' '.join(names(ins, prefix))} > {names((out,), prefix)[0]}" if out else ""


def stored_shape(part: Part, weight: torch.Tensor) -> tuple[int, ...]:
    shape = (part.input_dim, part.output_dim) if part.transposed else (part.output_dim, part.input_dim)
    return (weight.shape[0], *shape) if weight.ndim == 3 else shape


@pytest.mark.parametrize("expected", MODELS, ids=lambda e: f"{e.model}-{e.stack}-{e.first}")
def test_every_name_is_right(expected: Expected):
    with torch.device("meta"):
        model = build(expected.model, **expected.config)
    found = anatomy(model)
    assert found.head == expected.head
    assert found.tied_head == expected.tied
    assert found.embeddings == expected.embeddings
    assert found.final_norms == expected.final_norms
    assert len(found.blocks) == expected.count
    block = found.blocks[expected.first]
    assert block.stack == expected.stack
    name = block.name
    assert name.startswith(f"{expected.stack}.")
    assert path(block.attention_in, block.attention_out, name) == expected.attention
    assert path(block.cross_attention_in, block.cross_attention_out, name) == expected.cross
    assert path(block.mlp_in, block.mlp_out, name) == expected.mlp
    assert " ".join(names(block.experts, name)) == expected.experts
    assert " ".join(sorted(names(block.others, name))) == expected.others
    assert [norm.removeprefix(f"{name}.") for norm in block.norms] == expected.norms.split()
    for module, depth in expected.also.items():
        assert found.depth(f"{module}.weight") == depth, module


@pytest.mark.parametrize("expected", MODELS, ids=lambda e: f"{e.model}-{e.stack}-{e.first}")
def test_parts_fit_the_state_dict(expected: Expected):
    with torch.device("meta"):
        model = build(expected.model, **expected.config)
    found, tensors = anatomy(model), model.state_dict()
    for block in found.blocks:
        weights = [part.weight for part in block.parts]
        assert len(set(weights)) == len(weights)
        linear = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if name.startswith(f"{block.name}.") and isinstance(module, nn.Linear)
        ]
        assert set(linear) <= set(weights), "every matrix has a role"
        for part in block.parts:
            if "conv" not in part.name:
                assert tuple(tensors[part.weight].shape) == stored_shape(part, tensors[part.weight])
            assert found.block_of(part.weight) == block.index
        for out in (block.attention_out, block.cross_attention_out, block.mlp_out):
            assert out is None or out.output_dim == block.width


@pytest.mark.parametrize("expected", MODELS, ids=lambda e: f"{e.model}-{e.stack}-{e.first}")
def test_depth_rises_from_the_embeddings_to_the_head(expected: Expected):
    with torch.device("meta"):
        model = build(expected.model, **expected.config)
    found = anatomy(model)
    assert all(0.0 <= found.depth(name) <= 1.0 for name in model.state_dict())
    assert all(found.depth(f"{name}.weight") == 0.0 for name in found.embeddings)
    assert found.head is None or found.depth(f"{found.head}.weight") == 1.0
    for stack in {block.stack for block in found.blocks}:
        depths = [block.depth for block in found.blocks if block.stack == stack]
        assert depths == sorted(set(depths))
        assert 0.0 < depths[0] <= depths[-1] < 1.0


# --- what the names claim, checked by running ----------------------------------------------------------------------

RUN = [
    ("GPT2LMHeadModel", GPT2),
    ("LlamaForCausalLM", {**GROUPED, "head_dim": 16}),
    ("Qwen2ForCausalLM", GROUPED),
    ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    ("MistralForCausalLM", GROUPED),
    ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}),
    ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16}),
    ("Phi3ForCausalLM", GROUPED),
    ("GPTNeoXForCausalLM", BASE),
    ("OPTForCausalLM", OPT),
    ("PhiForCausalLM", BASE),
    ("T5ForConditionalGeneration", OLD_GATED),
    ("ViTForImageClassification", VISION),
    ("CLIPModel", CLIP),
]
NORM_AFTER_MLP = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")


def run(model: nn.Module, inputs: dict[str, torch.Tensor], modules: list[str]) -> dict[str, tuple[torch.Tensor, ...]]:
    """What goes into each module, and what comes out."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}

    def record(name: str):
        def hook(_module, args, kwargs, output):
            came_in = args[0] if args else kwargs["hidden_states"]
            seen[name] = (came_in.clone(), (output[0] if isinstance(output, tuple) else output).clone())

        return hook

    hooks = [model.get_submodule(m).register_forward_hook(record(m), with_kwargs=True) for m in modules]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def some_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if isinstance(model, tf.T5ForConditionalGeneration):
        return {"input_ids": ids, "decoder_input_ids": ids}
    if isinstance(model, tf.CLIPModel):
        return {"input_ids": ids, "pixel_values": pixels}
    return {"pixel_values": pixels} if isinstance(model, tf.ViTForImageClassification) else {"input_ids": ids}


def silence(model: nn.Module, part: Part) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule(part.name).parameters():
            parameter.zero_()


@pytest.mark.parametrize(("name", "config"), RUN, ids=[name for name, _ in RUN])
def test_without_its_ways_out_a_block_changes_nothing(name: str, config: dict):
    model = build(name, **config)
    blocks = anatomy(model).blocks
    inputs = some_inputs(model)
    for came_in, came_out in run(model, inputs, [block.name for block in blocks]).values():
        assert not torch.allclose(came_in, came_out)
    for block in blocks:
        for out in (block.attention_out, block.cross_attention_out, block.mlp_out):
            if out:
                silence(model, out)
    for came_in, came_out in run(model, inputs, [block.name for block in blocks]).values():
        torch.testing.assert_close(came_in, came_out)


@pytest.mark.parametrize(("name", "config"), [r for r in RUN if r[0] not in NORM_AFTER_MLP], ids=lambda v: str(v)[:20])
def test_what_mlp_out_gives_is_what_the_block_adds(name: str, config: dict):
    model = build(name, **config)
    block = anatomy(model).blocks[-1]
    inputs = some_inputs(model)
    before = run(model, inputs, [block.name, block.mlp_out.name])
    silence(model, block.mlp_out)
    after = run(model, inputs, [block.name])
    gave = before[block.mlp_out.name][1].view_as(before[block.name][1])
    torch.testing.assert_close(before[block.name][1] - after[block.name][1], gave)


# --- plain modules -------------------------------------------------------------------------------------------------


def test_cifar_resnet():
    found = anatomy(resnet20())
    assert found.embeddings == ("conv1",)
    assert [block.name for block in found.blocks] == [f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)]
    assert [block.width for block in found.blocks] == [16] * 3 + [32] * 3 + [64] * 3
    assert found.head == "linear"
    assert found.final_norms == ()
    assert found.depth("bn1.running_mean") == 0.0
    assert found.depth("layer3.2.bn2.bias") == 0.9
    assert found.depth("linear.bias") == 1.0
    block = found.blocks[3]
    assert block.attention_in == ()
    assert block.attention_out is None
    assert block.mlp_in == (Part("layer2.0.conv1", "layer2.0.conv1.weight", 16 * 9, 32, False),)
    assert block.mlp_out == Part("layer2.0.conv2", "layer2.0.conv2.weight", 32 * 9, 32, False)
    assert block.norms == ("layer2.0.bn1", "layer2.0.bn2")
    assert block.others == ()


def test_a_silent_convolution_adds_nothing():
    model = resnet(8).eval()
    block = anatomy(model).blocks[0]
    silence(model, block.mlp_out)
    came_in, came_out = run_images(model, block.name)
    torch.testing.assert_close(came_in, came_out)


def run_images(model: nn.Module, name: str) -> tuple[torch.Tensor, ...]:
    return run(model, {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}, [name])[name]


@pytest.mark.parametrize(("make", "name"), [(resnet20, "cifar10-resnet20"), (resnet56, "cifar10-resnet56")])
def test_resnet_has_the_names_of_the_checkpoint(make, name):
    file = ASSETS / "checkpoints" / name / "model.safetensors"
    if not file.exists():
        pytest.skip(f"needs {name}: point LFM_ASSETS at the assets")
    make().load_state_dict(load_file(file), strict=True)


def test_bottleneck_resnet_with_stages_and_shortcuts():
    config = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "bottleneck"}
    found = anatomy(build("ResNetForImageClassification", **config))
    stage = "resnet.encoder.stages"
    assert [block.name for block in found.blocks] == [
        f"{stage}.0.layers.0",
        f"{stage}.0.layers.1",
        f"{stage}.1.layers.0",
    ]
    assert {block.stack for block in found.blocks} == {stage}
    last = found.blocks[-1]
    assert path(last.mlp_in, last.mlp_out, last.name) == "layer.0.convolution > layer.2.convolution"
    assert sorted(names(last.others, last.name)) == ["layer.1.convolution", "shortcut.convolution"]
    assert found.head == "classifier.1"


def test_stages_with_attention_and_what_is_between_them():
    config = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    found = anatomy(build("SwinForImageClassification", **config))
    assert [block.width for block in found.blocks] == [8, 8, 16, 16]
    assert found.final_norms == ("swin.layernorm",)
    assert found.depth("swin.encoder.layers.0.downsample.reduction.weight") == found.blocks[1].depth


def test_sequential_mlp_counts_its_matrices():
    found = anatomy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))
    assert found.blocks == ()
    assert found.embeddings == ()
    assert found.head == "4"
    assert [found.depth(f"{i}.weight") for i in (0, 2, 4)] == [0.0, 0.5, 1.0]
    assert found.block_of("2.weight") is None


def test_single_linear_is_the_head():
    found = anatomy(nn.Linear(3, 4))
    assert found == Anatomy((), (), (), "", False, {"": 1.0})
    assert found.depth("weight") == 1.0


def test_module_without_weights_has_nothing():
    assert anatomy(nn.ReLU()) == Anatomy((), (), (), None, False, {})


def test_torch_transformer_keeps_query_key_value_as_a_parameter():
    layer = nn.TransformerDecoderLayer(32, 4, 48)
    block = anatomy(nn.TransformerDecoder(layer, 2)).blocks[1]
    assert path(block.attention_in, block.attention_out, block.name) == "self_attn.in_proj_weight > self_attn.out_proj"
    assert block.cross_attention_out.name == "layers.1.multihead_attn.out_proj"
    assert path(block.mlp_in, block.mlp_out, block.name) == "linear1 > linear2"


class FlatBlock(nn.Module):
    """Everything directly in the block and registered in an order that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(128, 32)
        self.d = nn.Linear(32, 32)
        self.a = nn.Linear(32, 128)
        self.norm = nn.LayerNorm(32)
        self.c = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.d(self.c(self.norm(x))[..., :32])
        return x + self.feed(x)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"norm": nn.LayerNorm(32), "out": nn.Linear(32, 96, bias=False)})
        self.inner = nn.ModuleDict({"table": nn.Embedding(96, 32), "deep": nn.ModuleList([FlatBlock(), FlatBlock()])})
        self.parts["out"].weight = self.inner["table"].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner["table"](ids)
        for block in self.inner["deep"]:
            x = block(x)
        return self.parts["out"](self.parts["norm"](x))


def test_roles_come_from_the_order_in_forward_not_from_names():
    found = anatomy(Flat())
    block = found.blocks[0]
    assert path(block.attention_in, block.attention_out, block.name) == "c > d"
    assert path(block.mlp_in, block.mlp_out, block.name) == "a > b"
    assert found.head == "parts.out"
    assert found.tied_head
    assert found.final_norms == ("parts.norm",)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.router = nn.Linear(32, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(3))


def test_experts_in_a_list_are_not_blocks():
    found = anatomy(nn.ModuleList([Experts(), Experts()]))
    assert [block.name for block in found.blocks] == ["0", "1"]
    assert [part.name for part in found.blocks[0].experts] == [f"0.experts.{i}.{j}" for i in range(3) for j in (0, 2)]
    assert [part.name for part in found.blocks[0].others] == ["0.router"]
    assert found.blocks[0].mlp_out is None


@pytest.mark.parametrize(("name", "config"), [("LlamaModel", GROUPED), ("BertModel", BASE), ("OPTModel", OPT)])
def test_base_models_have_no_head(name: str, config: dict):
    assert anatomy(build(name, **config)).head is None


def test_what_an_adapter_adds_is_as_deep_as_its_module():
    found = anatomy(build("LlamaForCausalLM", **GROUPED))
    assert found.block_of("model.layers.1.self_attn.q_proj.lora_A.weight") == 1
    assert found.depth("lm_head.lora_A.weight") == 1.0


def test_unknown_tensor_is_refused_with_a_hint():
    with pytest.raises(RequestError, match=r"'model.nrom.weight'.*did you mean 'model.norm'"):
        anatomy(build("LlamaForCausalLM", **GROUPED)).depth("model.nrom.weight")


def test_thirty_two_layers_take_less_than_fifty_milliseconds():
    with torch.device("meta"):
        model = build("LlamaForCausalLM", **{**GROUPED, "num_hidden_layers": 32})
    times = []
    for _ in range(5):
        start = time.perf_counter()
        found = anatomy(model)
        times.append(time.perf_counter() - start)
    assert len(found.blocks) == 32
    assert min(times) < 0.05
