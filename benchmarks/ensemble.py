"""Join two residual networks that were trained on the same data: averages, calibration, stacking, a cascade.

python benchmarks/ensemble.py              ask both networks about all images, a minute or two on one core; print
python benchmarks/ensemble.py --write      and write benchmarks/ensemble.md
python benchmarks/ensemble.py --images 1500 --stack      the penalty of a stack, by the images that it learns from
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _vision import FILES, IMAGE, NETS
from torch import nn

from lfm.data import DataSpec, Rows, read
from lfm.evaluate.intervals import calibration_error, mean, share
from lfm.method import Access
from lfm.models.encode import Batch, Examples
from lfm.models.handle import Model
from lfm.models.open import open_model
from lfm.models.ref import ModelRef
from lfm.reuse.ensemble._contract import Ensemble
from lfm.reuse.ensemble._joined import Joined
from lfm.reuse.ensemble._learning import from_data
from lfm.reuse.ensemble.average import Average
from lfm.reuse.ensemble.cascade import Cascade
from lfm.reuse.ensemble.rank_fusion import RankFusion
from lfm.reuse.ensemble.stack import Stack
from lfm.reuse.ensemble.vote import Vote

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "ensemble.md"
DEPTHS = (20, 56)
CHOOSE, TEST, KNOWN = "choose", "test", "known"
QUALITIES = (0.97, 0.98, 0.99, 1.0)  # shares of the large network's accuracy that a cascade is to reach
THRESHOLDS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)
JOINED: dict[str, tuple[Ensemble, str]] = {
    "average of probabilities": (Average(), "no"),
    "average of logits": (Average(of="logits"), "no"),
    "average, weights by likelihood": (Average(choose="likelihood"), "no"),
    "average of calibrated members": (Average(), "members"),
    "average, calibrated": (Average(), "ensemble"),
    "average of logits, calibrated": (Average(of="logits"), "ensemble"),
    "stack": (Stack(), "no"),
    "rank_fusion": (RankFusion(), "no"),
    "vote": (Vote(), "no"),
}


# --- what the networks say, asked once ------------------------------------------------------------------------------


@dataclass
class Said:
    """A backend that was asked about every image before; it offers probabilities and nothing more."""

    log_probs: torch.Tensor  # (images, classes)
    offers: Access = Access.PROBS

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.log_probs[batch["row"]]

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch).argmax(-1)

    def write(self, prompts: Any, how: Any, tell: Any) -> Any:
        raise AssertionError("images are classified")


class Places(Examples):
    """Images by their place in the tables."""

    def __init__(self, labels: torch.Tensor, members: int) -> None:
        self.labels = labels
        self._members = members

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(list(indices))
        return {"members": [{"row": rows}] * self._members, "labels": self.labels[rows]}


@dataclass
class Part:
    """Some images: their labels, and both networks as far as these images go."""

    examples: Places
    models: list[Model]


def network(assets: Path, depth: int) -> Model:
    """Open a network as an API would offer it."""
    folder = assets / "checkpoints" / f"cifar10-resnet{depth}"
    ref = ModelRef.model_validate({"ref": str(folder), "module": f"{NETS}:resnet{depth}", "image": IMAGE})
    return open_model(ref, access=Access.WEIGHTS)


def part(networks: Sequence[Model], rows: Rows, images: int | None) -> Part:
    """Ask every network about some rows, spread evenly: the file is sorted by class."""
    places = torch.linspace(0, len(rows) - 1, min(images or len(rows), len(rows))).round().long()
    models, labels = [], torch.zeros(0)
    for model in networks:
        examples = model.encoder.encode(rows, 8)
        asked = [examples.batch(some.tolist()) for some in places.split(125)]
        said = torch.cat([model.log_probs(batch) for batch in asked])
        labels = torch.cat([batch["labels"] for batch in asked])
        models.append(Model(Said(said), Access.PROBS, model.task, model.encoder, model.label))
    return Part(Places(labels, len(models)), models)


def parts(assets: Path, networks: Sequence[Model], images: int | None) -> dict[str, Part]:
    """Return one half of the test images to choose by, the other to measure, and images that the networks know."""
    path = str(assets / "data" / FILES["CIFAR-10"])
    sides = {CHOOSE: ("test", "held_out"), TEST: ("test", "train"), KNOWN: ("train", "held_out")}
    found = {}
    for name, (split, side) in sides.items():
        share_held = 0.5 if split == "test" else 1 / 3
        rows = read(DataSpec(path=path, split=split, part=side, held_out=share_held))
        found[name] = part(networks, rows, images)
    return found


def operations(model: Model) -> int:
    """Return the multiplications that an image takes, in convolutions and linear layers."""
    total = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += module.weight[0].numel() * output[0].numel()

    layers = [layer for layer in model.module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.module(torch.zeros(1, 3, IMAGE["size"], IMAGE["size"]))
    for hook in hooks:
        hook.remove()
    return total


# --- measuring ------------------------------------------------------------------------------------------------------


def scores(log_probs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return accuracy and calibration error in percent, with half the width of the accuracy's 95 % interval; NLL."""
    top, right = log_probs.max(-1), log_probs.argmax(-1) == labels
    accuracy = share(int(right.sum()), len(right))
    losses = -log_probs.gather(-1, labels[:, None])[:, 0].double().numpy()
    low, high = accuracy.low or 0.0, accuracy.high or 0.0
    return {
        "accuracy": 100 * accuracy.value,
        "half": 50 * (high - low),
        "nll": mean(losses).value,
        "ece": 100 * calibration_error(top.values.exp().double().numpy(), right.double().numpy()),
    }


