"""Small checkpoints made on the spot."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def llama_tensors(seed: int, spread: float = 0.02) -> dict[str, torch.Tensor]:
    """Return random weights of the architecture above, around a common centre so that models are siblings."""
    width, inner, vocabulary = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(LLAMA["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (width,),
            f"{prefix}post_attention_layernorm.weight": (width,),
            f"{prefix}self_attn.q_proj.weight": (width, width),
            f"{prefix}self_attn.k_proj.weight": (width // 2, width),
            f"{prefix}self_attn.v_proj.weight": (width // 2, width),
            f"{prefix}self_attn.o_proj.weight": (width, width),
            f"{prefix}mlp.gate_proj.weight": (inner, width),
            f"{prefix}mlp.up_proj.weight": (inner, width),
            f"{prefix}mlp.down_proj.weight": (width, inner),
        }
    centre, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=centre) * 0.1 + torch.randn(shape, generator=own) * spread * bool(seed)
        for name, shape in shapes.items()
    }


def write_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint folder; seed 0 is the centre, the others lie around it."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in llama_tensors(seed).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder
