"""ResNet-20, trained on CIFAR-10, tuned on MNIST, Fashion-MNIST and CIFAR-10 (as JPEG), with a head for each task.

The heads are fitted first, to the features of the base (a linear probe), and stay as they are while the rest is tuned
and merged: as the text heads of CLIP do in the literature's experiments. So the base with each task's head is the
linear probe, and a merge has to beat it.
"""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _family import QUIET, Family, Part
from _scores import Measured, Sample
from safetensors.torch import load_file, save_file
from torch import nn

import lfm
from lfm.data import DataSpec, read
from lfm.tune.weights.full import Full

NETS = Path(__file__).parents[1] / "tests" / "nets.py"
IMAGE = {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
FILES = {"MNIST": "mnist.npz", "Fashion": "fashion-mnist.npz", "CIFAR-10": "cifar10-jpeg.npz"}
AS_IS, RECOMPUTED = "as merged", "BatchNorm recomputed"
BATCH = 250
Images = tuple[torch.Tensor, torch.Tensor]  # (n, 3, 32, 32) and labels (n,)


def fixed_head() -> nn.Module:
    """The network, with an output layer that is not trained."""
    network = lfm.load({"module": f"{NETS}:resnet20", "image": IMAGE}).module
    network.linear.requires_grad_(False)
    return network


@dataclass(frozen=True)
class Vision(Family):
    steps: int = 150
    probe: int = 6400  # images that a head is fitted to
    validation: int = 200  # images of each task
    test: int = 1000
    unlabelled: int = 256  # training images for the statistics of batch norms

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
        return _without_head(self.original, self.work / "backbones" / "base")

    def source(self, task: str) -> Path:
        return _without_head(self.work / task, self.work / "backbones" / task)

    def make(self, task: str) -> None:
        start, data = self.original, {"path": self.path(FILES[task]), "split": "train", "part": "train"}
        if task != "CIFAR-10":  # the base has a head for this one
            start = self.work / f"{task}-probe"
            self._fit_head(task, start)
        rate = 3e-4 if task == "CIFAR-10" else 1e-3
        method = Full(steps=self.steps, learning_rate=rate, batch_size=64)
        model = {"ref": str(start), "module": f"{__name__}:fixed_head", "image": IMAGE}
        lfm.tune(method, model, data, out=self.work / task, settings=QUIET)
        self.source(task)
        if task == "CIFAR-10":
            _ = self.base

    def note(self, variant: str) -> str:
        data = f" on {self.unlabelled} unlabelled training images of each task" if variant == RECOMPUTED else ""
        return (
            f"Accuracy in percent on {self.test:,} test images of each task (settings chosen on {self.validation} "
            f"held-out training images of each); batch norms: {variant.removeprefix('BatchNorm ')}{data}."
        )

    def _fit_head(self, task: str, folder: Path) -> None:
        """Fit a linear probe on the base's features."""
        if folder.exists():
            return
        images, labels = self._images(task, "probe")
        with torch.inference_mode():
            features = _apply(_fast(_backbone(self.original)), images)
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
        _save(load_file(self.original / "model.safetensors") | own, folder)

    @cache  # noqa: B019  one object lives as long as its process
    def _images(self, task: str, part: str) -> Images:
        """Return images spread evenly over a split: some files are sorted by class."""
        of_split = {"test": ("test", "all"), "validation": ("train", "held_out")}
        split, side = of_split.get(part, ("train", "train"))
        rows = read(DataSpec(path=self.path(FILES[task]), split=split, part=side))
        count = min(len(rows), getattr(self, part))
        rows = rows.take(np.linspace(0, len(rows) - 1, count).astype(int))
        batch = _encoder().encode(rows, 256).batch(range(count))
        return batch["pixel_values"], batch["labels"]

    @cache  # noqa: B019
    def _head(self, task: str) -> nn.Linear:
        tensors = load_file(self.work / task / "model.safetensors")
        head = nn.Linear(64, 10)
        head.load_state_dict({name: tensors[f"linear.{name}"] for name in ("weight", "bias")})
        return head

    def _logits(self, weights: Path, part: Part, variant: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the logits of a backbone with each task's head."""
        backbone = _backbone(weights)
        fast = _fast(backbone) if variant == AS_IS else None
        for task in self.tasks:
            if variant == RECOMPUTED:
                fast = _fast(_recomputed(backbone, self._images(task, "unlabelled")[0]))
            with torch.inference_mode():
                yield task, self._head(task)(_apply(fast, self._images(task, part)[0]))

    def measure(self, weights: Path, part: Part, variant: str) -> Measured:
        return {task: self._hits(task, part, logits) for task, logits in self._logits(weights, part, variant)}

    def ensemble(self, part: Part) -> Measured:
        total: dict[str, torch.Tensor] = {}
        for weights in self.sources:
            for task, logits in self._logits(weights, part, AS_IS):
                total[task] = total.get(task, torch.zeros(())) + logits.softmax(-1)
        return {task: self._hits(task, part, scores) for task, scores in total.items()}

    def _hits(self, task: str, part: Part, scores: torch.Tensor) -> Sample:
        """Return which answers are right. Where the network gives no numbers, none is."""
        right = (scores.argmax(-1) == self._images(task, part)[1]) & scores.isfinite().all(-1)
        return Sample(right.double().numpy(), np.ones(len(right)))

    def guesses(self) -> dict[str, Measured]:
        rows: dict[str, dict[str, Sample]] = {"chance (any class)": {}, "majority class": {}}
        for task in self.tasks:
            labels = self._images(task, "test")[1]
            ones = np.ones(len(labels))
            rows["chance (any class)"][task] = Sample(ones / 10, ones)
            rows["majority class"][task] = Sample((labels == labels.mode().values).double().numpy(), ones)
        return rows


# --- networks -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _encoder() -> Any:
    return lfm.load({"module": f"{NETS}:resnet20", "image": IMAGE}).encoder


def _without_head(full: Path, folder: Path) -> Path:
    """Write a checkpoint's tensors other than the head's, if they are not there."""
    if not folder.exists():
        tensors = load_file(full / "model.safetensors")
        _save({name: tensor for name, tensor in tensors.items() if not name.startswith("linear.")}, folder)
    return folder


def _save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    draft = folder.with_name(f"{folder.name}.partial")
    draft.mkdir(parents=True, exist_ok=True)
    save_file(tensors, draft / "model.safetensors")
    draft.rename(folder)


def _backbone(weights: Path) -> nn.Module:
    """Return the network that gives features, (n, 64)."""
    network = fixed_head()
    tensors = load_file(weights / "model.safetensors")
    for name, tensor in network.state_dict().items():  # the head's, and counters that these weights do not have
        tensors.setdefault(name, tensor)
    network.load_state_dict(tensors)
    network.linear = nn.Identity()
    return network.eval()


def _recomputed(backbone: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return the network with the statistics that its batch norms see on these images."""
    network = deepcopy(backbone).train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the plain mean
    with torch.inference_mode():
        network(images)
    return network.eval()


def _fast(network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the same function with batch norms folded into convolutions: 1.7 times as fast."""
    with warnings.catch_warnings():  # of tracing, which the shortcuts of this network allow
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, torch.zeros(BATCH, 3, 32, 32))
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))


def _apply(network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Apply a network in batches of one size, for which it was traced."""
    padded = torch.cat([images, images.new_zeros(-len(images) % BATCH, *images.shape[1:])])
    return torch.cat([network(batch) for batch in padded.split(BATCH)])[: len(images)]
