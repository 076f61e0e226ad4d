"""Edited folders: what they were made from, which patches lie on it, and putting patches on and taking them off again.

The weights of an edited folder are *defined* as those of its base with a set of patches on them, and computed from both
whenever the set changes. Therefore reverting a patch, in any order, gives to the last bit what would have been without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm.checkpoint import (
    Checkpoint,
    Delta,
    OutputFolder,
    Patched,
    Weights,
    combine,
    open_checkpoint,
    read_json,
    remember_output,
    save_adapter,
    write_patched,
)
from lfm.errors import RequestError
from lfm.recipe._patch_card import write_provenance

PATCHES = "patches"  # of an edited folder: the folder of its patches
MANIFEST = "patches.json"  # what the patches lie on, and in which order they came
FORMAT = 1


@dataclass(frozen=True)
class Edited:
    """An edited folder: its patches in the order in which they came, and the digest of what they lie on."""

    folder: Path
    base: str
    ref: str
    path: str | None  # of the base, as seen from the folder
    patches: tuple[Delta, ...]

    def where(self) -> list[str]:
        """Return the places where the base may be: beside the folder as it was, and under the name it had."""
        beside = [] if self.path is None else [os.path.normpath(self.folder / self.path)]
        return list(dict.fromkeys([*beside, self.ref, str(self.folder)]))  # the last without patches, or none left


def read_edited(folder: Path) -> Edited | None:
    """Return what an edited folder is made of, None for one without patches. Raises RequestError for a broken one."""
    if not (folder / MANIFEST).is_file():
        return None
    told = read_json(folder / MANIFEST)
    base, ids = told.get("base"), told.get("patches")
    if told.get("lfm_patches") != FORMAT or not isinstance(base, dict) or not isinstance(ids, list):
        raise RequestError(f"{folder / MANIFEST}: not as this version writes it (format {FORMAT})")
    patches: list[Delta] = []
    problems: list[str] = []
    for id_ in ids:
        place = folder / PATCHES / str(id_)[:12]
        try:
            patches.append(read_patch(place))
            if patches[-1].id != id_:
                problems.append(f"{place}: holds another patch, {patches[-1].id[:12]}")
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)
    return Edited(folder, str(base.get("digest")), str(base.get("ref")), base.get("path"), tuple(patches))


def edited_of(checkpoint: Checkpoint) -> Edited | None:
    """Return what a checkpoint's folder is made of; None for one without patches, or with an adapter on top of it."""
    return None if checkpoint.patches else read_edited(checkpoint.folder)


def read_patch(folder: Path) -> Delta:
    """Return the patch in a folder. Raises RequestError where there is none, or a broken one."""
    if not (folder / "delta.json").is_file():
        raise RequestError(f"{folder}: no patch there (a folder with delta.json and delta.safetensors)")
    return Delta.load(folder)


def read_patches(places: Iterable[Path]) -> list[Delta]:
    """Return the patches of folders, an edited folder giving all of its own, each once."""
    found: dict[str, Delta] = {}
    problems: list[str] = []
    for place in places:
        try:
            edited = read_edited(place)
            found |= {patch.id: patch for patch in ([read_patch(place)] if edited is None else edited.patches)}
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)
    return list(found.values())


def find_base(edited: Edited, base: str | None = None, *, allow_pickle: bool = False) -> Checkpoint:
    """Return what an edited folder was made from: `base` if given, else where it was. Raises RequestError otherwise."""
    tried: list[str] = []
    for ref in edited.where() if base is None else [base]:
        try:
            found = open_checkpoint(ref, allow_pickle=allow_pickle)
        except RequestError as error:
            tried.append(f"{ref}: {error.problems[0]}")
            continue
        if found.digest == edited.base:
            return found
        if ref != str(edited.folder):
            tried.append(f"{ref} holds other weights, {found.digest[:12]}")
    raise RequestError(_lost(edited, base, tried))


def absent(edited: Edited, base: str | None) -> list[str]:
    """Return a line where there is nothing that could be the base; that it is the right one is not looked at yet."""
    tried: list[str] = []
    for ref in edited.where()[:-1] if base is None else [base]:
        try:
            open_checkpoint(ref)
            return []
        except RequestError as error:
            tried.append(f"{ref}: {error.problems[0]}")
    return [_lost(edited, base, tried)]


