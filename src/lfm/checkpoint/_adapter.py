"""PEFT LoRA adapters, read and written as low-rank deltas (format: PEFT's developer guide, "Checkpoint format")."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lfm.checkpoint._delta import Change, Delta, LowRank, Patched, Replace
from lfm.checkpoint._header import read_header
from lfm.checkpoint._open import Checkpoint, FileWeights, read_json, refuse_partial
from lfm.checkpoint._weights import MemoryWeights, Weights
from lfm.checkpoint._write import OutputFolder
from lfm.errors import RequestError

PREFIX = "base_model.model."
FACTORS = re.compile(r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<factor>[AB])(\.weight)?")
TABLE = re.compile(r"(.*\.)?(\w*embed\w*|wte|wpe|shared)\.weight")
TOKEN_TABLE = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight")

# What adapter_config.json may say without changing what the factors mean. Anything else that is set is refused by name.
HONOURED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias"),
    *("modules_to_save", "ensure_weight_tying", "init_lora_weights", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
}
WITH_OUTPUT_LAYER = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
# Starting values that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) train against a changed base.
INNOCENT_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def open_with_adapter(base: Checkpoint, folder: Path, ref: str) -> Checkpoint:
    """Return `base` with the LoRA adapter in `folder` on top, still lazy."""
    delta = read_adapter(folder, base.weights)
    return replace(base, ref=ref, weights=Patched(base.weights, [delta]), patches=(*base.patches, delta.id))


def read_adapter(folder: Path, base: Weights) -> Delta:
    """Return a LoRA adapter as a delta on `base`. Raises RequestError, naming each thing that cannot be honoured."""
    refuse_partial(folder)
    if not (folder / "adapter_config.json").is_file():
        raise RequestError(f"{folder}: not an adapter: it has no adapter_config.json")
    config = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    problems = [f"{folder}: {line}" for line in _config_problems(config)]
    if not path.is_file():
        problems.append(f"{folder}: adapter_model.safetensors is missing (pickled adapters are not read)")
    if problems:
        raise RequestError(*problems)
    reader = _Reader(FileWeights(read_header(path)[0]), base, config)
    changes = reader.changes()
    if reader.problems:
        problems = [f"{folder}: {line}" for line in dict.fromkeys(reader.problems)]
        raise RequestError(f"{folder}: this adapter cannot be put on this base:", *problems[:8])
    provenance = {"adapter": folder.name, "base_model_name_or_path": config.get("base_model_name_or_path")}
    delta = Delta(changes, None, provenance)
    problems = delta.problems(base)
    if problems:
        raise RequestError(f"{folder}: this adapter does not belong to this base:", *problems[:8])
    return delta


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"a {config.get('peft_type')} adapter; only LORA can be added to weights without PEFT"]
    problems = [
        f"{name} is not supported; merge the adapter with PEFT"
        for name, value in config.items()
        if value and name not in HONOURED
    ]
    if config.get("init_lora_weights") not in INNOCENT_STARTS:
        problems.append(
            f"init_lora_weights={config['init_lora_weights']!r} trains against a changed base; convert the adapter "
            "with PEFT (path_initial_model_for_weight_conversion) or merge it there"
        )
    if not _positive(config.get("lora_alpha")):
        problems.append(f"lora_alpha must be a positive number, got {config.get('lora_alpha')!r}")
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(_compiles(key) and _positive(pattern[key]) for key in pattern):
        problems.append(f"alpha_pattern must map module names to positive numbers, got {str(pattern)[:80]}")
    return problems


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass
class _Reader:
    """Reads an adapter's tensors as changes of a base, collecting what is wrong with them."""

    saved: Weights
    base: Weights
    config: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def changes(self) -> dict[str, Change]:
        changes: dict[str, Change] = {}
        factors: dict[str, dict[str, str]] = {}
        others = []
        for key in self.saved.specs:
            if match := FACTORS.fullmatch(key.removeprefix(PREFIX)):
                factors.setdefault(match["module"], {})[(match["table"] or "") + match["factor"]] = key
            else:
                others.append(key)
        for module, pair in factors.items():
            if name := self._base_name(f"{module}.weight"):
                self._put(changes, name, self._low_rank(module, name, pair))
        for key in others:
            if self._twin_of_table(key):
                continue
            if name := self._base_name(key.removeprefix(PREFIX).replace(".base_layer.", ".")):
                self._put(changes, name, self._replacement(key, name))
        return changes

    def _put(self, changes: dict[str, Change], name: str, change: Change | None) -> None:
        if change is not None and name in changes:
            self.problems.append(f"two parts of it change {name!r}")
        elif change is not None:
            changes[name] = change

    def _base_name(self, name: str) -> str | None:
        """Return the base's name for a tensor; a head or a wrapper may have put a prefix on either side."""
        specs = self.base.specs
        near = [known for known in specs if known.endswith(f".{name}") or name.endswith(f".{known}")]
        if name in specs or len(near) == 1:
            return name if name in specs else near[0]
        self.problems.append(f"it changes {name!r}, and the base has no tensor of that name")
        return None

    def _replacement(self, key: str, name: str) -> Change | None:
        values = self.saved.tensor(key)
        if key.endswith(".base_layer.weight"):  # PEFT's copy of a token table under LoRA
            spec = self.base.specs[name]
            if spec.shape != values.shape or not bool((self.base.tensor(name).to(values) == values).all()):
                self.problems.append(f"it was trained on another {name!r} (a copy came with it)")
            return None
        if TOKEN_TABLE.fullmatch(name) and self._tied(name):
            self.problems.append(
                f"it replaces {name!r}, which is the base's output layer too, and PEFT would untie the two; "
                "train it with ensure_weight_tying=True"
            )
        return Replace(values)

    def _twin_of_table(self, key: str) -> bool:
        """Whether this is the output layer that PEFT saves beside its token table when it keeps the two tied."""
        if not self.config.get("ensure_weight_tying") or key.removeprefix(PREFIX) in self.base.specs:
            return False
        tables = [other for other in self.saved.specs if TOKEN_TABLE.fullmatch(other.removeprefix(PREFIX))]
        specs = self.saved.specs
        return any(
            str(specs[key]) == str(specs[table]) and bool((self.saved.tensor(key) == self.saved.tensor(table)).all())
            for table in tables
        )

    def _tied(self, table: str) -> bool:
        """Whether a language model's token table stands for its output layer: no other tensor could be that."""
        if self.config.get("ensure_weight_tying") or self.config.get("task_type") not in WITH_OUTPUT_LAYER:
            return False
        shape = self.base.specs[table].shape
        return not any(spec.shape == shape for name, spec in self.base.specs.items() if name != table)

    def _low_rank(self, module: str, name: str, pair: Mapping[str, str]) -> Change | None:
        table = "embedding_A" in pair or "embedding_B" in pair
        roles = ("embedding_A", "embedding_B") if table else ("A", "B")
        missing = [role for role in roles if role not in pair]
        if missing or len(pair) > 2:
            self.problems.append(f"{module} has no lora_{missing[0] if missing else roles[0]} of its own: incomplete")
            return None
        a, b = (self.saved.tensor(pair[role]) for role in roles)
        if not a.ndim == b.ndim == 2 or len(a) != b.shape[1] or not len(a):
            self.problems.append(
                f"{module}: factors of {list(b.shape)} and {list(a.shape)}; only matrices are supported"
            )
            return None
        alpha = _for_module(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if self.config.get("use_rslora") else len(a))
        u, v = b.float() * scale, a.float()
        # PEFT keeps a token table's update as (B A)^T, and a Conv1D's weight (GPT-2) as (in, out).
        turned = table or self._turned(name, (len(u), v.shape[1]))
        return LowRank(v.T.contiguous(), u.T.contiguous()) if turned else LowRank(u, v)

    def _turned(self, name: str, shape: tuple[int, int]) -> bool:
        """Whether the base keeps this weight as (in, out). PEFT's flag is that of one module only: shapes tell more."""
        if shape[0] != shape[1]:
            return self.base.specs[name].shape == shape[::-1]
        if _bias(name) in self.base.specs and len(self._layouts) == 1:
            return next(iter(self._layouts))
        return bool(self.config.get("fan_in_fan_out"))

    @cached_property
    def _layouts(self) -> set[bool]:
        """Whether the base's weights are (in, out), as far as those tell that are not square and have a bias."""
        layouts = set()
        for name, spec in self.base.specs.items():
            bias = self.base.specs.get(_bias(name))
            if bias is not None and len(spec.shape) == 2 and spec.shape[0] != spec.shape[1]:
                layouts.add(bias.shape == spec.shape[1:])
        return layouts


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _for_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Look a module up in PEFT's alpha_pattern, whose keys are names or regular expressions of their ends."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def save_adapter(
    delta: Delta, out: Path, *, base_ref: str, transposed: bool = False, task_type: str = "CAUSAL_LM"
) -> None:
    """Write a low-rank delta as a PEFT LoRA adapter. Raises RequestError for changes that are not low-rank.

    `transposed` says that the changed weights are stored (in, out), as GPT-2's Conv1D does.
    """
    other = [
        name
        for name, change in delta.changes.items()
        if not isinstance(change, LowRank) or not name.endswith(".weight")
    ]
    if other or not delta.changes:
        raise RequestError(
            f"a LoRA adapter holds low-rank changes of weight matrices only; not so: {other[:5] or 'no changes'}"
        )
    tables = [name for name in delta.changes if TABLE.fullmatch(name)]
    if tables:
        raise RequestError(f"embeddings have a LoRA form of their own, which is not written: {tables[:5]}")
    pairs = {
        name.removesuffix(".weight"): change for name, change in delta.changes.items() if isinstance(change, LowRank)
    }
    tensors, ranks = {}, {}
    for module, change in pairs.items():
        u, v = (change.v.T, change.u.T) if transposed else (change.u, change.v)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = v.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = u.contiguous()
        ranks[module] = len(v)
    flat = MemoryWeights(tensors)
    with OutputFolder(out, key=delta.id) as folder:
        writer = folder.tensors(flat.specs)
        for name in flat.specs:
            writer.write(name, flat.read(name))
        writer.finish("adapter_model.safetensors")
        rank = max(ranks.values())
        # Patterns match the ends of names, and the first one counts: the longest name goes first.
        several = len(set(ranks.values())) > 1
        others = {module: ranks[module] for module in sorted(ranks, key=len, reverse=True) if several}
        folder.write_json(
            "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": task_type,
                "base_model_name_or_path": base_ref,
                "r": rank,
                "lora_alpha": rank,  # alpha = rank: the factors are stored at full strength
                "rank_pattern": others,
                "alpha_pattern": others,
                "target_modules": sorted(pairs),
                "fan_in_fan_out": transposed,
                "lora_dropout": 0.0,
                "bias": "none",
                "inference_mode": True,
            },
        )
        folder.commit()
