"""What a bug report should say about where lfm runs."""

from __future__ import annotations

import importlib.util
import os

from lfm.checkpoint._digests import cache_folder
from lfm.recipe.lineage import environment as versions

EXTRAS = ("PIL", "sklearn", "datasets", "lm_eval", "trl", "cma", "faiss", "ray")


def environment() -> dict[str, str]:
    """Return versions, devices, folders and extras, as text by name."""
    import torch
    from huggingface_hub import constants

    devices = [
        "cpu",
        *(f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())),
    ]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return {
        **versions(),
        "cores": str(len(os.sched_getaffinity(0))),
        "devices": ", ".join(devices),
        "hub cache": str(constants.HF_HUB_CACHE),
        "hub offline": str(constants.HF_HUB_OFFLINE).lower(),
        "lfm cache": str(cache_folder()),
        "extras": ", ".join(name for name in EXTRAS if importlib.util.find_spec(name)) or "none",
    }
