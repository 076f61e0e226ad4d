"""Model references, and opening what they name.

path/to/folder             a Hugging Face folder, or a folder with one state dict
path/to/file.safetensors   a state dict
org/name[@revision]        the Hugging Face hub, or its cache when offline
base+adapter               either of these with a PEFT LoRA adapter on top
http://host/v1#model       an endpoint: it has an interface, and no weights
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.checkpoint import _digests
from lfm.checkpoint._header import Spec, read_header
from lfm.checkpoint._manifest import MANIFEST, NoWeights
from lfm.checkpoint._weights import Files, MemoryWeights, Weights, as_bytes, raw_bytes, torch_dtype
from lfm.errors import AccessError, RequestError, UnsafeError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What belongs to a model besides config and weights. Code and cards are left behind on purpose.
SIDE_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *(
        "*.model",
        "chat_template*",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling/config.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


class FileWeights(Weights):
    """The tensors of one or more safetensors files, read on demand."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self._specs = dict(specs)
        self._files = Files()
        self._state: str | None = None
        self._noted: dict[str, str] = {}

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        import torch

        spec = self._specs[name]
        if spec.path is None:
            raise AssertionError(f"{name} has no file")
        count = (spec.size if stop is None else stop) - start
        flat = torch.empty(count, dtype=torch_dtype(spec.dtype))
        if count:
            self._files.read_into(spec.path, as_bytes(flat), spec.offset + start * flat.element_size())
        return flat

    def read_into(self, name: str, start: int, out: np.ndarray[Any, Any]) -> None:
        spec = self._specs[name]
        if spec.path is None:
            raise AssertionError(f"{name} has no file")
        self._files.read_into(spec.path, raw_bytes(out), spec.offset + start * out.itemsize)

    def known_digests(self) -> Mapping[str, str]:
        """Return the digests of files that have not changed since they were last read."""
        if not self._noted:
            self._state = _digests.state(self._specs)
            self._noted = dict(_digests.recall(self._state, self._specs) or {})
        return self._noted

    def note_digests(self, digests: Mapping[str, str]) -> None:
        """Keep digests taken from the files as they were at the last call of `known_digests`."""
        self._noted |= digests

    def tensor_digests(self) -> dict[str, str]:
        """Return sha256 of each tensor's bytes; files that have not changed since the last time are not read again."""
        if self._noted and self._state != _digests.state(self._specs):
            self._noted = {}
        known = self.known_digests()
        missing = [name for name in self._specs if name not in known]
        if missing:
            found = self.hash_tensors(missing)
            if _digests.state(self._specs) != self._state:
                raise RequestError(f"{next(iter(self._specs.values())).path}: changed while it was being read")
            known = {**known, **found}
        self._noted = {name: known[name] for name in self._specs}
        _digests.remember(self._state, self._noted)
        return dict(self._noted)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its weights (lazy), its config, and the files that go with them."""

    ref: str
    weights: Weights
    folder: Path
    config: dict[str, Any] | None = None
    patches: tuple[str, ...] = ()
    side_files: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.weights.specs

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype."""
        return self.weights.tensor(name)

    @cached_property
    def digest(self) -> str:
        """Content digest of the weights, whatever the files are called or split into."""
        return self.weights.digest

    @cached_property
    def lineage(self) -> dict[str, Any] | None:
        """What `lineage.json` says, when lfm made this checkpoint."""
        path = self.folder / "lineage.json"
        return read_json(path) if path.is_file() else None

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token text to id, from tokenizer.json; None when there is none."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        tokenizer = read_json(path)
        try:
            vocabulary = (tokenizer.get("model") or {}).get("vocab")
            if isinstance(vocabulary, list):  # unigram models list [token, score] pairs
                vocabulary = {pair[0]: index for index, pair in enumerate(vocabulary)}
            added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
            return {**(vocabulary or {}), **added}
        except (AttributeError, KeyError, TypeError, IndexError):
            raise RequestError(f"{path}: not the tokenizer.json of the tokenizers library") from None