def _lost(edited: Edited, base: str | None, tried: Sequence[str]) -> str:
    hint = "; name it with --base" if base is None else ""
    why = "; ".join(tried)
    return f"{edited.folder}: its patches lie on weights {edited.base[:12]}, which are needed{hint} ({why})"


def stack(
    checkpoint: Checkpoint, base: str | None = None, *, allow_pickle: bool = False
) -> tuple[Checkpoint, tuple[Delta, ...]]:
    """Return what patches lie on and those that do: of an edited folder its base, of another one itself and none."""
    if base is not None and open_checkpoint(base, allow_pickle=allow_pickle).digest == checkpoint.digest:
        return checkpoint, ()  # an edited folder may be taken as the base of what comes, if that is said
    edited = edited_of(checkpoint)
    if edited is None:
        if base is not None:
            raise RequestError(f"{checkpoint.ref}: has no patches and is its own base; leave the base out")
        return checkpoint, ()
    return find_base(edited, base, allow_pickle=allow_pickle), edited.patches


def write_edited(
    base: Checkpoint, patches: Sequence[Delta], folder: OutputFolder, *, like: Checkpoint | None = None
) -> tuple[str, dict[str, str]]:
    """Write `base` with patches on it: weights, patches, what they lie on, and what belongs to the model besides.

    The files beside the weights are those of `like`, the base if left out. Returns the weights' digests.
    """
    _refuse_inside(base, folder)
    like = like or base
    patched = Patched(base.weights, patches)
    for patch in patches:
        patch.save(folder.partial / PATCHES / patch.id[:12])
    told = {
        "lfm_patches": FORMAT,
        "base": {"digest": base.digest, "ref": base.ref, "path": _seen_from(folder.out, base.ref)},
        "patches": [patch.id for patch in patches],
    }
    folder.write_json(MANIFEST, told)
    folder.copy({str(file.relative_to(like.folder)): file for file in like.side_files})
    if like.config is not None:
        folder.write_json("config.json", like.config)
    return write_patched(base, patched, folder)


def _refuse_inside(base: Checkpoint, folder: OutputFolder) -> None:
    """Refuse to replace the base by what is made from it: that would be the end of reverting."""
    out, home = folder.out.resolve(), base.folder.resolve()
    if out == home or out in home.parents:
        raise RequestError(f"{folder.out}: holds the weights that the patches lie on; choose another out")


def _seen_from(out: Path, ref: str) -> str | None:
    """Return a base's path as seen from the output, so that both can be moved together; None for what is no path."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        place = Path(ref).expanduser()
        if place.exists():
            return os.path.relpath(place.resolve(), out.resolve())
    return None


# --- apply and revert -----------------------------------------------------------------------------------------------


def apply(
    model: str,
    places: Sequence[Path],
    out: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Write `model` with patches on it into the new folder `out`.

    Raises RequestError for patches of another base, and for those that are on it already.
    """
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    below, already = stack(checkpoint, base, allow_pickle=allow_pickle)
    new = read_patches(places)
    return _remake("apply", checkpoint, below, (*already, *new), [patch.id for patch in new], out, overwrite)


