"""Where a checkpoint comes from: `lineage.json`, and the model card that says the same to people and to the hub."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lfm.checkpoint import Checkpoint, read_json
from lfm.method import Card

PACKAGES = ("learn-from-model", "torch", "transformers", "safetensors", "accelerate", "peft", "numpy")
RELATION = {"reuse": "merge"}  # the hub knows finetune, adapter, merge and quantized
PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
}
# From free to restrictive: a model made of several takes the last one that applies.
LICENSES = (
    "mit",
    "bsd-3-clause",
    "apache-2.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "gpl-3.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
)


def environment() -> dict[str, str]:
    """Return the versions that decide what comes out."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parent(role: str, label: str, checkpoint: Checkpoint | None, digest: str) -> dict[str, Any]:
    """Return the lineage entry of one input, with its own lineage inside where it has one."""
    entry: dict[str, Any] = {"role": role, "name": label, "digest": digest}
    if checkpoint is not None:
        entry["ref"] = checkpoint.ref
        if checkpoint.patches:
            entry["patches"] = list(checkpoint.patches)
        if checkpoint.lineage:
            kept = ("verb", "method", "parameters", "seed", "parents")
            entry["made_by"] = {key: checkpoint.lineage[key] for key in kept if key in checkpoint.lineage}
    return entry


def model_card(
    name: str, card: Card, lineage: Mapping[str, Any], parents: list[Checkpoint], step: Mapping[str, Any]
) -> str:
    """Return README.md: metadata that the hub reads, then what was done, in words, numbers and a recipe."""
    metadata = {
        "base_model": list(dict.fromkeys(public_name(checkpoint.ref) for checkpoint in parents)) or None,
        "base_model_relation": RELATION.get(card.verb.paradigm, "finetune") if parents else None,
        "library_name": "transformers" if any(checkpoint.config for checkpoint in parents) else None,
        "pipeline_tag": _pipeline(parents),
        "license": _license(parents),
        "tags": ["lfm", card.verb.paradigm, card.name],
    }
    header = yaml.safe_dump(
        {key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True
    )
    body = yaml.safe_dump({name: dict(step)}, sort_keys=False, allow_unicode=True, default_flow_style=None)
    sections = [
        f"---\n{header}---\n\n# {name}\n\n{card.summary}",
        f"Made with `lfm {card.verb.name} {card.name}`" + (f" ([paper]({card.paper}))." if card.paper else "."),
        _table(
            ("role", "model", "digest"),
            [(p["role"], public_name(p["name"]), p["digest"][:16]) for p in lineage["parents"]],
        ),
        f"```yaml\n{body}```",
        *(f"- {note}" for note in lineage["notes"]),
        _table(("measure", "value"), [(key, f"{value:.4g}") for key, value in lineage["metrics"].items()]),
        _license_note(parents),
        f"Weights: sha256 `{lineage['output']['digest']}`. Everything else is in `lineage.json`.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def public_name(ref: str) -> str:
    """Return a model's name as others may see it: hub names as they are, of local paths the last part."""
    return "+".join(Path(part).name if Path(part).exists() else part for part in ref.split("+"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pipeline(parents: list[Checkpoint]) -> str | None:
    architectures = [str(name) for parent in parents for name in (parent.config or {}).get("architectures") or ()]
    return next((tag for name in architectures for ending, tag in PIPELINES.items() if name.endswith(ending)), None)


def _licenses(parents: list[Checkpoint]) -> list[str | None]:
    return [card_metadata(checkpoint.folder).get("license") for checkpoint in parents]


def _license(parents: list[Checkpoint]) -> str | None:
    found = _licenses(parents)
    if not found or not all(license in LICENSES for license in found):
        return None
    return max((str(license) for license in found), key=LICENSES.index)


def _license_note(parents: list[Checkpoint]) -> str:
    found = sorted({license or "unknown" for license in _licenses(parents)})
    if not parents or _license(parents):
        return ""
    return f"License: not derived, since those of the models it was made from are {', '.join(found)}."


def card_metadata(folder: Path) -> dict[str, Any]:
    """Return the YAML header of a folder's README.md; an empty dict where there is none that can be read."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """Return a folder's lineage, or None where there is none."""
    path = folder / "lineage.json"
    return read_json(path) if path.is_file() else None
