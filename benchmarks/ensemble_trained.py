"""Train one network into an ensemble, beside what else the same training pays for: one model, or several short ones.

python benchmarks/ensemble_trained.py                     both tables, minutes on one core; print
python benchmarks/ensemble_trained.py --write             and write benchmarks/ensemble_trained.md
python benchmarks/ensemble_trained.py --only digits --seeds 1 --steps 100      a quick look
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import lfm
from lfm.data import DataSpec, read
from lfm.recipe.step import Settings
from lfm.reuse.ensemble.batch_ensemble import BatchEnsemble
from lfm.reuse.ensemble.fast_geometric import FastGeometric
from lfm.reuse.ensemble.snapshot import Snapshot
from lfm.tune.weights.full import Full

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "ensemble_trained.md"
QUIET = Settings(quiet=True)
MEMBERS = 4
RATE = 1e-2  # of 1e-3, 3e-3, 1e-2 the best for one model: 800 steps on 4,000 images of Fashion-MNIST, by 4,000 others
BEFORE = 0.6  # share of the steps that go into the model that fast_geometric starts from


@dataclass(frozen=True)
class Task:
    """What is learned, for how long, and how fast."""

    title: str
    size: int
    stride: int
    train: dict[str, Any]
    test: dict[str, Any]
    steps: int
    seeds: int


def tasks(assets: Path) -> dict[str, Task]:
    fashion = {"path": str(assets / "data" / "fashion-mnist.npz")}
    digits = {"path": "sklearn:digits", "held_out": 0.8}  # few to train on: with half of them all rows are at 98.5 %
    return {
        "digits": Task(
            "Handwritten digits of scikit-learn, 8 x 8",
            *(8, 1),
            {**digits, "part": "train"},
            {**digits, "part": "held_out"},
            *(400, 3),
        ),
        "fashion": Task(
            "Fashion-MNIST, 28 x 28",
            *(28, 2),
            {**fashion, "split": "train", "part": "held_out", "held_out": 0.1},  # sorted by class: not the first ones
            {**fashion, "split": "test", "part": "held_out", "held_out": 0.5},
            *(500, 2),
        ),
    }


class Network(nn.Module):
    """Three convolutions with batch norms, and a linear layer on their means."""

    def __init__(self, stride: int, width: int = 16) -> None:
        super().__init__()
        widths = (1, width, 2 * width, 4 * width)
        strides = (stride, 2, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(reads, writes, 3, step, padding=1, bias=False)
            for reads, writes, step in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(writes) for writes in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3)))


def network(stride: int) -> nn.Module:
    return Network(stride)


# --- what is compared -----------------------------------------------------------------------------------------------


class Runs:
    """All that is trained on one task from one seed, in a folder of its own."""

    def __init__(self, task: Task, seed: int, work: Path) -> None:
        self.task, self.seed, self.work = task, seed, work
        self.how = {"batch_size": 64, "learning_rate": RATE, "weight_decay": 0.05}
        image = {"size": task.size, "channels": 1}
        self.new = {"module": f"{__file__}:network", "arguments": {"stride": task.stride}, "image": image}

    def at(self, folder: Path) -> dict[str, Any]:
        return {**self.new, "ref": str(folder)}

    def one(self, name: str, steps: int, seed: int | None = None, schedule: str = "cosine") -> dict[str, Any]:
        """Train a model the ordinary way."""
        method = Full(steps=steps, schedule=schedule, warmup=0.05, **self.how)
        chosen = self.seed if seed is None else seed
        lfm.tune(method, self.new, self.task.train, out=self.work / name, seed=chosen, settings=QUIET)
        return self.at(self.work / name)

    def together(self, name: str, method: Any, start: dict[str, Any] | None = None) -> dict[str, Any]:
        """Train an ensemble."""
        options = {"data": self.task.train, "out": self.work / name, "seed": self.seed, "settings": QUIET}
        lfm.ensemble(method, [start or self.new], **options)
        return {"ref": str(self.work / name)}

    def several(self, name: str, steps: int) -> dict[str, Any]:
        """Train models from seeds of their own, and average them."""
        models = [self.one(f"{name}-{n}", steps, 1000 * (n + 1) + self.seed) for n in range(MEMBERS)]
        lfm.ensemble("average", models, out=self.work / name, settings=QUIET)
        return {"ref": str(self.work / name)}

    def last(self, name: str, number: int = MEMBERS) -> dict[str, Any]:
        return self.at(self.work / name / "members" / str(number))


ROWS = (
    "one model",
    "snapshot, its last member",
    "snapshot",
    "fast_geometric, the model it starts from",
    "fast_geometric, its last member",
    "fast_geometric",
    "batch_ensemble, around 1",
    "batch_ensemble, signs",
    "models trained a quarter as long",
    "batch_ensemble, signs, all of a batch to each",
    "models trained as long",
)


def trained(runs: Runs) -> dict[str, dict[str, Any]]:
    """Return every model by the row that it is shown in; the last two rows cost as many times as there are members."""
    steps, how = runs.task.steps, runs.how
    before = int(BEFORE * steps)
    both = {"members": MEMBERS, "steps": steps, **how}
    found = {"one model": runs.one("one", steps)}
    found["snapshot"] = runs.together("snapshot", Snapshot(cycles=MEMBERS, steps=steps, **how))
    start = runs.one("start", before)
    walk = FastGeometric(cycles=MEMBERS, steps=steps - before, **how)
    found["fast_geometric"] = runs.together("walk", walk, start)
    found["batch_ensemble, around 1"] = runs.together("normal", BatchEnsemble(**both))
    found["batch_ensemble, signs"] = runs.together("signs", BatchEnsemble(start="signs", **both))
    all_of_it = BatchEnsemble(start="signs", batches="repeated", **both)
    found["batch_ensemble, signs, all of a batch to each"] = runs.together("repeated", all_of_it)
    found["models trained a quarter as long"] = runs.several("short", steps // MEMBERS)
    found["models trained as long"] = runs.several("long", steps)
    found["snapshot, its last member"] = runs.last("snapshot")
    found["fast_geometric, the model it starts from"] = start
    found["fast_geometric, its last member"] = runs.last("walk")
    assert set(found) == set(ROWS)
    return {name: found[name] for name in ROWS}


def scores(models: dict[str, dict[str, Any]], test: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return accuracy in %, NLL in nats and ECE in % of every model."""
    measured = lfm.evaluate(list(models.values()), {"accuracy": test}, settings=QUIET)
    columns = [[estimate.value for estimate in item.estimates.values()] for item in measured[:3]]
    return dict(zip(models, zip(*columns, strict=True), strict=True))


