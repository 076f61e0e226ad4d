"""ResNet-20, trained on CIFAR-10, tuned on MNIST, Fashion-MNIST and CIFAR-10 (as JPEG), with a head for each task.

The heads are fitted first, to the features of the base (a linear probe), and stay as they are while the rest is tuned
and merged: as the text heads of CLIP do in the literature's experiments. So the base with each task's head is the
linear probe, and a merge has to beat it.
"""

import tempfile
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _family import QUIET, Family, Part
from _scores import Sample
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lfm
from lfm.data import DataSpec, Rows, read
from lfm.tune.weights.full import Full

NETS = Path(__file__).parents[1] / "tests" / "nets.py"
IMAGE = {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FILES = {"MNIST": "mnist.npz", "Fashion": "fashion-mnist.npz", "CIFAR-10": "cifar10-jpeg.npz"}
RATES = {"MNIST": 1e-3, "Fashion": 1e-3, "CIFAR-10": 3e-4}
AS_IS, RECOMPUTED = "as merged", "BatchNorm recomputed"
BATCH = 125
Images = tuple[torch.Tensor, torch.Tensor]  # (n, 3, 32, 32) and labels (n,)


def fixed_head() -> nn.Module:
    """The network, with an output layer that is not trained."""
    network = lfm.load({"module": f"{NETS}:resnet20", "image": IMAGE}).module
    network.linear.requires_grad_(False)
    return network


@dataclass(frozen=True)
class Vision(Family):
    steps: int = 150
    batch_size: int = 64
    probe: int = 6400  # images that a head is fitted to
    validation: int = 150  # images of each task
    test: int = 800
    unlabelled: int = 128  # training images for the statistics of batch norms

    name = "vision"
    title = "ResNet-20"
    metric = "accuracy"
    tasks = tuple(FILES)
    variants = (AS_IS, RECOMPUTED)

    @property
    def original(self) -> Path:
        return self.assets / "checkpoints" / "cifar10-resnet20"

    @property
    def base(self) -> Path:
        return self.work / "backbones" / "base"

    def source(self, task: str) -> Path:
        return self.work / "backbones" / task

    def _start(self, task: str) -> Path:
        """Return the base with a task's head; it has one for CIFAR-10 of its own."""
        return self.original if task == "CIFAR-10" else self.work / f"{task}-probe"

    def make(self, task: str) -> None:
        if not self._start(task).exists():
            self._fit_head(task)
        method = Full(steps=self.steps, learning_rate=RATES[task], batch_size=self.batch_size)
        model = {"ref": str(self._start(task)), "module": f"{__name__}:fixed_head", "image": IMAGE}
        data = {"path": self.path(FILES[task]), "split": "train", "part": "train"}
        lfm.tune(method, model, data, out=self.work / task, settings=QUIET)
        for full, backbone in ((self.work / task, self.source(task)), (self.original, self.base)):
            if not backbone.exists():
                tensors = load_file(full / "model.safetensors")
                _save({name: tensors[name] for name in tensors if not name.startswith("linear.")}, backbone)

    def note(self, variant: str) -> str:
        data = f" on {self.unlabelled} unlabelled training images of each task" if variant == RECOMPUTED else ""
        return (
            f"Accuracy in percent on {self.test} test images of each task (settings chosen on {self.validation} "
            f"held-out training images of each); batch norms: {variant.removeprefix('BatchNorm ')}{data}."
        )

    def _fit_head(self, task: str) -> None:
        """Fit a linear probe on the base's features."""
        images, labels = self._images(task, "probe")
        with torch.no_grad():
            features = _features(_backbone(self.original), images)
        head = nn.Linear(64, 10)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found = nn.functional.cross_entropy(head(features), labels) + 1e-4 * head.weight.square().sum()
            found.backward()
            return found

        optimizer.step(loss)
        own = {f"linear.{name}": value.detach() for name, value in head.named_parameters()}
        _save(load_file(self.original / "model.safetensors") | own, self._start(task))

    @cache  # noqa: B019  one object lives as long as its process
    def _rows(self, task: str, split: str) -> Rows:
        return read(DataSpec(path=self.path(FILES[task]), split=split))

    @cache  # noqa: B019
    def _images(self, task: str, part: str) -> Images:
        """Return images spread evenly over a split: some files are sorted by class."""
        if part == "test":
            rows = self._rows(task, "test")
        else:
            rows = self._rows(task, "train").part("held_out" if part == "validation" else "train")
        count = min(len(rows), getattr(self, part))
        rows = rows.take(np.linspace(0, len(rows) - 1, count).astype(int))
        batch = _encoder().encode(rows, 256).batch(range(count))
        return batch["pixel_values"], batch["labels"]

    @cache  # noqa: B019
    def _head(self, task: str) -> nn.Linear:
        tensors = load_file(self._start(task) / "model.safetensors")
        head = nn.Linear(64, 10)
        head.load_state_dict({name: tensors[f"linear.{name}"] for name in ("weight", "bias")})
        return head

    def _logits(self, weights: Path, task: str, part: Part, variant: str) -> torch.Tensor:
        """Return the logits of a backbone with a task's head."""
        backbone = _backbone(weights)
        if variant == RECOMPUTED:
            _recompute(backbone, self._images(task, "unlabelled")[0])
        with torch.inference_mode():
            return self._head(task)(_features(backbone, self._images(task, part)[0]))

    def measure(self, weights: Path, task: str, part: Part, variant: str) -> Sample:
        return self._hits(task, part, self._logits(weights, task, part, variant))

    def ensemble(self, task: str, part: Part) -> Sample:
        logits = torch.stack([self._logits(weights, task, part, AS_IS) for weights in self.sources])
        return self._hits(task, part, logits.softmax(-1).mean(0))

    def _hits(self, task: str, part: Part, scores: torch.Tensor) -> Sample:
        """Return which answers are right. Where the network gives no numbers, none is."""
        right = (scores.argmax(-1) == self._images(task, part)[1]) & scores.isfinite().all(-1)
        return Sample(right.double().numpy(), np.ones(len(right)))

    def guesses(self, task: str) -> dict[str, Sample]:
        labels = self._images(task, "test")[1]
        ones, most = np.ones(len(labels)), (labels == labels.mode().values).double().numpy()
        return {"chance (any class)": Sample(ones / 10, ones), "majority class": Sample(most, ones)}


# --- networks -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _encoder() -> Any:
    return lfm.load({"module": f"{NETS}:resnet20", "image": IMAGE}).encoder


def _save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a checkpoint in one piece; another process may be writing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        whole = Path(draft) / "whole"
        whole.mkdir()
        save_file(tensors, whole / "model.safetensors")
        if not folder.exists():
            with suppress(OSError):  # it was there first
                whole.rename(folder)


def _backbone(weights: Path) -> nn.Module:
    """Return the network that gives features, (n, 64)."""
    network = fixed_head()
    tensors = load_file(weights / "model.safetensors")
    for name, tensor in network.state_dict().items():  # the head's, and counters that these weights do not have
        tensors.setdefault(name, tensor)
    network.load_state_dict(tensors)
    network.linear = nn.Identity()
    return network.eval()


def _recompute(backbone: nn.Module, images: torch.Tensor) -> None:
    """Replace the statistics of batch norms by those that they see on these images."""
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    backbone.train()
    with torch.inference_mode():
        backbone(images)
    backbone.eval()


def _features(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what the network gives, with batch norms folded into the convolutions before them: 1.4 times as fast."""
    network = deepcopy(backbone)
    for name, norm in list(network.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            block, (*_, own) = network.get_submodule(name.rpartition(".")[0]), name.split(".")
            conv = own.replace("bn", "conv")
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), norm))
            setattr(block, own, nn.Identity())
    network.to(memory_format=torch.channels_last)
    batches = images.contiguous(memory_format=torch.channels_last).split(BATCH)
    return torch.cat([network(batch) for batch in batches])