def learned(method: Ensemble, calibrate: str, chosen: Part, test: Part) -> tuple[Joined, dict[str, float]]:
    """Return an ensemble over the test images that learned from others, and what it found there."""
    before = Joined(method, chosen.models, [1.0] * len(chosen.models), {})
    needed = method.learns or calibrate != "no"
    found = from_data(before, chosen.examples, calibrate).metrics if needed else {}
    return Joined(method, test.models, before.weights, before.state), found


def few(some: Part, count: int) -> Part:
    """Return some of a part's images, drawn by chance."""
    rows = torch.randperm(len(some.examples), generator=torch.Generator().manual_seed(0))[:count]
    said = [model.log_probs({"row": rows}) for model in some.models]
    pairs = zip(said, some.models, strict=True)
    models = [Model(Said(table), Access.PROBS, m.task, m.encoder, m.label) for table, m in pairs]
    return Part(Places(some.examples.labels[rows], len(models)), models)


def tell_stacks(found: dict[str, Part]) -> None:
    """Print how stacks do with several penalties, and with the one that cross-validation takes."""
    for count in (100, 400, len(found[CHOOSE].examples)):
        for method in (Stack(), Stack(penalty=0.1), Stack(penalty=1e-3), Stack(folds=5)):
            ensemble, told = learned(method, "no", few(found[CHOOSE], count), found[TEST])
            row = scores(answers(ensemble, found[TEST]), found[TEST].examples.labels)
            penalty = f"{told['penalty']:g}, chosen" if method.folds else f"{method.penalty:g}"
            print(
                f"{count} images, penalty {penalty}: accuracy {row['accuracy']:.2f} %, NLL {row['nll']:.3f}", flush=True
            )


def answers(ensemble: Joined, test: Part) -> torch.Tensor:
    return ensemble.logits(test.examples.batch(range(len(test.examples))))


def measure(found: dict[str, Part], cost: Sequence[int]) -> dict[str, Any]:
    """Return the scores of both networks, of everything they are joined to, and of cascades."""
    test, labels = found[TEST], found[TEST].examples.labels
    rows: dict[str, dict[str, float]] = {}
    for depth, model in zip(DEPTHS, test.models, strict=True):
        rows[f"ResNet-{depth}"] = scores(model.log_probs({"row": torch.arange(len(labels))}), labels)
        alone = Part(test.examples, [model])
        index = DEPTHS.index(depth)
        chosen = Part(found[CHOOSE].examples, [found[CHOOSE].models[index]])
        ensemble, told = learned(Average(), "ensemble", chosen, alone)
        rows[f"ResNet-{depth}, calibrated"] = scores(answers(ensemble, alone), labels) | told
    for name, (method, calibrate) in JOINED.items():
        ensemble, told = learned(method, calibrate, found[CHOOSE], test)
        rows[name] = scores(answers(ensemble, test), labels) | told
    ensemble, told = learned(Average(), "ensemble", found[KNOWN], test)
    rows["average, calibrated on training images"] = scores(answers(ensemble, test), labels) | told
    return {"rows": rows, "curve": curve(test, cost), "chosen": chosen_cascades(found, cost)}


def cascade(ensemble: Joined, test: Part, cost: Sequence[int]) -> dict[str, float]:
    """Return the scores, the share of images that the large network saw, and multiplications beside its own."""
    ensemble.calls[:] = [0] * len(ensemble.calls)
    said = answers(ensemble, test)
    count = len(test.examples)
    work = sum(calls * each for calls, each in zip(ensemble.calls, cost, strict=True)) / (count * cost[-1])
    return scores(said, test.examples.labels) | {"beyond": 100 * ensemble.calls[1] / count, "cost": 100 * work}


