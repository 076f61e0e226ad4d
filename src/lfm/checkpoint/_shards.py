"""Writing patched weights shard by shard: what holds a changed tensor is written anew, all else is linked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lfm.checkpoint import _digests
from lfm.checkpoint._delta import Patched
from lfm.checkpoint._open import Checkpoint, FileWeights
from lfm.checkpoint._weights import as_bytes, combine
from lfm.checkpoint._write import OutputFolder, write_all

ELEMENTS = 1 << 20  # of a tensor, computed at once
BLOCK = 1 << 22  # bytes of a file, copied at once


def write_patched(base: Checkpoint, patched: Patched, folder: OutputFolder) -> tuple[str, dict[str, str]]:
    """Write the weights of `base` with patches into `folder`; return their digest, and that of each tensor.

    The files are called and split as those of the base. A file without a changed tensor is a hard link to the base's
    (a copy, across file systems): it takes no space, and since nothing in lfm writes into a file that is there, it
    cannot change under either name. What is no set of safetensors files is written whole.
    """
    weights = base.weights
    changed = {name for delta in patched.deltas for name in delta.changes}
    if not isinstance(weights, FileWeights):
        return _written_whole(patched, folder)
    before, known = _stats(weights), weights.tensor_digests()
    digests, untouched = dict(known), {}
    for path, names in _files(weights).items():
        mine = [name for name in names if name in changed]
        if mine:
            digests |= _rewritten(path, mine, patched, folder)
        else:
            untouched[path.name] = path
    folder.link(untouched)
    if untouched and _stats(weights) == before:  # a link changes a file's status, by which digests are remembered
        _digests.remember(_digests.state(weights.specs), known)
    folder.copy({path.name: path for path in sorted(base.folder.glob("*.safetensors.index.json"))})
    return combine(patched.specs, digests), digests


def _files(weights: FileWeights) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for name, spec in weights.specs.items():
        if spec.path is None:
            raise AssertionError(f"{name} has no file")
        found.setdefault(spec.path, []).append(name)
    return found


def _stats(weights: FileWeights) -> list[tuple[int, int, int]]:
    stats = [path.stat() for path in _files(weights)]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def _rewritten(path: Path, names: Sequence[str], patched: Patched, folder: OutputFolder) -> dict[str, str]:
    """Write a copy of a file with some tensors changed, under its name; return the digests of these."""
    draft = f"{path.name}.draft"
    descriptor = folder.draft(draft)
    offset = 0
    with path.open("rb") as source:
        while block := source.read(BLOCK):
            write_all(descriptor, memoryview(block), offset)
            offset += len(block)
    digests = {name: _put(descriptor, name, patched) for name in names}
    folder.name_at_commit(draft, path.name)
    return digests


def _put(descriptor: int, name: str, patched: Patched) -> str:
    digest = hashlib.sha256()
    offset = patched.specs[name].offset
    for _, part in patched.chunks(name, ELEMENTS):
        data = as_bytes(part)
        write_all(descriptor, data, offset)
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def _written_whole(patched: Patched, folder: OutputFolder) -> tuple[str, dict[str, str]]:
    writer = folder.tensors(patched.specs)
    for name in patched.specs:
        for _, part in patched.chunks(name, ELEMENTS):
            writer.write(name, part)
    return writer.finish(), writer.digests()
