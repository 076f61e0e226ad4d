"""Rank a pool of real models for a task by each score, and compare with what linear probes say.

python benchmarks/rank.py              all of it, some minutes on one core
python benchmarks/rank.py --write      and write the page rank.md

Fine-tunes are kept in the work folder; what models make of the images is computed each time.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _vision import FILES, IMAGE, NETS
from safetensors.torch import load_file, save_file

import lfm
from lfm.data import DataSpec, Rows, read
from lfm.evaluate.transfer import SCORES
from lfm.evaluate.transfer.rank import look
from lfm.models.open import open_model
from lfm.tune.weights.full import Full

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "rank.md"
NOISE = {"a little noise": 0.3, "noise": 0.6, "much noise": 1.0}
KINDS = {"features", "probs", "answers"}


def network(ref: Path | None, depth: int = 20) -> dict[str, Any]:
    """Return a reference to a residual network."""
    model = {"module": f"{NETS}:resnet{depth}", "image": IMAGE}
    return model if ref is None else {"ref": str(ref), **model}


def noised(source: Path, amount: float, out: Path) -> Path:
    """Write a copy whose convolutions have noise of `amount` times their own spread."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim == 4:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + amount * tensor.std() * noise
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    return out


def tuned(assets: Path, task: str, steps: int, out: Path) -> Path:
    """Tune the CIFAR-10 network on a task; what is done already is not done again."""
    data = {"path": str(assets / "data" / FILES[task]), "split": "train", "part": "train"}
    method = Full(steps=steps, learning_rate=1e-3, batch_size=64)
    start = network(assets / "checkpoints" / "cifar10-resnet20")
    lfm.tune(method, start, data, new_head=True, out=out, settings=lfm.Settings(threads=1, quiet=True))
    return out