def measure(task: Task) -> dict[str, list[tuple[float, ...]]]:
    """Return the scores of every row, one for each seed."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ROWS}
    for seed in range(task.seeds):
        with tempfile.TemporaryDirectory() as work:
            for name, row in scores(trained(Runs(task, seed, Path(work))), task.test).items():
                found[name].append(row)
        print(f"{task.title}: seed {seed} done", file=sys.stderr)
    return found


# --- the page -------------------------------------------------------------------------------------------------------


def count(spec: dict[str, Any]) -> int:
    return len(read(DataSpec.model_validate(spec)))


def table(task: Task, found: dict[str, list[tuple[float, ...]]]) -> list[str]:
    seeds = len(found[ROWS[0]])
    lines = [
        f"## {task.title}",
        "",
        f"{count(task.train):,} images to train on, {count(task.test):,} others to measure. {task.steps:,} steps of "
        f"AdamW, batches of 64, peak learning rate {RATE:g}; means of {seeds} seeds, and the "
        "standard deviation of the accuracy between them.",
        "",
        "| | cost | accuracy, % | NLL, nats | ECE, % |",
        "|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        accuracy, nll, ece = ([row[place] for row in rows] for place in range(3))
        spread = f" ± {statistics.stdev(accuracy):.2f}" if seeds > 1 else ""
        cost = MEMBERS if name in ROWS[-2:] else BEFORE if name == ROWS[3] else 1
        means = f"{statistics.mean(nll):.3f} | {statistics.mean(ece):.2f}"
        lines.append(f"| {name} | {cost:g} | {statistics.mean(accuracy):.2f}{spread} | {means} |")
    return [*lines, ""]


HEAD = f"""# Ensembles trained from one model

Written by `benchmarks/ensemble_trained.py`. A network of three convolutions with batch norms, trained from scratch;
ensembles of {MEMBERS} members. *Cost* is training beside that of one model, in examples seen. An answer of an ensemble
costs {MEMBERS} of the network. `fast_geometric` starts from a model that has had {BEFORE:.0%} of the steps, with a
whole cosine of its own. All rows have the peak learning rate that is best for one model.
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", ROOT / "../shared/assets")))
    options.add_argument("--only", choices=["digits", "fashion"], help="one of the two tables")
    options.add_argument("--seeds", type=int, help="runs of everything")
    options.add_argument("--steps", type=int, help="of one model")
    options.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    asked = options.parse_args()
    chosen = {name: task for name, task in tasks(asked.assets.resolve()).items() if asked.only in (None, name)}
    lines = [HEAD]
    for task in chosen.values():
        found = measure(replace(task, steps=asked.steps or task.steps, seeds=asked.seeds or task.seeds))
        lines += table(task, found)
    made = "\n".join(lines)
    print(made)
    if asked.write:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
