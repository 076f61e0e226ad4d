"""Run FusionBench on the models of inputs.py and store what it made. Only for making the golden numbers anew.

    python -m venv ../fusionbench && ../fusionbench/bin/pip install fusion-bench==0.2.33 torch==2.13.0
    ../fusionbench/bin/python -m tests.golden.fusionbench.make

Runs in the folder of the repository, in an environment of its own, on one CPU thread.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections import OrderedDict
from typing import Any

import torch
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.tall_mask import utils as tall
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.wudi.wudi import wudi_merging
from safetensors.torch import save_file
from tests.golden.fusionbench import inputs

Tensors = dict[str, torch.Tensor]


def main() -> None:
    torch.set_num_threads(1)
    mixed, even = task_vectors("mixed"), task_vectors("even")
    made = {
        "iso_c": iso_c(mixed, accelerator="cpu"),
        "iso_c of 2": iso_c(mixed[:2], accelerator="cpu"),
        "iso_cts 0.8": iso_cts(mixed, common_space_fraction=0.8, accelerator="cpu"),
        "iso_cts 0.3": iso_cts(mixed, common_space_fraction=0.3, accelerator="cpu"),
        "tsv_m": TSVM_utils.compute_and_sum_svd_mem_reduction(mixed, accelerator="cpu"),
        "tsv_m of 2": TSVM_utils.compute_and_sum_svd_mem_reduction(mixed[:2], accelerator="cpu"),
        "wudi": wudi_merging(mixed, accelerator="cpu"),
        "wudi of 2": wudi_merging(mixed[:2], accelerator="cpu", iter_num=40),
        **consensus(),
        **emr(even),
    }
    flat = {f"{case}/{name}": value.detach().clone() for case, merged in made.items() for name, value in merged.items()}
    version = importlib.metadata.version("fusion-bench")
    save_file(flat, inputs.RESULTS, metadata={"made by": f"fusion-bench {version}, torch {torch.__version__}"})


def task_vectors(name: str) -> list[Tensors]:
    base, sources = inputs.models(name)
    return [{key: torch.from_numpy(source[key] - base[key]) for key in base} for source in sources]


def consensus() -> dict[str, Tensors]:
    """Consensus task arithmetic by masks of one lambda, and the models rebuilt from the masks, at scale 1."""
    base, sources = inputs.models("mixed")
    pretrained = OrderedDict((name, torch.from_numpy(value)) for name, value in base.items())
    flat_base = flat(pretrained)
    flat_sources = torch.stack([flat({name: torch.from_numpy(source[name]) for name in base}) for source in sources])
    changes = flat_sources - flat_base
    masks = tall.generate_task_masks(changes, flat_sources, flat_base, tall_mask_lambda=0.4)
    by_name = {index: shaped(mask.float(), pretrained) for index, mask in enumerate(masks)}
    tall.load_tall_mask = lambda remove_keys, ptm_check, config: by_name  # their own reads them from a file
    merged = {}
    for least in (1, 2, 3):
        kept = tall.construct_consensus_mask(pretrained, least, config=None)
        merged[f"consensus {least}"] = shaped(changes.sum(0) * kept, pretrained)
    for task, mask in enumerate(masks):
        merged[f"consensus task {task}"] = shaped(changes.sum(0) * mask, pretrained)
    return merged


def flat(model: Any) -> torch.Tensor:
    return torch.cat([model[name].reshape(-1) for name in sorted(model)])


def shaped(vector: torch.Tensor, like: Any) -> Any:
    """As their function does, which writes into the tensors that it is given."""
    return tall.vector_to_state_dict(vector, copy.deepcopy(like))


def emr(changes: list[Tensors]) -> dict[str, Tensors]:
    unified, masks, rescalers = emr_merge(changes)
    merged = {"emr": unified}
    for task, rescaler in enumerate(rescalers):
        merged[f"emr task {task}"] = {name: unified[name] * masks[name][task] * rescaler for name in unified}
    return merged


if __name__ == "__main__":
    main()