def pool(assets: Path, work: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Return the candidates, making those that are not there."""
    cifar = assets / "checkpoints" / "cifar10-resnet20"
    found = {
        "ResNet-20, CIFAR-10": network(cifar),
        "ResNet-56, CIFAR-10": network(assets / "checkpoints" / "cifar10-resnet56", 56),
        "ResNet-20, random": network(None),
        "ResNet-56, random": network(None, 56),
    }
    for task in ("MNIST", "Fashion"):
        source = tuned(assets, task, steps, work / task)
        found[f"ResNet-20, {task}"] = network(source)
        found[f"ResNet-20, {task}, noise"] = network(noised(source, NOISE["noise"], work / f"{task}-noise"))
    for name, amount in NOISE.items():
        found[f"ResNet-20, CIFAR-10, {name}"] = network(noised(cifar, amount, work / f"cifar-{amount}"))
    return found


# --- truth and scores -----------------------------------------------------------------------------------------------


def spread(rows: Rows, count: int) -> Rows:
    """Return rows spread evenly over all: some files are sorted by class."""
    return rows.take(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Return the test accuracy in percent of a linear probe, trained to the end with a little decay."""
    middle, width = train.mean(0), train.std(0) + 1e-6
    inputs, others = (torch.tensor((values - middle) / width).float() for values in (train, test))
    targets = torch.tensor(labels)
    head = torch.nn.Linear(inputs.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(head(inputs), targets) + 1e-3 * head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        return 100 * float((head(others).argmax(-1).numpy() == truth).mean())


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return places from 0, equal values sharing the mean of theirs."""
    found = np.asarray(values)
    return np.array([(found < one).sum() + ((found == one).sum() - 1) / 2 for one in found])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of the ranks."""
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Return tau-b: pairs in the same order less those in opposite order."""
    first, second = (np.sign(np.subtract.outer(np.asarray(values), np.asarray(values))) for values in (one, other))
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def examine(model: dict[str, Any], train: Rows, test: Rows, samples: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return a candidate's accuracy, and its scores on each sample (indices into `train`)."""
    handle = open_model(lfm.ModelRef.model_validate(model)).restrict(lfm.Access.LOGITS)
    seen = look(handle, train, KINDS, 256, 125)
    assert not seen.missing, seen.missing
    others = look(handle, test, {"features"}, 256, 125)
    labels, truth = np.asarray(train.columns["label"]), np.asarray(test.columns["label"])
    accuracy = probe(seen.values["features"], labels, others.values["features"], truth)
    scores = {
        name: [score.compute(seen.values[score.of][sample], labels[sample]) for sample in samples]
        for name, score in SCORES.items()
    }
    return {"accuracy": accuracy, "scores": scores}


def compare(
    models: dict[str, dict[str, Any]], train: Rows, test: Rows, size: int, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """Return what was found about each candidate, and each score's rank correlations, one for each sample."""
    chance = np.random.default_rng(0)
    samples = [chance.choice(len(train), size, replace=False) for _ in range(repeats)]
    found = {name: examine(model, train, test, samples) for name, model in models.items()}
    truth = [one["accuracy"] for one in found.values()]
    correlations: dict[str, dict[str, list[float]]] = {}
    for name in SCORES:
        columns = [[one["scores"][name][i] for one in found.values()] for i in range(repeats)]
        best = max(truth)
        correlations[name] = {
            "kendall": [kendall(values, truth) for values in columns],
            "spearman": [spearman(values, truth) for values in columns],
            "lost": [best - truth[int(np.argmax(values))] for values in columns],
        }
    return found, correlations


# --- page -----------------------------------------------------------------------------------------------------------


def tables(
    results: dict[str, tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]],
) -> str:
    """Return the tables: how well each score ranks, then the accuracies that it was to tell."""
    heads = [f"{task}: {what}" for task in results for what in ("Kendall", "Spearman", "lost")]
    lines = ["| score | " + " | ".join(heads) + " | mean Kendall |", "|---|" + "---|" * (len(heads) + 1)]
    for name in SCORES:
        cells, means = [], []
        for _, correlations in results.values():
            values = correlations[name]
            cells += [f"{np.mean(values[key]):.2f} ± {np.std(values[key]):.2f}" for key in ("kendall", "spearman")]
            cells.append(f"{np.mean(values['lost']):.1f}")
            means.append(np.mean(values["kendall"]))
        shown = f"*{name}* (control)" if name == "centroid" else name
        lines.append(f"| {shown} | " + " | ".join(cells) + f" | {np.mean(means):.2f} |")
    lines += ["", "| candidate | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    names = list(dict.fromkeys(name for found, _ in results.values() for name in found))
    for name in names:
        cells = [f"{found[name]['accuracy']:.1f}" if name in found else "-" for found, _ in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", ROOT / "../shared/assets")))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rank")
    parser.add_argument("--sample", type=int, default=200, help="labelled examples that the scores see")
    parser.add_argument("--repeats", type=int, default=10, help="samples drawn")
    parser.add_argument("--train", type=int, default=1500, help="examples of the probe")
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--steps", type=int, default=60, help="of the fine-tunes")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    models = pool(given.assets.resolve(), given.work, given.steps)
    results = {}
    for task, file in FILES.items():
        parts = (read(DataSpec(path=str(given.assets / "data" / file), split=split)) for split in ("train", "test"))
        train, test = (spread(rows, count) for rows, count in zip(parts, (given.train, given.test), strict=True))
        # A model that was trained on the task is no choice but the answer.
        others = {name: model for name, model in models.items() if f"-20, {task}" not in name or task == "CIFAR-10"}
        results[task] = compare(others, train, test, given.sample, given.repeats)
    page = tables(results)
    print(page)
    print(f"{time.monotonic() - began:.0f} s")
    if given.write:
        PAGE.write_text(f"{introduction(given)}\n\n{page}\n", encoding="utf-8")


def introduction(given: argparse.Namespace) -> str:
    """Return what a reader of the tables has to know."""
    return f"""# Which model to start from

`python benchmarks/rank.py --write`. How well each score of `lfm rank` orders a pool of candidates, from {given.sample}
labelled images. The truth is the test accuracy of a linear probe on each candidate's features
({given.train:,} training and {given.test:,} test images, in percent: second table). Kendall's tau-b and Spearman's rho
of score and truth, mean and standard deviation over {given.repeats} samples; *lost* is how many points of accuracy the
score's first choice is below the best. Candidates: CIFAR-10 networks, fine-tunes of {given.steps} steps, copies with
noise on the convolutions ({", ".join(f"{name}: {amount:g} times their spread" for name, amount in NOISE.items())}),
random weights. Networks that were tuned on a task are no candidates for it; those trained on CIFAR-10 are, as half of
the pool comes from them."""


if __name__ == "__main__":
    main()
