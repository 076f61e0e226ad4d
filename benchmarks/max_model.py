"""Join two image classifiers that know different classes: by the surest, with what is learned of who knows what.

python benchmarks/max_model.py              train the members, join them, print; minutes on one core
python benchmarks/max_model.py --write      and write benchmarks/max_model.md
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lfm.reuse.ensemble._averaging import best_temperature
from lfm.reuse.ensemble._contract import Ensemble
from lfm.reuse.ensemble.max_model import MaxModel
from lfm.reuse.ensemble.route import Route

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "max_model.md"
CLASSES = 10
CASES = {
    "MNIST, 0-4 and 5-9": ("mnist.npz", (range(5), range(5, 10))),
    "MNIST, 0-6 and 4-9": ("mnist.npz", (range(7), range(4, 10))),
    "Fashion-MNIST, 0-4 and 5-9": ("fashion-mnist.npz", (range(5), range(5, 10))),
    "Fashion-MNIST, even and odd, both know 0": ("fashion-mnist.npz", (range(0, 10, 2), (0, 1, 3, 5, 7, 9))),
}
WAYS: dict[str, tuple[Ensemble, bool]] = {
    "surest": (MaxModel(), False),
    "surest of calibrated members": (MaxModel(), True),
    "`familiarity: learned`": (MaxModel(familiarity="learned"), False),
    "`route`": (Route(), False),
}


@dataclass
class Said:
    """What members say of some images: see `Members` of lfm.reuse.ensemble._contract."""

    tables: list[torch.Tensor]
    knows: torch.Tensor
    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.tables)

    def log_probs(self, index: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        return self.tables[index] if rows is None else self.tables[index][rows]

    def labels(self, index: int) -> torch.Tensor:
        return self.tables[index].argmax(-1)

    def looks(self) -> torch.Tensor:
        return functional.adaptive_avg_pool2d(self.images[:, None], 8).flatten(1)

    def warmed(self, temperatures: Sequence[float]) -> "Said":
        """Return what they say at these temperatures."""
        pairs = zip(self.tables, temperatures, strict=True)
        return Said([(table / t).log_softmax(-1) for table, t in pairs], self.knows, self.images)


def images(assets: Path, file: str, split: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some images and their classes, in an order of chance."""
    with np.load(assets / "data" / file) as found:
        pixels, labels = found[f"x_{split}"], found[f"y_{split}"]
    order = np.random.default_rng(0).permutation(len(labels))[start:stop]
    return torch.tensor(pixels[order]).float().div(255), torch.tensor(labels[order]).long()


def trained(pixels: torch.Tensor, labels: torch.Tensor, classes: Sequence[int], seed: int) -> nn.Module:
    """Return a network with a hidden layer that was shown these classes and no others."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, len(classes)))
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    known = torch.tensor(list(classes))
    seen = torch.isin(labels, known)
    pixels, places = pixels[seen], torch.searchsorted(known, labels[seen])
    for _ in range(6):
        for rows in torch.randperm(len(places)).split(64):
            loss = functional.cross_entropy(net(pixels[rows]), places[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net


@torch.no_grad()
def said(nets: Sequence[nn.Module], sets: Sequence[Sequence[int]], pixels: torch.Tensor) -> Said:
    tables, knows = [], torch.zeros(len(sets), CLASSES, dtype=torch.bool)
    for index, (net, classes) in enumerate(zip(nets, sets, strict=True)):
        table = torch.full((len(pixels), CLASSES), -torch.inf)
        table[:, list(classes)] = net(pixels).log_softmax(-1)
        tables.append(table)
        knows[index, list(classes)] = True
    return Said(tables, knows, pixels)


def measured(assets: Path, file: str, sets: Sequence[Sequence[int]], sizes: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """Yield for each number of held-out images and each way to join: accuracy in percent, NLL in nats."""
    train, test = images(assets, file, "train", 0, 12_000), images(assets, file, "test", 0, 4_000)
    nets = [trained(*train, classes, seed) for seed, classes in enumerate(sets)]
    for size in sizes:
        pixels, labels = images(assets, file, "train", 12_000, 12_000 + size)
        held, asked = said(nets, sets, pixels), said(nets, sets, test[0])
        temperatures = [best_temperature(table, labels) for table in held.tables]
        for name, (method, calibrated) in WAYS.items():
            one, two = (part.warmed(temperatures) if calibrated else part for part in (held, asked))
            state = method.learn(one, labels, [1.0] * len(nets)) if method.learns else {}
            found = method.combine(two, [1.0] * len(nets), state)
            right = 100 * float((found.argmax(-1) == test[1]).double().mean())
            loss = float(functional.nll_loss(found, test[1]))
            yield str(size), name, f"{right:.1f}", f"{loss:.2f}" if np.isfinite(loss) else "no number"


def page(rows: list[tuple[str, ...]]) -> str:
    head = ("members know", "held-out images", "joined by", "accuracy, %", "NLL, nats")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return (
        "# Joining classifiers of different classes\n\n"
        "Written by `benchmarks/max_model.py`. Two networks with one hidden layer, each trained on those of 12,000 "
        "images whose classes it knows; 4,000 test images of all classes. `route` asks one member alone, and has no "
        "likelihood where that one does not know the class.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", ROOT / "../shared/assets")))
    options.add_argument("--sizes", type=int, nargs="+", default=[100, 500], help="held-out images to learn from")
    options.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    asked = options.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case, (file, sets) in CASES.items():
        for row in measured(asked.assets, file, sets, asked.sizes):
            print(case, *row, sep=" | ", flush=True)
            rows.append((case, *row))
    if asked.write:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
