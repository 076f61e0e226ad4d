"""Learn from a teacher that only answers: accuracy against queries for every black-box method, and what defences cost.

python benchmarks/distill_black_box.py            all that is not there yet, minutes on one thread
python benchmarks/distill_black_box.py --write    and write the page distill_black_box.md

Every run is kept in the work folder as it ends, and is not made again.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.distill import digits  # noqa: E402  # the tests' teacher and data

import lfm  # noqa: E402
from lfm.method import card  # noqa: E402
from lfm.models.local import load_model  # noqa: E402
from lfm.models.open import open_model  # noqa: E402
from lfm.models.ref import ModelRef  # noqa: E402

PAGE = ROOT / "benchmarks" / "distill_black_box.md"
STEPS = 800
SEEDS = (0, 1, 2)
ATTACKS: dict[str, tuple[str, str]] = {  # name in the table: method, access
    "noise_pool": ("noise_pool", "probs"),
    "noise_pool, labels": ("noise_pool", "labels"),
    "knockoff": ("knockoff", "probs"),
    "label_only": ("label_only", "labels"),
    "dfme": ("dfme", "probs"),
    "maze": ("maze", "probs"),
    "ideal": ("ideal", "probs"),
}
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "--round 2": {"round": 2},
    "--round 1": {"round": 1},
    "--top-k 1": {"top_k": 1},
    "--perturb 0.2": {"perturb": 0.2},
    "--perturb 0.5": {"perturb": 0.5},
}
MORE = ("noise_pool", "dfme", "maze")  # at 100,000 queries


def proxy(assets: Path, work: Path) -> Path:
    """Return 30,000 handwritten digits of other people, without labels: MNIST, its margins cut off."""
    path = work / "proxy.npz"
    if not path.exists():
        np.savez(path, images=np.load(assets / "data" / "mnist.npz")["x_train"][:30_000, 4:24, 4:24])
    return path


def attacked(
    attack: str, queries: int, seed: int, defence: Mapping[str, Any], given: argparse.Namespace
) -> dict[str, Any]:
    """Return what a student has learned, and what it took."""
    method, access = ATTACKS[attack]
    out = given.work / f"{attack}-{queries}-{seed}".replace(", ", "-")
    shutil.rmtree(out, ignore_errors=True)  # or what is there counts as done, whatever has changed in the code
    teacher = {**digits.ref("teacher", digits.trained(seed)), "access": access}
    teacher |= {"defence": dict(defence)} if defence else {}
    data = {"path": str(proxy(given.assets, given.work))} if method == "knockoff" else None
    started = time.process_time()
    settings = lfm.Settings(threads=1, quiet=True)
    made = card("distill", method).load()(queries=queries, steps=STEPS)
    lfm.distill(made, teacher, digits.new("student"), out=out, data=data, seed=seed, settings=settings)
    seconds = time.process_time() - started
    student = load_model(ModelRef.model_validate({**digits.new("student"), "ref": str(out)}))
    *_, pixels, labels = digits.images()
    said = student.logits({"pixel_values": pixels}).argmax(-1)
    truth = load_model(ModelRef.model_validate(digits.ref("teacher", digits.trained(seed))))
    theirs = truth.logits({"pixel_values": pixels}).argmax(-1)
    metrics = json.loads((out / "lineage.json").read_text())["metrics"]
    return {
        "accuracy": 100 * float((said == labels).float().mean()),
        "agreement": 100 * float((said == theirs).float().mean()),
        "teacher": 100 * float((theirs == labels).float().mean()),
        "queries": metrics["queries"],
        "steps": metrics["steps"],
        "curve": [json.loads(line) for line in (out / "agreement.jsonl").read_text().splitlines()],
        "seconds": seconds,
    }


def useful(defence: Mapping[str, Any]) -> dict[str, float]:
    """Return what is left of a defended teacher for those who ask in good faith."""
    ref = {**digits.ref("teacher", digits.trained(0)), "access": "probs"}
    model = open_model(ModelRef.model_validate(ref | ({"defence": dict(defence)} if defence else {})))
    *_, pixels, labels = digits.images()
    probs = model.probs({"pixel_values": pixels})
    best = probs.max(-1)
    right = (best.indices == labels).float()
    bins = (best.values * 15).ceil().long().clamp(1, 15)
    error = sum(
        float((right[bins == place].mean() - best.values[bins == place].mean()).abs() * (bins == place).float().mean())
        for place in range(1, 16)
        if (bins == place).any()
    )
    nll = -probs[torch.arange(len(labels)), labels].clamp(min=1e-6).log().mean()
    return {"accuracy": 100 * float(right.mean()), "nll": float(nll), "ece": 100 * error}


def wanted(queries: Sequence[int], seeds: Sequence[int]) -> Iterable[tuple[str, str, int, int, Mapping[str, Any]]]:
    """Yield (key, attack, queries, seed, defence) of all runs, those first that say most."""
    few, many = queries
    for seed in seeds[:1]:
        for attack in ATTACKS:
            yield f"{attack}|{few}|{seed}", attack, few, seed, {}
    for name, defence in DEFENCES.items():
        if defence:
            yield f"{name}|{few}|0", "noise_pool", few, 0, defence
    for seed in seeds[1:]:
        for attack in ATTACKS:
            yield f"{attack}|{few}|{seed}", attack, few, seed, {}
    for attack in MORE:
        yield f"{attack}|{many}|0", attack, many, 0, {}


def spread(values: Sequence[float]) -> str:
    """Return mean, standard deviation and the smallest of some numbers."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({min(values):.1f})"


