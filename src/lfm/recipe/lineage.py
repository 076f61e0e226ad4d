"""Where a checkpoint comes from: `lineage.json`, and the model card that says the same to people and to the hub."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lfm.checkpoint import Checkpoint, read_json
from lfm.method import Card

LINEAGE = "lineage.json"
HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
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
    return found | {package: version for package in PACKAGES if (version := _version(package))}


@cache
def _version(package: str) -> str | None:
    """Return the version that this process has: looking it up takes as long as a small merge."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parent(role: str, label: str, checkpoint: Checkpoint | None, digest: str) -> dict[str, Any]:
    """Return the lineage entry of one input, and how it was made where lfm made it."""
    entry: dict[str, Any] = {"role": role, "name": label, "digest": digest}
    if checkpoint is not None:
        entry["ref"] = checkpoint.ref
        if checkpoint.patches:
            entry["patches"] = list(checkpoint.patches)
        if checkpoint.lineage:
            entry["made_by"] = _how(checkpoint.lineage)
    return entry


def ancestors(parents: Iterable[Checkpoint]) -> dict[str, Any]:
    """Return, by digest, how the parents' parents were made, and theirs: once each, however the paths cross."""
    found: dict[str, Any] = {}
    for checkpoint in parents:
        lineage = checkpoint.lineage or {}
        found |= lineage.get("ancestors", {})
        found |= {parent["digest"]: parent["made_by"] for parent in lineage.get("parents", ()) if "made_by" in parent}
    return found


def _how(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a lineage says of its own step, and of its parents what they are."""
    kept = ("verb", "method", "parameters", "inputs", "seed")
    parents = [{key: entry[key] for key in entry if key != "made_by"} for entry in lineage.get("parents", ())]
    return {**{key: lineage[key] for key in kept if key in lineage}, "parents": parents}


def model_card(
    name: str, card: Card, lineage: Mapping[str, Any], parents: list[Checkpoint], step: Mapping[str, Any]
) -> str:
    """Return README.md: metadata that the hub reads, then what was done, in words, numbers and a recipe."""
    metadata = {
        "base_model": list(dict.fromkeys(name for checkpoint in parents for name in hub_names(checkpoint.ref))) or None,
        "base_model_relation": RELATION.get(card.verb.paradigm, "finetune") if parents else None,
        "datasets": _hub_datasets(lineage),
        "library_name": "transformers" if any(checkpoint.config for checkpoint in parents) else None,
        "pipeline_tag": _pipeline(parents),
        "license": _license(parents),
        "tags": ["lfm", card.verb.paradigm, card.name],
    }
    header = yaml.safe_dump(
        {key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True
    )
    body = yaml.safe_dump({name: _public(dict(step))}, sort_keys=False, allow_unicode=True, default_flow_style=None)
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


def hub_names(ref: str) -> list[str]:
    """Return what the hub may take for the models of a reference: hub names without revision, folders by their name."""
    names = [public_name(part).partition("@")[0] for part in ([ref] if _is_there(ref) else ref.split("+"))]
    return [name for name in names if HUB_ID.fullmatch(name)]


def public_name(ref: str) -> str:
    """Return a model's name as others may see it: hub names as they are, of local paths the last part."""
    parts = [ref] if _is_there(ref) else ref.split("+")
    return "+".join(Path(part).expanduser().resolve().name if _is_there(part) else part for part in parts)


def _is_there(ref: str) -> bool:
    try:
        return Path(ref).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, a user without a home
        return False


def _public(value: Any) -> Any:
    """Return what a recipe holds with local paths cut down to their last part."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value


def _hub_datasets(lineage: Mapping[str, Any]) -> list[str]:
    """Return the data sets of the hub that were used."""
    specs = [value for value in lineage["inputs"].values() if isinstance(value, dict)]
    paths = [str(spec.get("path", "")) for spec in specs]
    return list(dict.fromkeys(path.split(":")[1] for path in paths if path.startswith("hf:")))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *escaped))


def _pipeline(parents: list[Checkpoint]) -> str | None:
    architectures = [str(name) for parent in parents for name in (parent.config or {}).get("architectures") or ()]
    return next((tag for name in architectures for ending, tag in PIPELINES.items() if name.endswith(ending)), None)


def _licenses(parents: list[Checkpoint]) -> list[str | None]:
    found = [card_metadata(checkpoint.folder).get("license") for checkpoint in parents]
    return [str(license) if license else None for license in found]


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
    path = folder / LINEAGE
    return read_json(path) if path.is_file() else None