def open_checkpoint(ref: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open what `ref` names; reads headers and configs, no weights.

    `allow_pickle` admits PyTorch pickle files, loaded by torch's weights-only unpickler, into memory.
    Raises RequestError for what cannot be found or read, UnsafeError for what should not be.
    """
    text = str(ref)
    if text.startswith(("http://", "https://")):
        raise AccessError(f"{text}: an endpoint answers requests; this needs the weights, in a folder or on the hub")
    if "+" in text and not _exists(text):
        from lfm.checkpoint._adapter import open_with_adapter

        base, adapter = _split(text)
        return open_with_adapter(open_checkpoint(base, allow_pickle=allow_pickle), _locate(adapter, False), text)
    return _open_path(text, _locate(text, allow_pickle), allow_pickle)


def _exists(ref: str) -> bool:
    try:
        return bool(ref) and Path(ref).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, a user without a home
        return False


def _split(text: str) -> tuple[str, str]:
    """Return base and adapter of "base+adapter"; a "+" may be part of a name on disk, too."""
    cuts = [(text[: plus.start()], text[plus.end() :]) for plus in re.finditer(r"\+", text)][::-1]
    here = [cut for cut in cuts if _exists(cut[1])]
    both = [cut for cut in here if _exists(cut[0])]
    hub = [cut for cut in cuts if HUB_NAME.fullmatch(cut[1])]
    return (both or here or hub or cuts)[0]


def _locate(ref: str, allow_pickle: bool) -> Path:
    if _exists(ref):
        return Path(ref).expanduser()
    if HUB_NAME.fullmatch(ref):
        return _from_hub(ref, allow_pickle)
    raise RequestError(f"{ref!r}: no such folder or file{_near(ref)}")


def _near(ref: str) -> str:
    try:
        path = Path(ref).expanduser()
        return did_you_mean(path.name, sorted(sibling.name for sibling in path.parent.iterdir()))
    except (OSError, ValueError, RuntimeError):
        return ""


def _from_hub(ref: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = ref.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", *SIDE_FILES]
    if allow_pickle:
        patterns += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise RequestError(
            f"{ref}: no such folder here{_near(ref)}, and no such repository on the hub (or no right to see it)"
        ) from None
    except LocalEntryNotFoundError:
        raise RequestError(
            f"{ref}: no such folder here{_near(ref)}, not in the hub's cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RequestError(f"{ref}: no such folder here{_near(ref)}, and the hub says: {_first_line(error)}") from None


def _open_path(ref: str, path: Path, allow_pickle: bool) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    refuse_partial(folder)
    if path.is_file():
        return Checkpoint(ref, _weights([path], allow_pickle=allow_pickle), folder)
    if (path / MANIFEST).is_file():
        return Checkpoint(ref, NoWeights(path, read_json(path / MANIFEST)), path)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise RequestError(f"{ref}: an adapter, not a model; name its base too: base+{ref}")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    refuse_quantised(ref, config)
    side_files = tuple(sorted({file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()}))
    weights = _weights(*_weight_files(ref, path), allow_pickle=allow_pickle)
    return Checkpoint(ref, weights, path, config, side_files=side_files)


def refuse_partial(folder: Path) -> None:
    """Raise RequestError for what a killed run left behind."""
    if folder.absolute().name.endswith(".partial"):
        raise RequestError(f"{folder}: the unfinished output of a run; run the same command again to finish it")


def refuse_quantised(ref: str, config: Mapping[str, Any] | None) -> None:
    """Raise RequestError for weights that are codes and not numbers."""
    settings = (config or {}).get("quantization_config")
    if isinstance(settings, dict):
        kind = settings.get("quant_method", "unknown method")
        raise RequestError(
            f"{ref}: quantised weights ({kind}) cannot be computed with; use the original checkpoint, "
            "or load it in transformers, call `model.dequantize()` and save that"
        )


def _weight_files(ref: str, folder: Path) -> tuple[list[Path], Path | None]:
    """Return the files that hold a folder's weights, and their index; in doubt those that transformers takes."""
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model"):
        for suffix in (".safetensors", ".bin"):
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"], None
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return _indexed(index), index
    found = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", *PICKLES) and file.is_file())
    found = [file for file in found if file.suffix == ".safetensors"] or found
    if len(found) == 1:
        return found, None
    held = ", ".join(file.name for file in found[:5]) or ", ".join(sorted(file.name for file in folder.iterdir())[:5])
    raise RequestError(
        f"{ref}: which weights? A model folder has model.safetensors, or model.safetensors.index.json with its shards; "
        f"this one has {held or 'nothing in it'}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UnsafeError(f"{index}: needs a weight_map from tensor names to file names")
    return weight_map


def _indexed(index: Path) -> list[Path]:
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    problems = []
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if not name or "\0" in name or Path(name).name != name or name == "..":
            problems.append(f"{index}: points outside its folder: {name!r}")
        elif not name.endswith(suffix):
            problems.append(f"{index}: {name!r} is a file of another kind")
        elif not (index.parent / name).is_file():
            problems.append(f"{index}: the shard {name} is missing; download it again")
    if problems:
        raise UnsafeError(*problems)
    return [index.parent / name for name in names]


def _weights(files: list[Path], index: Path | None = None, *, allow_pickle: bool) -> Weights:
    if files[0].suffix in PICKLES:
        return _unpickle(files, index, allow_pickle)
    specs: dict[str, Spec] = {}
    problems: list[str] = []
    for file in files:
        try:
            found, _ = read_header(file)
        except UnsafeError as error:
            problems += error.problems
            continue
        problems += [f"{file}: tensor {name!r} stands in {specs[name].path} too" for name in found if name in specs]
        specs |= found
    if index is not None and not problems:
        problems += _index_problems(index, {name: spec.path for name, spec in specs.items()})
    if problems:
        raise UnsafeError(*problems)
    return FileWeights(specs)


def _index_problems(index: Path, found: Mapping[str, Path | None]) -> list[str]:
    listed = _weight_map(index)
    held = {name: path.name for name, path in found.items() if path is not None}
    return [
        f"{index}: tensor {name!r} is listed in {listed.get(name, 'nowhere')} and found in {held.get(name, 'nowhere')}"
        for name in sorted({*listed, *held})
        if listed.get(name) != held.get(name)
    ]


def _unpickle(files: list[Path], index: Path | None, allow_pickle: bool) -> Weights:
    if not allow_pickle:
        raise UnsafeError(
            f"{files[0]}: a pickle, which can run code when it is loaded; use safetensors, "
            "or pass --allow-pickle to load its tensors alone (torch's weights-only mode)"
        )
    import torch

    tensors: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    paths: dict[str, Path] = {}
    for file in files:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken or hostile pickle provokes
            raise UnsafeError(f"{file}: refused by the weights-only unpickler: {_first_line(error)}") from None
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, dict) or not all(_named_tensor(name, value) for name, value in loaded.items()):
            raise UnsafeError(f"{file}: holds more than a state dict (names to tensors); save the state dict alone")
        problems += [f"{file}: tensor {name!r} stands in {paths[name]} too" for name in loaded if name in paths]
        tensors |= loaded
        paths |= dict.fromkeys(loaded, file)
    if index is not None:
        problems += _index_problems(index, paths)
    if problems:
        raise UnsafeError(*problems)
    return MemoryWeights(tensors)


def _named_tensor(name: object, value: object) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise RequestError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value
