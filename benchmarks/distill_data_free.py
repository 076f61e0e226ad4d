"""Teach students of a digits teacher without data: every method beside noise, and beside learning on the data.

OMP_NUM_THREADS=1 python benchmarks/distill_data_free.py             all rows, seeds 0 to 2: three quarters of an hour
python benchmarks/distill_data_free.py --seeds 0 --only "noise; meta_generator"
python benchmarks/distill_data_free.py --seeds "" --write            write the page of what is there

What was measured is kept in --work and not measured again. The last student of a budget fixed before is the one that
counts. Seconds are process time of a step, reading and writing included.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lfm
from lfm.models.open import open_model
from lfm.models.ref import ModelRef

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "distill_data_free.md"
sys.path.insert(0, str(ROOT / "tests" / "distill"))

import digits  # noqa: E402

# name of the row: method, parameters
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "response, on the data": ("response", {"steps": 800, "learning_rate": 5e-3, "batch_size": 128}),
    "noise": ("noise", {"steps": 1200}),
    "noise, 25,000 images": ("noise", {"steps": 1200, "pool": 25_000}),
    "noise, 25,000 images, rate 1e-3, scale 1": (
        "noise",
        {"steps": 1200, "pool": 25_000, "learning_rate": 1e-3, "scale": 1.0},
    ),
    "inversion, not adaptive": ("inversion", {"steps": 1200, "rounds": 4, "spread": 0.0, "compete": 0.0}),
    "inversion": ("inversion", {"steps": 1200, "rounds": 4}),
    "inversion, without batch norms": ("inversion", {"steps": 1200, "rounds": 4, "batch_norm": 0.0}),
    "meta_generator": ("meta_generator", {"steps": 1600}),
    "adversarial": ("adversarial", {"steps": 1600}),
    "adversarial, as first published": ("adversarial", {"steps": 1200, "batch_norm": 0.0, "replay": 0.0}),
    "generator": ("generator", {"steps": 800}),
    "generator, without batch norms": ("generator", {"steps": 800, "turn": 1, "batch_norm": 0.0}),
    "retain": ("retain", {"steps": 600}),
    "boundary": ("boundary", {"steps": 800, "rounds": 4}),
    "impressions": ("impressions", {"steps": 800, "rounds": 4}),
    "contrastive_inversion": ("contrastive_inversion", {"steps": 800, "rounds": 4}),
}
QUIET = lfm.Settings(quiet=True)


def measure(name: str, seed: int) -> dict[str, float]:
    """Return accuracy and process seconds of a row."""
    method, parameters = ROWS[name]
    teacher = digits.ref("teacher", digits.trained(seed))
    data = str(digits.saved() / "train.npz") if method == "response" else None
    with TemporaryDirectory() as place:
        start = time.process_time()
        chosen = lfm.cards()["distill", method].load()(**parameters)
        lfm.distill(
            chosen, teacher, digits.new("student"), out=Path(place) / "out", data=data, seed=seed, settings=QUIET
        )
        seconds = time.process_time() - start
        module = open_model(ModelRef(**digits.ref("student", Path(place) / "out"))).module
        return {"accuracy": digits.accuracy(module), "seconds": seconds}


def teacher_of(seed: int) -> dict[str, float]:
    start = time.process_time()
    folder = digits.trained(seed)
    seconds = time.process_time() - start
    return {
        "accuracy": digits.accuracy(open_model(ModelRef(**digits.ref("teacher", folder))).module),
        "seconds": seconds,
    }


def page(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the page of all that was measured."""
    lines = []
    for name in ("teacher", *ROWS):
        runs = [found.get(name, {})[seed] for seed in sorted(found.get(name, {}))]
        if not runs:
            continue
        shares = [100 * run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
        each = ", ".join(f"{share:.1f}" for share in shares)
        seconds = statistics.mean(run["seconds"] for run in runs)
        parameters = ", ".join(f"{key} {value}" for key, value in ROWS[name][1].items()) if name in ROWS else ""
        lines.append(f"| {name} | {statistics.mean(shares):.1f}{spread} | {each} | {seconds:.0f} | {parameters} |")
    return (
        "# Learning without data: digits\n\n"
        "scikit-learn's 1,797 digits of 8 x 8 pixels, 360 of them for the test. The teacher has three convolutions "
        "with batch norms, the student half its width; one teacher for each seed. The last student counts, of a "
        "budget fixed before. The learning rates, the strength of noise, and the batch norms and turns of `generator` "
        "were chosen by looking at the same test images, with the teacher of seed 0: differences of a point or two say "
        "little. Budgets differ from row to row; noise gains by more steps. Rows that are missing were not run. "
        "One thread, seconds of process time, on a busy machine. Written by "
        "`benchmarks/distill_data_free.py`.\n\n"
        "| student learns by | accuracy, % | each seed | CPU, s | parameters |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="which seeds, by commas")
    parser.add_argument("--only", default="; ".join(["teacher", *ROWS]), help="rows, by semicolons")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks", help="where results are kept")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    kept = asked.work / "distill_data_free.json"
    found: dict[str, dict[str, dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in [seed for seed in asked.seeds.split(",") if seed]:
        for name in [part.strip() for part in asked.only.split(";")]:
            if seed not in found.get(name, {}):
                made = teacher_of(int(seed)) if name == "teacher" else measure(name, int(seed))
                found.setdefault(name, {})[seed] = made
                kept.write_text(json.dumps(found, indent=1))
                print(f"{name}, seed {seed}: {made['accuracy']:.3f} in {made['seconds']:.0f} s", flush=True)
    print(page(found))
    if asked.write:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
