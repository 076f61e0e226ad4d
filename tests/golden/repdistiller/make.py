"""Writes results.json: the losses of RepDistiller and mdistiller on numbers made from a seed.

python tests/golden/repdistiller/make.py REPDISTILLER MDISTILLER, the folders of their code:
github.com/HobbitLong/RepDistiller at b84f547, github.com/megvii-research/mdistiller at a08d46f.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch


def inputs() -> dict[str, torch.Tensor]:
    """Return logits, labels, features and hidden states of a teacher and a student, and exponents of a contrast."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.tensor(generator.standard_normal(shape)).float()

    found = {"teacher": normal(6, 7) * 4, "student": normal(6, 7) * 2}
    found |= {"teacher_features": normal(6, 12), "student_features": normal(6, 5)}
    found |= {"teacher_maps": normal(6, 8, 8, 8), "student_maps": normal(6, 5, 4, 4)}
    found["exponents"] = (normal(6, 20) * 2).exp()
    found["labels"] = torch.tensor(generator.integers(0, 7, 6))
    return found


def module(path: Path) -> ModuleType:
    """Import one file alone."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def dkd_loss(path: Path):
    """Return the function out of a file whose other imports are not needed."""
    names: dict[str, object] = {"torch": torch, "F": torch.nn.functional}
    exec(path.read_text().split("class DKD")[0].split("from ._base import Distiller")[1], names)
    return names["dkd_loss"]


if __name__ == "__main__":
    rep, md = map(Path, sys.argv[1:])
    x = inputs()
    population = 100  # as many examples as their memory stands for
    scaled = x["exponents"] / (x["exponents"].mean() * population)
    source = (rep / "crd" / "criterion.py").read_text().replace("from .memory import ContrastMemory", "")
    crd: dict[str, object] = {}
    exec(source, crd)
    rkd = module(rep / "distiller_zoo" / "RKD.py").RKDLoss
    features = x["student_features"], x["teacher_features"]
    found = {
        "rkd_distance": float(rkd(25, 0)(*features)),
        "rkd_angle": float(rkd(0, 50)(*features)),
        "similarity": float(
            module(rep / "distiller_zoo" / "SP.py").Similarity()([x["student_maps"]], [x["teacher_maps"]])[0]
        ),
        "attention": float(
            module(rep / "distiller_zoo" / "AT.py").Attention()([x["student_maps"]], [x["teacher_maps"]])[0]
        ),
        "contrast": float(crd["ContrastLoss"](population)(scaled[..., None])),
        **{
            f"dkd {temperature} {beta}": float(
                dkd_loss(md / "mdistiller" / "distillers" / "DKD.py")(
                    x["student"], x["teacher"], x["labels"], 1.0, beta, temperature
                )
            )
            for temperature in (1.0, 4.0)
            for beta in (2.0, 8.0)
        },
    }
    (Path(__file__).parent / "results.json").write_text(json.dumps(found, indent=1) + "\n")
