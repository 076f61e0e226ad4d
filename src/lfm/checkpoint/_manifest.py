"""Folders that hold a model which is more than plain weights: what it is made of stands in `lfm.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.checkpoint._weights import Weights
from lfm.errors import AccessError

if TYPE_CHECKING:
    import torch

    from lfm.checkpoint._header import Spec

MANIFEST = "lfm.json"
STATE = "state.safetensors"  # numbers of its own that such a model has


def manifest_digest(manifest: Mapping[str, Any], state: bytes) -> str:
    """Return sha256 of all that decides what the model answers, and not of where its members lie."""
    members = [{key: value for key, value in member.items() if key != "ref"} for member in manifest.get("members", ())]
    text = json.dumps({**manifest, "members": members}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode() + b"\0" + hashlib.sha256(state).digest()).hexdigest()


class NoWeights(Weights):
    """Stands where the weights of such a folder would be: it has a digest, and no tensors."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder = folder
        self._manifest = manifest

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        made = f"{self._manifest.get('verb')} {self._manifest.get('method')}"
        raise AccessError(f"{self._folder}: made by {made}, it has no weights of its own")

    @property
    def digest(self) -> str:
        state = self._folder / STATE
        return manifest_digest(self._manifest, state.read_bytes() if state.is_file() else b"")

    def tensor_digests(self) -> dict[str, str]:
        return {}