def page(found: Mapping[str, Any], queries: Sequence[int], seeds: Sequence[int]) -> str:
    """Return the tables in Markdown."""
    few, many = queries
    larger = any(f"{attack}|{many}|0" in found for attack in ATTACKS)
    more_heads = [f"{many:,} queries (seed 0)", "seconds"] if larger else []
    heads = ["attack", "tells", "seeds", f"{few:,} queries", "agreement with the teacher", "seconds", *more_heads]
    lines = [
        "Accuracy on 360 digits nobody learned from, in percent: mean ± standard deviation over seeds (smallest); each "
        "seed has a teacher of its own. Process seconds of one thread, for one run.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    teacher = [found[f"noise_pool|{few}|{seed}"]["teacher"] for seed in seeds if f"noise_pool|{few}|{seed}" in found]
    lines.append(f"| *teacher* | | {len(teacher)} | {spread(teacher)} |{' |' * (len(heads) - 4)}")
    for attack, (_, access) in ATTACKS.items():
        rows = [found[f"{attack}|{few}|{seed}"] for seed in seeds if f"{attack}|{few}|{seed}" in found]
        more = found.get(f"{attack}|{many}|0")
        if rows:
            cells = [attack, access, str(len(rows)), spread([row["accuracy"] for row in rows])]
            cells += [spread([row["agreement"] for row in rows])]
            cells += [f"{statistics.mean(row['seconds'] for row in rows):.0f}"]
            if larger:
                cells += ["", ""] if more is None else [f"{more['accuracy']:.1f}", f"{more['seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Agreement on held-out inputs of the budget (no labels, no real digits), seed 0, as it grew:", ""]
    lines += ["| attack | queries: agreement |", "|---|---|"]
    for attack in ATTACKS:
        row = found.get(f"{attack}|{few}|0")
        if row:
            last = {point["queries"]: point["agreement"] for point in row["curve"]}  # after all steps with so many
            told = ", ".join(f"{count:,}: {100 * agreement:.0f}" for count, agreement in last.items())
            lines.append(f"| {attack} | {told} |")
    lines += ["", "### Defences", ""]
    lines += [
        f"What `noise_pool` makes of {few:,} answers, seed 0, and what the answers are still good for. "
        "The attack is always the same; one that takes labels alone is not hindered at all (row `noise_pool, labels`).",
        "",
    ]
    lines += [
        "| defence | student's accuracy | its agreement | teacher's accuracy | NLL | ECE, % |",
        "|---|---|---|---|---|---|",
    ]
    for name, defence in DEFENCES.items():
        row = found.get(f"{name}|{few}|0" if defence else f"noise_pool|{few}|0")
        if row:
            left = useful(defence)
            cells = f"{row['accuracy']:.1f} | {row['agreement']:.1f} | {left['accuracy']:.1f}"
            lines.append(f"| {name} | {cells} | {left['nll']:.3f} | {left['ece']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "distill_black_box")
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", "")))
    parser.add_argument("--queries", type=int, nargs=2, default=(25_000, 100_000))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--write", action="store_true", help="write the page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    kept = given.work / "results.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for key, attack, queries, seed, defence in wanted(given.queries, given.seeds):
        if key not in found:
            found[key] = attacked(attack, queries, seed, defence, given)
            kept.write_text(json.dumps(found))
            row = found[key]
            print(f"{key}: {row['accuracy']:.1f} % in {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    text = page(found, given.queries, given.seeds)
    print(text)
    if given.write:
        PAGE.write_text(f"{introduction()}\n{text}", encoding="utf-8")


def introduction() -> str:
    """Return the head of the page."""
    return f"""# Learning from answers alone

`benchmarks/distill_black_box.py --write`. The teacher reads scikit-learn's digits (8 x 8 pixels) and is behind a handle
that gives probabilities, or labels. The student has half its width. Every student takes {STEPS} steps, or as many as
it takes to spend the queries; all other settings are the defaults. The last weights count: nothing is chosen by
accuracy. `knockoff` learns from other people's digits (MNIST, margins cut off), which is the same task; all others
from nothing.
"""


if __name__ == "__main__":
    main()