def revert(
    model: str,
    ids: Sequence[str],
    out: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Write an edited model without the patches of these ids (or beginnings of them) into the new folder `out`."""
    checkpoint = open_checkpoint(model, allow_pickle=allow_pickle)
    edited = edited_of(checkpoint)
    if edited is None:
        raise RequestError(f"{model}: has no patches to revert (no {MANIFEST})")
    gone = [_called(id_, edited) for id_ in ids]
    below = find_base(edited, base, allow_pickle=allow_pickle)
    left = tuple(patch for patch in edited.patches if patch.id not in gone)
    return _remake("revert", checkpoint, below, left, gone, out, overwrite)


def _called(id_: str, edited: Edited) -> str:
    found = [patch.id for patch in edited.patches if patch.id.startswith(id_)]
    if len(found) != 1:
        there = ", ".join(patch.id[:12] for patch in edited.patches) or "none"
        raise RequestError(f"{edited.folder}: {len(found) or 'no'} patches called {id_!r}; there are {there}")
    return found[0]


def _remake(
    what: str,
    checkpoint: Checkpoint,
    base: Checkpoint,
    patches: Sequence[Delta],
    ids: Sequence[str],
    out: Path,
    overwrite: bool,
) -> Checkpoint:
    if out.exists() and checkpoint.folder.resolve() == out.resolve():
        raise RequestError(f"{out}: is the model itself, and inputs are never changed; choose another out")
    Patched(base.weights, patches)  # everything that speaks against it, before anything is written
    key = json.dumps([what, checkpoint.digest, base.digest, sorted(patch.id for patch in patches)])
    with OutputFolder(out, key=hashlib.sha256(key.encode()).hexdigest(), overwrite=overwrite) as folder:
        digest, digests = write_edited(base, patches, folder, like=checkpoint)
        write_provenance(what, checkpoint, base, ids, digest, folder)
        folder.commit()
    remember_output(out, digests)
    return open_checkpoint(out)


# --- verify ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What was found about an edited folder; `whole` is None where the base is not there to compute it from."""

    patches: int
    as_written: bool | None  # the weights' digest is that of the lineage
    whole: bool | None  # the weights are those of the base with the patches
    problems: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.problems and self.as_written is not False and self.whole is not False


def verify(model: str, base: str | None = None) -> Verdict:
    """Return whether an edited folder is what it says: its patches on its base, computed anew, and nothing else."""
    checkpoint = open_checkpoint(model)
    try:
        edited = edited_of(checkpoint)
    except RequestError as error:
        return Verdict(0, None, None, error.problems)
    if edited is None:
        raise RequestError(f"{model}: has no patches (no {MANIFEST}); `lfm verify` checks other folders")
    # What is remembered of files would hide a change of bytes that left size and time alone.
    now = combine(checkpoint.specs, Weights.tensor_digests(checkpoint.weights))
    written = (checkpoint.lineage or {}).get("output", {}).get("digest")
    as_written = None if written is None else written == now
    try:
        below = find_base(edited, base)
    except RequestError as error:
        return Verdict(len(edited.patches), as_written, None, error.problems if base is not None else ())
    expected = expected_digest(below, edited.patches)
    return Verdict(len(edited.patches), as_written, expected == now)


def expected_digest(base: Checkpoint, patches: Sequence[Delta]) -> str:
    """Return the digest of a base's weights with patches on them; only what is changed is computed."""
    patched = Patched(base.weights, patches)
    changed = sorted({name for patch in patches for name in patch.changes})
    return combine(patched.specs, {**base.weights.tensor_digests(), **patched.hash_tensors(changed)})


def about(patch: Delta) -> dict[str, Any]:
    """Return what a patch says of itself, as plain JSON values."""
    told: Mapping[str, Any] = patch.provenance
    return {
        "id": patch.id,
        "base": patch.base,
        "method": told.get("method"),
        "parameters": told.get("parameters", {}),
        "requests": told.get("requests", []),
        "scores": told.get("scores", {}),
        "bytes": sum(tensor.nbytes for change in patch.changes.values() for tensor in change.tensors().values()),
        "changes": {
            name: {"kind": change.kind, **{role: list(t.shape) for role, t in change.tensors().items()}}
            for name, change in patch.changes.items()
        },
    }


def export(place: Path, out: Path, base: str | None = None) -> None:
    """Write a low-rank patch as a LoRA adapter. Raises RequestError for other patches, and other layouts in one."""
    patch = read_patch(place)
    names: Mapping[str, Any] = patch.provenance.get("modules", {})
    if not set(patch.changes) <= set(names):
        raise RequestError(f"{place}: does not say which modules its matrices belong to; no adapter can be made of it")
    layouts = {bool(names[name]["transposed"]) for name in patch.changes}
    if len(layouts) > 1:
        raise RequestError(f"{place}: changes matrices of both layouts, (in, out) and (out, in); an adapter has one")
    changes = {str(names[name]["parameter"]): change for name, change in patch.changes.items()}
    ref = base or str(patch.provenance.get("base_ref", ""))
    save_adapter(Delta(changes, patch.base), out, base_ref=ref, transposed=layouts.pop() if layouts else False)
