"""Models cut down: the full size is the same model, what is kept is what was there, and transformers loads the rest."""

from __future__ import annotations

import pytest
import torch

import lfm.models.shrink as cutting
from lfm.checkpoint import OutputFolder
from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.anatomy import anatomy
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.models.local import LocalBackend, forward, save_model
from lfm.models.shrink import shrink

transformers = pytest.importorskip("transformers")


def llama(**changes):
    told = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    told |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**told))


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=4, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def qwen():
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


MAKERS = {"llama": llama, "gpt2": gpt2, "qwen": qwen, "bert": bert, "vit": vit}


def handle(name: str) -> Model:
    torch.manual_seed(0)
    module = MAKERS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and gains are not all alike
    tasks = {"bert": "text-classification", "vit": "image-classification"}
    task = tasks.get(name, "causal-lm")
    return Model(LocalBackend(module.eval(), None), Access.WEIGHTS, task, Encoder(task, None, None, None), name)


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(32, (2, 7), generator=generator)}


@pytest.mark.parametrize("name", MAKERS)
def test_the_full_size_is_the_same_model_bit_for_bit(name):
    model = handle(name)
    for same in (shrink(model, width=1.0), shrink(model, layers=list(range(len(anatomy(model.module).blocks))))):
        state = same.module.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.module.state_dict().items())
        with torch.no_grad():
            assert torch.equal(forward(same.module, inputs(name)), forward(model.module, inputs(name)))


@pytest.mark.parametrize("name", MAKERS)
def test_half_the_width_runs_and_is_part_of_what_was_there(name):
    model = handle(name)
    half = shrink(model, layers=2, width=0.5)
    assert len(anatomy(half.module).blocks) == 2
    with torch.no_grad():
        assert forward(half.module, inputs(name)).isfinite().all()
    of_the_whole = {float(value) for tensor in model.module.state_dict().values() for value in tensor.flatten()}
    mine = {float(value) for tensor in half.module.state_dict().values() for value in tensor.flatten()}
    assert mine <= of_the_whole
    counts = [sum(parameter.numel() for parameter in one.module.parameters()) for one in (half, model)]
    assert counts[0] < 0.45 * counts[1]


@pytest.mark.parametrize("name", ["llama", "qwen"])  # of the others a head is as wide as the channels by the heads
def test_what_is_cut_are_whole_heads_and_units(name, monkeypatch):
    """The model without those heads and units, all channels kept, is the large one with their ways out at zero."""
    model = handle(name)
    kept = {}
    add = cutting._Cut.add

    def noted(self, block, shapes):
        add(self, block, shapes)
        kept[block.attention_out.weight] = (block.attention_out, self.axes[block.attention_out.weight])
        kept[block.mlp_out.weight] = (block.mlp_out, self.axes[block.mlp_out.weight])

    def narrow(config, width):
        hidden = config.hidden_size
        wide(config, width)
        config.hidden_size = hidden

    wide = cutting._narrow
    monkeypatch.setattr(cutting._Cut, "add", noted)
    monkeypatch.setattr(cutting, "_narrow", narrow)
    small = shrink(model, width=0.5)
    with torch.no_grad():
        found = forward(small.module, inputs(name))
        for weight, (_, axes) in kept.items():
            parameter = model.module.get_parameter(weight)
            [(axis, places)] = axes.items()
            gone = torch.ones(parameter.shape[axis])
            gone[places] = 0
            parameter.mul_((1 - gone).unsqueeze(1 - axis))
        assert torch.allclose(found, forward(model.module, inputs(name)), atol=1e-5)


def test_queries_keys_and_values_in_one_are_cut_alike():
    """GPT-2 holds all three in one matrix; what is kept of it is what is kept of each."""
    model = handle("gpt2")
    half = shrink(model, width=0.5)
    whole, part = (one.module.transformer.h[0].attn for one in (model, half))
    heads = [
        head for head in range(4)
        if any(torch.equal(whole.c_attn.bias[head * 4 : head * 4 + 4], part.c_attn.bias[i : i + 4]) for i in (0, 4))
    ]  # fmt: skip
    assert len(heads) == 2
    rows = torch.tensor([head * 4 + i for head in heads for i in range(4)])
    for third in range(3):
        assert torch.equal(part.c_attn.bias[third * 8 : third * 8 + 8], whole.c_attn.bias[third * 16 + rows])


def test_the_heaviest_units_are_kept():
    model = handle("llama")
    with torch.no_grad():
        for block in model.module.model.layers:
            block.mlp.down_proj.weight[:, :24] *= 1e-3
            block.self_attn.o_proj.weight[:, :16] *= 1e-3
    half = shrink(model, width=0.5)
    mlp = half.module.model.layers[0].mlp.down_proj.weight
    assert mlp.abs().mean() > 0.05
    assert half.module.model.layers[0].self_attn.o_proj.weight.abs().mean() > 0.05


def test_named_layers_are_taken_in_their_order():
    model = handle("llama")
    made = shrink(model, layers=[0, 2, 3])
    for place, layer in enumerate((0, 2, 3)):
        ours, theirs = made.module.model.layers[place], model.module.model.layers[layer]
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_cut_is_a_checkpoint_that_transformers_loads(name, tmp_path):
    small = shrink(handle(name), layers=[0, 2], width=0.5)
    with OutputFolder(tmp_path / "small", key="k") as folder:
        save_model(small, folder, None)
        folder.commit()
    loaded = type(small.module).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        assert torch.equal(forward(loaded, inputs(name)), forward(small.module, inputs(name)))
    if name in ("llama", "gpt2"):
        head = loaded.get_output_embeddings().weight
        assert head.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


def test_new_weights_are_drawn_from_the_seed():
    model = handle("llama")
    first, again, other = (
        shrink(model, layers=2, width=0.5, weights=False, seed=seed).module.model.layers[0].mlp.up_proj.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("layers", "told"), [(5, "has 4 layers, and 5"), ([0, 4], "layers 0 to 3, and layer 4"), ([], "none were")]
)
def test_layers_that_are_not_there_are_refused(layers, told):
    with pytest.raises(RequestError, match=told):
        shrink(handle("llama"), layers=layers)


def test_what_cannot_be_cut_is_refused():
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    encoder = Encoder("image-classification", None, None, None)
    with pytest.raises(RequestError, match="made from transformers models"):
        shrink(Model(LocalBackend(plain, None), Access.WEIGHTS, "image-classification", encoder, "plain"), layers=1)
    config = transformers.GPTNeoXConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    fused = transformers.GPTNeoXForCausalLM(config)
    model = Model(LocalBackend(fused, None), Access.WEIGHTS, "causal-lm", Encoder("causal-lm", None, None, None), "neo")
    with pytest.raises(RequestError, match=r"how .* holds its heads is not known"):
        shrink(model, width=0.5)
