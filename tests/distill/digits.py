"""Real digits (scikit-learn's 8x8 scans), a teacher that reads them, and a student of half its width."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

NETS = f"{Path(__file__)}"
IMAGE = {"size": 8, "channels": 1, "mean": [0.3053], "std": [0.3761]}  # of the training images
CLASSES = [str(digit) for digit in range(10)]


class Reader(nn.Module):
    """Three convolutions with batch norms, and an output layer."""

    def __init__(self, width: int, norm: bool = True) -> None:
        super().__init__()
        sizes = (width, width * 2, width * 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, stride=stride, bias=not norm)
            for before, after, stride in zip((1, *sizes[:-1]), sizes, (1, 2, 2), strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) if norm else nn.Identity() for size in sizes)
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


def teacher() -> nn.Module:
    return Reader(24)


def student() -> nn.Module:
    return Reader(12)


def plain_student() -> nn.Module:
    return Reader(12, norm=False)


def ref(builder: str, folder: Path | str | None = None) -> dict:
    """What a recipe calls such a model."""
    return (
        {"ref": str(folder)} if folder is None else {"ref": str(folder), "module": f"{NETS}:{builder}", "image": IMAGE}
    )


def new(builder: str) -> dict:
    """A model of that kind with new weights, as a recipe asks for one."""
    return {"module": f"{NETS}:{builder}", "image": IMAGE}


@cache
def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normalised images and labels to train on, then those to test on; mixed, a fifth of them for the test."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = torch.tensor(found.images[order] / 16, dtype=torch.float32)[:, None]
    pixels = (pixels - IMAGE["mean"][0]) / IMAGE["std"][0]
    labels = torch.tensor(found.target[order])
    return pixels[360:], labels[360:], pixels[:360], labels[:360]


@cache
def saved() -> Path:
    """Return the folder with the arrays as data sets: train.npz, test.npz (uint8 images, labels)."""
    folder = Path(mkdtemp())
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = np.round(found.images[order] / 16 * 255).astype(np.uint8)
    for name, part in (("test", slice(0, 360)), ("train", slice(360, None))):
        np.savez(folder / f"{name}.npz", x_train=pixels[part], y_train=found.target[order][part])
    return folder


@cache
def trained(seed: int = 0) -> Path:
    """Return the folder of a teacher: 600 steps of Adam on the training images, a few seconds of one thread."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = teacher()
        pixels, labels, *_ = images()
        optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 600)
        for _ in range(600):
            batch = torch.randint(len(labels), (64,))
            loss = F.cross_entropy(module(shifted(pixels[batch])), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    folder = Path(mkdtemp()) / "teacher"
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    (folder / "config.json").write_text(json.dumps(names))
    return folder


def shifted(batch: torch.Tensor) -> torch.Tensor:
    """Return images moved by up to a pixel."""
    x, y = torch.randint(-1, 2, (2,)).tolist()
    return batch.roll((x, y), (2, 3))


def accuracy(module: nn.Module) -> float:
    """Return the share of test images that are read right."""
    *_, pixels, labels = images()
    module.eval()
    with torch.no_grad():
        return float((module(pixels).argmax(-1) == labels).float().mean())
