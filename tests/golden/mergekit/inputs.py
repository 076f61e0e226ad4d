"""The checkpoints that the golden merges start from, made from seeds by numpy alone.

Both the script that ran mergekit and the tests that compare with it call `write`, so no input is stored. Four sets:
`tiny` and `tiny-bf16` (a base and three fine-tunes), `wide` (a base and one fine-tune, large enough for statistics) and
`real` (stories260k and two noisy copies of it).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SETS = ("tiny", "tiny-bf16", "wide", "real")
TINY = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 11, "num_hidden_layers": 3, "head_dim": 6}
WIDE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32}
HEADS, KEY_VALUE_HEADS = 2, 1

# Of each fine-tune: the size of its changes, and the share of the weights that it changes at all.
SOURCES = {"a": (0.05, 1.0), "b": (0.08, 0.75), "c": (0.2, 0.5)}
# Tensors that fine-tuning left alone, with the fine-tunes that did so: a difference of zero is a case of its own.
FROZEN = {"model.layers.0.input_layernorm.weight": "abc", "model.layers.1.post_attention_layernorm.weight": "a"}
# Small beside the weights, as real fine-tuning is.
REAL_NOISE = {"a": 4e-4, "b": 6e-4}
SAMPLES = 64


def shapes(layers: int, sizes: dict[str, int] = TINY) -> dict[str, tuple[int, ...]]:
    """All tensors of a Llama of so many layers, sorted by name."""
    width, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (sizes["vocab_size"], width),
    }
    for layer in range(layers):
        of_layer = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (HEADS * head, width),
            "self_attn.k_proj": (KEY_VALUE_HEADS * head, width),
            "self_attn.v_proj": (KEY_VALUE_HEADS * head, width),
            "self_attn.o_proj": (width, HEADS * head),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return dict(sorted(found.items()))


def models(name: str, assets: Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """All checkpoints of a set as float32 tensors: {"base": {tensor: values}, "a": ..., ...}.

    Those of `tiny-bf16` hold values that bfloat16 can express. `real` needs the folder of assets.
    """
    if name == "real":
        if assets is None:
            raise ValueError("the real checkpoint lies in the folder of assets; name it")
        return _real(load_file(assets / "checkpoints" / "stories260k" / "model.safetensors"))
    if name == "wide":
        return _made(shapes(WIDE["num_hidden_layers"], WIDE), 13, {"a": (0.05, 1.0)}, {})
    # A seed with which no element lies close to a threshold that any of the methods sets.
    found = _made(shapes(TINY["num_hidden_layers"]), 7, SOURCES, FROZEN)
    if name == "tiny-bf16":
        return {model: {key: _rounded(value) for key, value in content.items()} for model, content in found.items()}
    return found


def write(name: str, folder: Path, assets: Path | None = None) -> None:
    """Write the checkpoints of a set as folders `base`, `a`, ... of `folder`."""
    config = _config(WIDE if name == "wide" else TINY, "bfloat16" if name == "tiny-bf16" else "float32")
    for model, content in models(name, assets).items():
        home = folder / model
        home.mkdir(parents=True)
        _save(content, home / "model.safetensors", half=name == "tiny-bf16")
        if name == "real":
            shutil.copyfile(assets / "checkpoints" / "stories260k" / "config.json", home / "config.json")
        else:
            (home / "config.json").write_text(json.dumps(config, indent=2))


def fingerprint(name: str, assets: Path | None = None) -> str:
    """SHA-256 of all values of a set: what to look at first when every golden number is wrong."""
    digest = hashlib.sha256()
    for model, content in sorted(models(name, assets).items()):
        for key, value in sorted(content.items()):
            digest.update(f"{model} {key} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value, dtype="<f4").tobytes())
    return digest.hexdigest()


def sample(name: str, value: np.ndarray) -> np.ndarray:
    """Up to 64 elements of a tensor, at positions that depend on its name and size only, and after them its norm."""
    flat = value.ravel()
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    positions = np.sort(_generator(seed).permutation(flat.size)[:SAMPLES])
    norm = np.sqrt(np.square(flat, dtype=np.float64).sum())
    return np.append(flat[positions], norm).astype(np.float32)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _made(tensors: dict[str, tuple[int, ...]], seed: int, sources, frozen) -> dict[str, dict[str, np.ndarray]]:
    """A base and fine-tunes of it whose changes agree in part, and are zero in part."""
    generator = _generator(seed)
    found: dict[str, dict[str, np.ndarray]] = {"base": {}} | {model: {} for model in sources}
    for name, shape in tensors.items():
        is_norm = len(shape) == 1
        base = (is_norm + (0.1 if is_norm else 0.25) * generator.standard_normal(shape)).astype(np.float32)
        common = generator.standard_normal(shape)
        found["base"][name] = base
        for model, (size, share) in sources.items():
            change = size * (0.6 * common + 0.8 * generator.standard_normal(shape))
            change *= generator.random(shape) < share
            change *= model not in frozen.get(name, "")
            found[model][name] = (base + change).astype(np.float32)
    return found


def _real(base: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    generator = _generator(11)
    found = {"base": base} | {model: {} for model in REAL_NOISE}
    for name in sorted(base):
        for model, size in REAL_NOISE.items():
            noise = size * generator.standard_normal(base[name].shape)
            found[model][name] = (base[name] + noise).astype(np.float32)
    return found


def _half(value: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(value, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _rounded(value: np.ndarray) -> np.ndarray:
    return (_half(value).astype("<u4") << 16).view("<f4")


def _save(content: dict[str, np.ndarray], path: Path, *, half: bool) -> None:
    """Write a safetensors file by hand, for numpy has no bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, value in content.items():
        data = (_half(value) if half else np.ascontiguousarray(value, dtype="<f4")).tobytes()
        place = [offset, offset + len(data)]
        header[name] = {"dtype": "BF16" if half else "F32", "shape": list(value.shape), "data_offsets": place}
        parts.append(data)
        offset = place[1]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(parts))


def _config(sizes: dict[str, int], dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
