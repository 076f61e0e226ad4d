"""Small checkpoints that the tests of merging share, and a merge in one call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lfm
from lfm.checkpoint import Checkpoint, MemoryWeights, torch_dtype
from lfm.method import verbs
from lfm.models.ref import ModelRef
from lfm.recipe.step import Outline
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


class _Writer:
    """Takes what an engine writes into memory."""

    def __init__(self, specs) -> None:
        self.specs = specs
        self._bytes = {name: bytearray() for name in specs}

    def append(self, name, data) -> None:
        self._bytes[name] += data

    def finish(self) -> str:
        assert {name: len(data) for name, data in self._bytes.items()} == {n: s.nbytes for n, s in self.specs.items()}
        return ""

    def digests(self) -> dict[str, str]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.frombuffer(self._bytes[name], dtype=torch_dtype(spec.dtype)).reshape(spec.shape)
            if spec.size
            else torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            for name, spec in self.specs.items()
        }


class _Memory:
    """Stands where an engine finds its models (`Context`), and where it puts what it makes (`OutputFolder`)."""

    def __init__(self, models, seed: int, settings: lfm.Settings) -> None:
        self.seed, self.settings = seed, settings
        self._models = {
            ModelRef.model_validate(name): Checkpoint(name, MemoryWeights(content), Path("nowhere"))
            for name, content in models.items()
        }

    def open(self, ref: ModelRef) -> Checkpoint:
        return self._models[ref]

    def outlines(self, refs) -> list[Outline]:
        return [Outline(ref, self._models[ref].specs) for ref in refs]

    def tensors(self, specs) -> _Writer:
        self.writer = _Writer(specs)
        return self.writer

    def copy(self, files) -> None:
        assert not files


def merge_in_memory(method: _contract.Merge, sources, base=None, *, seed: int = 0, threads: int = 1, weights=None):
    """Merge as `merge` does, by the same engine, but without files, reports and lineage: many times as quick."""
    models = {f"source{number}": source for number, source in enumerate(sources)}
    inputs = _contract.Inputs(models=list(models), base=None if base is None else "base", weights=weights)
    memory = _Memory(
        models if base is None else {**models, "base": base}, seed, lfm.Settings(threads=threads, quiet=True)
    )
    engine = verbs()["merge"].engine()
    plan = engine.plan(method, inputs, memory)
    assert plan.problems == ()
    engine.run(method, inputs, memory, memory)
    return memory.writer.tensors()