def curve(test: Part, cost: Sequence[int]) -> dict[float, dict[str, float]]:
    weights = [1.0] * len(test.models)
    made = {threshold: Joined(Cascade(threshold=threshold), test.models, weights, {}) for threshold in THRESHOLDS}
    return {threshold: cascade(ensemble, test, cost) for threshold, ensemble in made.items()}


def chosen_cascades(found: dict[str, Part], cost: Sequence[int]) -> list[dict[str, Any]]:
    """Return cascades whose threshold was chosen on images that were not trained on, and on images that were."""
    made = []
    for source in (CHOOSE, KNOWN):
        for quality in QUALITIES:
            ensemble, told = learned(Cascade(quality=quality), "no", found[source], found[TEST])
            result = cascade(ensemble, found[TEST], cost)
            made.append({"source": source, "quality": quality, "threshold": told["threshold"], **result})
    return made


# --- the page -------------------------------------------------------------------------------------------------------


def page(found: dict[str, Part], measured: dict[str, Any], cost: Sequence[int]) -> str:
    counts = {name: len(some.examples) for name, some in found.items()}
    lines = [
        "# Joining image classifiers",
        "",
        "Written by `benchmarks/ensemble.py`. ResNet-20 and ResNet-56, both trained on CIFAR-10, asked through handles "
        f"that offer probabilities and nothing more. CIFAR-10's test images as JPEG: {counts[TEST]:,} measured, "
        f"{counts[CHOOSE]:,} others to learn weights, temperatures and thresholds from. Both networks were trained on "
        "all training images, so none of these are held out; what comes of choosing by them anyway is shown too "
        f"({counts[KNOWN]:,} of them, as JPEG).",
        "",
        "## Together",
        "",
        "Accuracy with its 95 % interval, negative log-likelihood, calibration error (15 bins).",
        "",
        "| | accuracy, % | NLL, nats | ECE, % |",
        "|---|---|---|---|",
    ]
    for name, row in measured["rows"].items():
        nll = f"{row['nll']:.3f}" if row["nll"] < float("inf") else "no number"
        lines.append(f"| {name} | {row['accuracy']:.2f} ± {row['half']:.2f} | {nll} | {row['ece']:.2f} |")
    lines += [
        "",
        "A vote rules out what nobody voted for, and has no likelihood where that was right. The scores of rank fusion "
        "are an order, and not probabilities.",
        "",
        "## Small first",
        "",
        f"ResNet-20 ({cost[0] / 1e6:.0f} M multiplications) answers where it is sure, ResNet-56 "
        f"({cost[1] / 1e6:.0f} M) the rest. Cost: multiplications beside those of ResNet-56 alone.",
        "",
        "| threshold | accuracy, % | to ResNet-56, % | cost, % |",
        "|---|---|---|---|",
    ]
    for threshold, row in measured["curve"].items():
        lines.append(f"| {threshold:g} | {row['accuracy']:.2f} | {row['beyond']:.1f} | {row['cost']:.1f} |")
    lines += [
        "",
        "The lowest threshold with which a share of ResNet-56's accuracy was reached on other images:",
        "",
        "| chosen on | share asked for, % | threshold | accuracy, % | share reached, % | to ResNet-56, % | cost, % |",
        "|---|---|---|---|---|---|---|",
    ]
    large = measured["rows"][f"ResNet-{DEPTHS[-1]}"]["accuracy"]
    for row in measured["chosen"]:
        source = "held-out images" if row["source"] == CHOOSE else "training images"
        lines.append(
            f"| {source} | {100 * row['quality']:.0f} | {row['threshold']:.3f} | {row['accuracy']:.2f} | "
            f"{100 * row['accuracy'] / large:.1f} | {row['beyond']:.1f} | {row['cost']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", ROOT / "../shared/assets")))
    options.add_argument("--images", type=int, help="of each part, for a quick look")
    options.add_argument("--stack", action="store_true", help="print how penalties of a stack compare, and no more")
    options.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    asked = options.parse_args()
    networks = [network(asked.assets, depth) for depth in DEPTHS]
    cost = [operations(model) for model in networks]
    found = parts(asked.assets, networks, asked.images)
    if asked.stack:
        tell_stacks(found)
        return
    made = page(found, measure(found, cost), cost)
    print(made)
    if asked.write:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
