"""Weights by name, wherever they are: in files, under a stack of patches, in a live module."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from lfm.checkpoint._header import Spec
from lfm.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

CHUNK_BYTES = 1 << 20
RAW = {  # numpy's names for the bytes of safetensors' dtypes; where it has none, integers as wide
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "uint16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "uint8",
    "F8_E5M2": "uint8",
    "F8_E8M0": "uint8",
    "F8_E4M3FNUZ": "uint8",
    "F8_E5M2FNUZ": "uint8",
}


class Weights(ABC):
    """Named tensors that are read on demand, whole or in part; opening one reads no weights."""

    @property
    @abstractmethod
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor, in the order in which reading is cheapest."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements [start, stop) of a tensor, flat, in its stored dtype, as a copy of the caller's own."""

    def read_into(self, name: str, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill a flat array of the tensor's raw type (see `RAW`) with its elements from `start` on; without torch."""
        raw_bytes(out)[:] = as_bytes(self.read(name, start, start + len(out)))

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """Return elements [start, stop) as numpy sees their bytes: bfloat16 as uint16. Needs no torch."""
        import numpy as np

        spec = self.specs[name]
        if spec.dtype not in RAW:
            raise RequestError(f"tensor {name!r}: {spec.dtype} cannot be read; convert the checkpoint first")
        out: np.ndarray[Any, Any] = np.empty((spec.size if stop is None else stop) - start, dtype=RAW[spec.dtype])
        if len(out):
            self.read_into(name, start, out)
        return out

    def known_digests(self) -> Mapping[str, str]:
        """Return those of `tensor_digests` that are known without reading anything."""
        return {}

    def note_digests(self, digests: Mapping[str, str]) -> None:
        """Keep digests that somebody took while reading tensors; they are lost where none are kept."""
        del digests

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype and shape."""
        return self.read(name).reshape(self.specs[name].shape)

    def chunks(self, name: str, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (start, flat part) of a tensor, at most `elements` long each."""
        size = self.specs[name].size
        for start in range(0, size, elements):
            yield start, self.read(name, start, min(start + elements, size))

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes: equal for equal weights, however they are split into files."""
        return combine(self.specs, self.tensor_digests())

    def tensor_digests(self) -> dict[str, str]:
        """Return sha256 of each tensor's bytes; reads everything."""
        return self.hash_tensors(self.specs)

    def hash_tensors(self, names: Iterable[str]) -> dict[str, str]:
        """Return sha256 of the bytes of these tensors, which are read."""
        names = list(names)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(names, pool.map(self._hash, names), strict=True))

    def _hash(self, name: str) -> str:
        digest = hashlib.sha256()
        size = self.specs[name].size
        for start in range(0, size, CHUNK_BYTES):
            digest.update(raw_bytes(self.read_raw(name, start, min(start + CHUNK_BYTES, size))))
        return digest.hexdigest()


def combine(specs: Mapping[str, Spec], digests: Mapping[str, str]) -> str:
    """Return the digest of a whole set of tensors from those of its members."""
    total = hashlib.sha256()
    for name in sorted(specs):
        total.update(json.dumps([name, specs[name].dtype, specs[name].shape, digests[name]]).encode() + b"\n")
    return total.hexdigest()


class MemoryWeights(Weights):
    """Tensors that are in memory already, such as a module's state dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._specs = {name: Spec(dtype_name(t.dtype), tuple(t.shape)) for name, t in self._tensors.items()}

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._tensors[name].reshape(-1)[start:stop].cpu().clone()


def as_bytes(flat: torch.Tensor) -> memoryview:
    """Return the bytes of a flat CPU tensor, without a copy where it is contiguous."""
    import torch

    array: Any = flat.detach().contiguous().view(torch.uint8).numpy()
    return memoryview(array)


def raw_bytes(values: np.ndarray[Any, Any]) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    view: Any = values.view("uint8") if values.ndim else values.reshape(1).view("uint8")
    return memoryview(view)


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for safetensors' name of it."""
    import torch

    dtypes = _dtypes()
    if name not in dtypes:
        raise RequestError(f"torch {torch.__version__} has no dtype for {name} tensors; convert the checkpoint first")
    return dtypes[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a torch dtype."""
    for name, value in _dtypes().items():
        if value == dtype:
            return name
    raise RequestError(f"safetensors has no name for {dtype} tensors; convert them first")


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    names = {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "C64": "complex64",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "BOOL": "bool",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }
    return {name: getattr(torch, attribute) for name, attribute in names.items() if hasattr(torch, attribute)}


class Files:
    """Open files by path, read at any place from any thread; nothing is mapped, so nothing stays resident."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, path: Path, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `path` at `offset`. Raises RequestError when it cannot be read, or ends first."""
        try:
            self._read_into(path, buffer, offset)
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}") from None

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def _read_into(self, path: Path, buffer: memoryview, offset: int) -> None:
        descriptor = self._descriptor(path)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise RequestError(f"{path}: ended at byte {offset + done:,} while it was being read: it was cut off")
            done += count

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
