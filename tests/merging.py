"""Small checkpoints that the tests of merging share, and a merge in one call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lfm
from lfm.reuse.merge import _contract

SHAPES = {"embed.weight": (16, 5), "layer.weight": (5, 5), "layer.bias": (5,), "head.weight": (3, 7), "scale": ()}


def tensors(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> dict[str, torch.Tensor]:
    """Random tensors of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def near(base, seed: int, size: float = 0.1) -> dict[str, torch.Tensor]:
    """What a little tuning could have made of `base`."""
    noise = tensors(seed, shapes={name: tensor.shape for name, tensor in base.items()})
    return {name: (tensor.float() + size * noise[name]).to(tensor.dtype) for name, tensor in base.items()}


def save(folder: Path, content, *, sharded: bool = False, vocabulary=None) -> Path:
    """Write a checkpoint, with one shard for each tensor if `sharded`."""
    folder.mkdir(parents=True)
    shards = [[name] for name in content] if sharded else [list(content)]
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if sharded else "model.safetensors"
        save_file({name: content[name].contiguous() for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    if sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if vocabulary is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint with the reference implementation."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merge(method: _contract.Merge, sources, base=None, *, at: Path, threads: int = 2, **options):
    """Save models, merge them in a new folder under `at`, and return what came out."""
    at.mkdir(exist_ok=True)
    place = at / f"merge{len(list(at.iterdir()))}"
    paths = [save(place / f"source{number}", source) for number, source in enumerate(sources)]
    base_path = None if base is None else save(place / "base", base)
    settings = lfm.Settings(threads=threads, quiet=True)
    lfm.merge(method, paths, base=base_path, out=place / "out", settings=settings, **options)
    return load(place / "out")
