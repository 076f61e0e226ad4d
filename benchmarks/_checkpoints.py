"""Checkpoints made of seeded noise in the shape of real models, written tensor by tensor with numpy alone.

One `base`, and sources that lie a little noise away from it, as fine-tunes do. The same seed gives the same bytes.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

SEED = 20240229
BASE_STD = 0.02
SOURCE_STD = 0.002  # the distance of a source from its base, as in the measurements that the targets come from
SOURCES = ("a", "b")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What a checkpoint looks like: its tensors, its configuration (none: a plain module), its largest shard."""

    tensors: Shapes
    config: dict[str, object] | None = None
    shard_bytes: int = 250_000_000

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(math.prod(shape) for shape in self.tensors.values())


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, shard_bytes: int) -> Shape:
    """Return a Llama with its own output head (not tied to the embedding)."""
    keys = hidden // heads * kv_heads
    tensors: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        tensors |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.mlp.down_proj.weight": (hidden, mlp),
            f"{block}.mlp.gate_proj.weight": (mlp, hidden),
            f"{block}.mlp.up_proj.weight": (mlp, hidden),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.self_attn.k_proj.weight": (keys, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.v_proj.weight": (keys, hidden),
        }
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = _decoder("LlamaForCausalLM", "llama", hidden, layers, heads, kv_heads, vocabulary)
    return Shape(tensors, config | {"intermediate_size": mlp}, shard_bytes)


def mixture(layers: int = 48, experts: int = 128, hidden: int = 32, mlp: int = 16, vocabulary: int = 256) -> Shape:
    """Return a model with the tensor names of Qwen3-30B-A3B (18,867 of them), each of them tiny."""
    heads, kv_heads, head = 4, 2, 16
    tensors: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        tensors |= {f"{block}.input_layernorm.weight": (hidden,), f"{block}.post_attention_layernorm.weight": (hidden,)}
        tensors |= {f"{block}.mlp.gate.weight": (experts, hidden)}
        for expert in range(experts):
            prefix = f"{block}.mlp.experts.{expert}"
            tensors |= {f"{prefix}.down_proj.weight": (hidden, mlp), f"{prefix}.gate_proj.weight": (mlp, hidden)}
            tensors |= {f"{prefix}.up_proj.weight": (mlp, hidden)}
        tensors |= {f"{block}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        tensors |= {f"{block}.self_attn.{name}_proj.weight": (kv_heads * head, hidden) for name in "kv"}
        tensors |= {f"{block}.self_attn.q_proj.weight": (heads * head, hidden)}
        tensors |= {f"{block}.self_attn.o_proj.weight": (hidden, heads * head)}
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = _decoder("Qwen3MoeForCausalLM", "qwen3_moe", hidden, layers, heads, kv_heads, vocabulary)
    config |= {"head_dim": head, "intermediate_size": mlp, "moe_intermediate_size": mlp, "num_experts": experts}
    return Shape(tensors, config | {"num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []})


def plain(tensors: int, rows: int = 64, columns: int = 16) -> Shape:
    """Return a module without a configuration that has many small tensors."""
    return Shape({f"block.{i:05d}.weight": (rows, columns) for i in range(tensors)})


def _decoder(
    architecture: str, kind: str, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make(folder: Path, shape: Shape) -> dict[str, Path]:
    """Write `base` and the sources under `folder`, unless they are there; return their folders by name."""
    names = ("base", *SOURCES)
    models = {name: folder / name for name in names}
    done = folder / "complete.json"
    key = {"seed": SEED, "tensors": len(shape.tensors), "parameters": shape.parameters, "models": names}
    if done.exists() and json.loads(done.read_text()) == json.loads(json.dumps(key)):
        return models
    writers = [_Writer(models[name], shape) for name in names]
    for i, (name, size) in enumerate(shape.tensors.items()):
        for writer, values in zip(writers, _family(i, size, len(names)), strict=True):
            writer.write(name, values)
    for writer in writers:
        writer.close()
    done.write_text(json.dumps(key))
    return models


def _family(index: int, size: tuple[int, ...], count: int) -> Iterator[np.ndarray]:
    """Yield tensor number `index` of the base, then of each source, as bfloat16 bits."""
    centre = np.float32(1.0 if len(size) == 1 else 0.0)  # norms are near 1
    base = to_bfloat16(_noise(index, 0, size, BASE_STD) + centre)
    yield base
    for model in range(1, count):
        yield to_bfloat16(from_bfloat16(base) + _noise(index, model, size, SOURCE_STD))


def _noise(index: int, model: int, size: tuple[int, ...], std: float) -> np.ndarray:
    random = np.random.Generator(np.random.SFC64(np.random.SeedSequence([SEED, model, index])))
    values = random.standard_normal(size, dtype=np.float32)
    values *= np.float32(std)
    return values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16 numbers (ties to even) of finite float32 ones."""
    bits = values.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype("<u2")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits as float32 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class _Writer:
    """One model folder, written in the order of its tensors: every offset is known before the first byte."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._shards = _shards(shape)
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._file_of: dict[str, str] = {}
        for i, names in enumerate(self._shards, 1):
            many = len(self._shards) > 1
            file = f"model-{i:05d}-of-{len(self._shards):05d}.safetensors" if many else "model.safetensors"
            self._files[file] = (folder / file).open("wb")
            self._files[file].write(_header({name: shape.tensors[name] for name in names}))
            self._file_of |= dict.fromkeys(names, file)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": self._file_of}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        if shape.config:
            (folder / "config.json").write_text(json.dumps(shape.config, indent=2))

    def write(self, name: str, bits: np.ndarray) -> None:
        self._files[self._file_of[name]].write(memoryview(np.ascontiguousarray(bits)).cast("B"))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _shards(shape: Shape) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shape.shard_bytes
    for name, size in shape.tensors.items():
        needed = 2 * math.prod(size)
        if needed > room and shards[-1]:
            shards.append([])
            room = shape.shard_bytes
        shards[-1].append(name)
        room -= needed
    return shards


def _header(tensors: Shapes) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in tensors.items():
        end = start + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
