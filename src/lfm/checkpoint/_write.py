"""Writing checkpoints: streamed, in any order, from any thread, and complete or not there at all.

Everything is written under `<out>.partial`, weights under names that no loader takes, and renamed when complete. A run
that is killed leaves a `.partial` folder behind, which the same run picks up again and which nothing else will load.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lfm.checkpoint import _digests
from lfm.checkpoint._header import ITEM_BITS, Spec, read_header, write_header
from lfm.checkpoint._weights import as_bytes, combine, torch_dtype
from lfm.errors import LfmError, RequestError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
WRITE_BACK = 1 << 23  # bytes that are worth telling the system to write
PARTIAL_MARK = ".lfm-partial"
LINEAGE = "lineage.json"
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def check_free(out: Path, *, overwrite: bool = False) -> list[str]:
    """Return what speaks against writing to `out`: one line a problem, nothing when it is free."""
    try:
        return _objections(out, overwrite)
    except (OSError, ValueError) as error:
        return [f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}"]


def _objections(out: Path, overwrite: bool) -> list[str]:
    if out.name in ("", "..") or out.name.endswith((".partial", ".replaced")) or "\0" in str(out):
        return [f"{out}: cannot be the name of an output; name a folder that does not exist yet"]
    if out.is_symlink():
        return [f"{out}: is a symbolic link; name the folder itself"]
    if out.exists() and not out.is_dir():
        return [f"{out}: is a file; name a folder that does not exist yet"]
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir():
        return [f"{out}: cannot be made, {parent} is a file"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"{out}: cannot be made, {parent} is read-only; choose another place"]
    if not out.exists() or not any(out.iterdir()):
        return []
    if not overwrite:
        return [f"{out}: exists already; choose another folder, or pass --overwrite to replace it"]
    if not (out / LINEAGE).exists():
        return [
            f"{out}: was not made by lfm (it has no {LINEAGE}), so --overwrite does not touch it; remove it yourself"
        ]
    return []


class OutputFolder:
    """A folder that appears complete, under its name, at `commit()`, or not at all.

    `key` says what is being made. Left-overs of a killed run with the same key are kept under `resume`, for the
    engine to go on from; those of another one are wiped. Raises RequestError when the name is taken or in use.
    """

    def __init__(self, out: Path, *, key: str, overwrite: bool = False) -> None:
        self.out = out
        self.partial = out.parent / f"{out.name}.partial"
        self.resume = self.partial / "resume"
        self._replaced = out.parent / f"{out.name}.replaced"
        self._mark = self.partial / PARTIAL_MARK
        self._overwrite = overwrite
        self._key = key.encode()
        self._shards: dict[str, str] = {}
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        self._refuse(*check_free(self.out, overwrite=self._overwrite))
        with _told(self.out):
            self._refuse(*self._strangers())
            self.partial.mkdir(parents=True, exist_ok=True)
            self._descriptors.append(os.open(self._mark, os.O_RDWR | os.O_CREAT, 0o644))
            try:
                self._lock(self._descriptors[0])
                self._restore()
                self._tidy(self._descriptors[0])
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if isinstance(error, OSError) and (error.errno in DISK_ERRORS or self._inside(error.filename)):
            raise _failure(self.out, error) from error

    def _refuse(self, *problems: str) -> None:
        if problems:
            raise RequestError(*problems)

    def _strangers(self) -> list[str]:
        """Return a line for each folder of somebody else's that has one of the names we need."""
        found = [
            folder
            for folder, ours in ((self.partial, PARTIAL_MARK), (self._replaced, LINEAGE))
            if os.path.lexists(folder) and not _is_ours(folder, ours)
        ]
        return [f"{folder}: is in the way and was not made by lfm; remove or rename it" for folder in found]

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{self.out}: another run is writing it at this moment") from None
        if not self._mark.exists() or not os.path.samestat(os.fstat(descriptor), self._mark.stat()):
            raise RequestError(f"{self.out}: another run has just written it")

    def _restore(self) -> None:
        """Bring back what a run moved aside that was killed between the two renames of an overwrite."""
        if self._replaced.exists() and not self.out.exists():
            self._replaced.rename(self.out)
            self._refuse(*check_free(self.out, overwrite=self._overwrite))

    def _tidy(self, mark: int) -> None:
        """Remove left-overs, all but those of a run of the same key that it can go on from."""
        same = os.pread(mark, len(self._key) + 1, 0) == self._key
        if not same:
            os.truncate(mark, 0)  # first of all: what is half removed belongs to no key
        for item in self.partial.iterdir():
            if item.name != PARTIAL_MARK and not (same and item == self.resume):
                _remove(item)
        write_all(mark, memoryview(self._key), 0)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _inside(self, path: object) -> bool:
        return isinstance(path, (str, Path)) and Path(path).is_relative_to(self.partial)

    def write_text(self, name: str, text: str) -> None:
        with _told(self.out):
            (self.partial / name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, files: Mapping[str, Path]) -> None:
        """Copy files in, under the given names."""
        for name, path in files.items():
            with _told(self.out):
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self.partial / name)

    def link(self, files: Mapping[str, Path]) -> None:
        """Let files stand here under the given names too, without taking space; copied where that cannot be.

        Nothing in lfm writes into a file that is there already, so that what is shared stays as it is.
        """
        for name, path in files.items():
            with _told(self.out):
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (self.partial / name).hardlink_to(path.resolve())
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    shutil.copyfile(path, self.partial / name)

    def tensors(self, specs: Mapping[str, Spec], *, shard_bytes: int = SHARD_BYTES) -> TensorWriter:
        """Return a writer for these tensors, split into shards of at most `shard_bytes` each (one tensor at least)."""
        with _told(self.out):
            return TensorWriter(self, specs, shard_bytes)

    def draft(self, name: str) -> int:
        """Create a file that no loader takes, and return its descriptor, which the folder closes."""
        descriptor = os.open(self.partial / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._descriptors.append(descriptor)
        return descriptor

    def name_at_commit(self, draft: str, final: str) -> None:
        """Note that the file `draft` takes the name `final` at commit."""
        self._shards[draft] = final

    def commit(self) -> None:
        """Make the folder appear under its name."""
        with _told(self.out):
            if self.resume.exists():
                shutil.rmtree(self.resume)
            for draft, final in self._shards.items():
                (self.partial / draft).rename(self.partial / final)
            _flush(self.partial)
            if self._replaced.exists():
                _discard(self._replaced)
            self._swap()
            (self.out / PARTIAL_MARK).unlink()  # after the rename: until then it says whose the folder is
            if self._replaced.exists():
                _discard(self._replaced)

    def _swap(self) -> None:
        if self.out.exists():
            self.out.rename(self._replaced)
        try:
            self.partial.rename(self.out)
        except OSError:
            if self._replaced.exists():
                self._replaced.rename(self.out)
            raise


class TensorWriter:
    """Writes tensors of known shapes: in any order, from any thread, each of them front to back."""

    def __init__(self, folder: OutputFolder, specs: Mapping[str, Spec], shard_bytes: int) -> None:
        self.specs = dict(specs)
        self._folder = folder
        self._shards = list(_split(specs, shard_bytes))
        self._hashes = {name: hashlib.sha256() for name in specs}
        self._position = dict.fromkeys(specs, 0)
        self._place: dict[str, tuple[int, int]] = {}
        for number, names in enumerate(self._shards):
            self._create(number, names)

    def _create(self, number: int, names: list[str]) -> None:
        header, offsets = write_header(self.specs, names)
        descriptor = self._folder.draft(self._draft(number).name)
        self._place |= {name: (descriptor, offset) for name, offset in offsets.items()}
        _reserve(descriptor, len(header) + sum(self.specs[name].nbytes for name in names))
        write_all(descriptor, memoryview(header), 0)

    def _draft(self, number: int) -> Path:
        return self._folder.partial / f"shard-{number:05d}.draft"

    def write(self, name: str, part: torch.Tensor) -> None:
        """Append the next elements of a tensor, which must have its declared dtype."""
        if part.dtype != torch_dtype(self.specs[name].dtype):
            raise AssertionError(f"{name}: {part.dtype} does not go into {self.specs[name]}")
        self.append(name, as_bytes(part.reshape(-1)))

    def append(self, name: str, data: memoryview) -> None:
        """Append the bytes of a tensor's next elements."""
        spec = self.specs[name]
        if self._position[name] + len(data) > spec.nbytes:
            raise AssertionError(f"{name}: {len(data)} bytes do not go into what is left of {spec}")
        descriptor, offset = self._place[name]
        with _told(self._folder.out):
            write_all(descriptor, data, offset + self._position[name])
        self._hashes[name].update(data)
        before, self._position[name] = self._position[name], self._position[name] + len(data)
        start = before // WRITE_BACK * WRITE_BACK
        if self._position[name] - start >= WRITE_BACK:
            _write_back(descriptor, offset + start, self._position[name] - start)

    def finish(self, name: str = "model.safetensors") -> str:
        """Check that every byte was written and reads back as declared, name the shards; return the weights' digest."""
        unfinished = [tensor for tensor, spec in self.specs.items() if self._position[tensor] != spec.nbytes]
        if unfinished:
            raise AssertionError(f"tensors not written in full: {unfinished[:5]}")
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            read_back, _ = read_header(self._draft(number))
            if {tensor: str(spec) for tensor, spec in read_back.items()} != {
                key: str(self.specs[key]) for key in names
            }:
                raise AssertionError(f"shard {number} does not read back as written")
            final = _shard_name(name, number, count)
            self._folder.name_at_commit(self._draft(number).name, final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self._folder.write_json(f"{name}.index.json", index)
        return combine(self.specs, self.digests())

    def digests(self) -> dict[str, str]:
        """Return sha256 of each tensor's bytes as written."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}


def _shard_name(name: str, number: int, count: int) -> str:
    stem = name.removesuffix(".safetensors")
    return name if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def _split(specs: Mapping[str, Spec], shard_bytes: int) -> Iterator[list[str]]:
    """Cut the tensors into shards, in order. No tensors at all still make one (empty) file."""
    names: list[str] = []
    filled = 0
    for name, spec in specs.items():
        if names and filled + spec.nbytes > shard_bytes:
            yield _aligned(names, specs)
            names, filled = [], 0
        names.append(name)
        filled += spec.nbytes
    yield _aligned(names, specs)


def _aligned(names: list[str], specs: Mapping[str, Spec]) -> list[str]:
    """Put wide dtypes first, so that every tensor starts at a multiple of its item size: readers map files."""
    return sorted(names, key=lambda name: -ITEM_BITS[specs[name].dtype])


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is known before the work, where the file system can do it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        os.truncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.truncate(descriptor, size)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _write_back(descriptor: int, offset: int, count: int) -> None:
    """Let the system start to bring a range to the disk, so that little is left to wait for at the end; Linux only."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function(descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), 2)  # SYNC_FILE_RANGE_WRITE


def _flush(folder: Path) -> None:
    """Bring everything under a folder to the disk, so that a power cut after the rename finds it there."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_ours(folder: Path, proof: str) -> bool:
    return folder.is_dir() and not folder.is_symlink() and ((folder / proof).exists() or not any(folder.iterdir()))


def _discard(folder: Path) -> None:
    """Remove a folder of ours, the proof that it is ours last."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name == LINEAGE):
        _remove(item)
    folder.rmdir()


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def _failure(out: Path, error: OSError) -> LfmError:
    why = error.strerror or str(error)
    return LfmError(f"{out}: could not be written: {why}; nothing was changed, run the same command again")


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    """Turn what the operating system objects to into a message."""
    try:
        yield
    except OSError as error:
        raise _failure(out, error) from error


def remember_output(folder: Path, digests: Mapping[str, str]) -> None:
    """Spare the next run from hashing what this one has just written."""
    specs: dict[str, Spec] = {}
    for file in sorted(folder.glob("*.safetensors")):
        specs |= read_header(file)[0]
    _digests.remember(_digests.state(specs), digests)
