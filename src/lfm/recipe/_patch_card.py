"""What is written beside the weights where patches were put on or taken off: lineage and model card."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from lfm import __version__
from lfm.checkpoint import Checkpoint, OutputFolder
from lfm.recipe.lineage import LINEAGE, ancestors, environment, hub_names, parent, public_name

WORDS = {"apply": "Patches applied", "revert": "Patches reverted"}


def write_provenance(
    what: str, model: Checkpoint, base: Checkpoint, ids: Sequence[str], digest: str, folder: OutputFolder
) -> None:
    """Write lineage and card of what `lfm edit apply` and `lfm edit revert` make."""
    parents = [parent("model", model.ref, model, model.digest)]
    if base.digest != model.digest:
        parents.append(parent("base", base.ref, base, base.digest))
    lineage = {
        "lfm": __version__,
        "key": f"edit {what} {digest}",
        "verb": "edit",
        "method": what,
        "parameters": {"patches": list(ids)},
        "inputs": {},
        "seed": 0,
        "parents": parents,
        "ancestors": ancestors([model, base]),
        "output": {"digest": digest},
        "change": {},
        "metrics": {},
        "notes": [],
        "seconds": 0.0,
        "environment": environment(),
    }
    folder.write_json(LINEAGE, lineage)
    header = {
        "base_model": hub_names(base.ref),
        "base_model_relation": "finetune",
        "tags": ["lfm", "edit"],
    }
    told = yaml.safe_dump({key: value for key, value in header.items() if value}, sort_keys=False)
    lines = "\n".join(f"- `{id_[:12]}`" for id_ in ids)
    folder.write_text(
        "README.md",
        f"---\n{told}---\n\n# {folder.out.name}\n\n{WORDS[what]} by `lfm edit {what}`, from "
        f"{public_name(model.ref)}:\n\n{lines}\n\nWeights: sha256 `{digest}`. `lfm edit list` tells what lies on "
        f"{public_name(base.ref)} now.\n",
    )
