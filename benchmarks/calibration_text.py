"""Calibrate ensembles of language models: by held-out text, by what their members write, not at all.

python benchmarks/calibration_text.py              tune the members if need be, measure, print; minutes on one core
python benchmarks/calibration_text.py --write      and write benchmarks/calibration_text.md

The tuned members are kept in the work folder.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import lfm
from lfm.data import Rows
from lfm.models.encode import IGNORE
from lfm.models.handle import Model
from lfm.recipe.step import Settings
from lfm.reuse.ensemble.average import Average
from lfm.tune.weights.full import Full

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "calibration_text.md"
QUIET = Settings(quiet=True)
LENGTH = 128
PIECE = 800  # characters of a text
STORIES, SPEECHES = "stories", "Shakespeare"


@dataclass(frozen=True)
class Texts:
    """Texts of one kind: to tune a member on, to fit a temperature to, to measure on."""

    train: list[str]
    choose: list[str]
    test: list[str]


def texts(assets: Path) -> dict[str, Texts]:
    """Return stories and speeches, cut into pieces of about one length."""
    found = json.loads((assets / "data" / "tinystories-600.json").read_text())
    stories = [(story if isinstance(story, str) else story["text"]).strip()[:PIECE] for story in found]
    whole = (assets / "data" / "tiny-shakespeare.txt").read_text()
    speeches = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
    return {
        STORIES: Texts(stories[:440], stories[440:520], stories[520:]),
        SPEECHES: Texts(speeches[:-160], speeches[-160:-80], speeches[-80:]),
    }


def tuned(base: Path, kind: str, some: Texts, work: Path, steps: int) -> Path:
    """Return stories260k, trained further on texts of one kind."""
    out = work / f"stories260k-{kind}-{steps}"
    if not out.is_dir():
        data = work / f"{kind}.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        data.write_text("\n".join(json.dumps({"text": text}) for text in some.train))
        lfm.tune(Full(steps=steps, learning_rate=1e-3), base, data, out=out, length=LENGTH, settings=QUIET)
    return out


# --- measuring ------------------------------------------------------------------------------------------------------


def losses(model: Model, some: Sequence[str]) -> torch.Tensor:
    """Return the negative log-likelihood of every token, in nats."""
    examples = model.encoder.encode(Rows({"text": list(some)}, "texts"), LENGTH)
    found = []
    for start in range(0, len(examples), 32):
        batch = examples.batch(range(start, min(start + 32, len(examples))))
        wanted = batch["labels"][:, 1:]
        said = model.log_probs(batch)[:, :-1].gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
        found.append(-said[wanted != IGNORE].double())
    return torch.cat(found)


def measured(
    pair: Sequence[Path], of: str, kinds: Sequence[str], all_of: dict[str, Texts], work: Path, seed: int
) -> Iterator[tuple[str, float, float, float]]:
    """Yield for each way to calibrate: its temperature, the loss on the test texts, half of its 95 % interval."""
    held = work / f"held-{'-'.join(kinds)}.jsonl"
    held.write_text("\n".join(json.dumps({"text": text}) for kind in kinds for text in all_of[kind].choose))
    test = [text for kind in kinds for text in all_of[kind].test]
    for name, how in (
        ("not at all", {}),
        ("by what the members write", {"calibrate": "ensemble"}),
        ("by held-out text", {"calibrate": "ensemble", "data": held}),
    ):
        out = work / "ensembles" / f"{'+'.join(p.name for p in pair)}-{of}-{'-'.join(kinds)}-{len(how)}"
        model = lfm.ensemble(
            Average(of=of), pair, out=out, length=LENGTH, seed=seed, overwrite=True, settings=QUIET, **how
        )
        metrics = json.loads((out / "lineage.json").read_text())["metrics"]
        found = losses(model, test)
        half = 1.96 * float(found.std()) / len(found) ** 0.5
        yield name, metrics.get("temperature", 1.0), float(found.mean()), half


def page(rows: list[tuple[str, ...]], steps: int) -> str:
    """Return the table as a page."""
    head = ("members", "averaged", "text", "calibrated", "temperature", "NLL, nats a token")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return (
        "# Calibrating language models that are joined\n\n"
        "Written by `benchmarks/calibration_text.py`. Averages of stories260k with that model tuned on stories, or on "
        f"Shakespeare ({steps} steps each), joined token by token. The temperature is fitted to "
        "8,192 tokens that the members write by themselves (`calibrate: ensemble` without `data`), or to held-out "
        "text of the kind that is measured. NLL with its 95 % interval over tokens, on texts that nothing was fitted "
        "to; stories260k was trained on this kind of stories, perhaps on these.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", "/work/shared/assets")))
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks" / "calibration")
    options.add_argument("--steps", type=int, default=600, help="steps that members are tuned for")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    asked = options.parse_args()
    torch.set_num_threads(1)
    base = asked.assets / "checkpoints" / "stories260k"
    all_of = texts(asked.assets)
    made = {kind: tuned(base, kind, some, asked.work, asked.steps) for kind, some in all_of.items()}
    both, alike = f"stories260k, {SPEECHES}", f"stories260k, {STORIES}"
    settings = [
        (both, made[SPEECHES], "probabilities", (STORIES, SPEECHES)),
        (both, made[SPEECHES], "probabilities", (STORIES,)),
        (both, made[SPEECHES], "probabilities", (SPEECHES,)),
        (alike, made[STORIES], "probabilities", (STORIES,)),
        (both, made[SPEECHES], "logits", (STORIES, SPEECHES)),
        (both, made[SPEECHES], "logits", (STORIES,)),
    ]
    rows = []
    for members, other, of, kinds in settings:
        for name, temperature, loss, half in measured([base, other], of, kinds, all_of, asked.work, asked.seed):
            cells = (members, of, " and ".join(kinds), name, f"{temperature:.3f}", f"{loss:.4f} ± {half:.4f}")
            print(*cells, sep=" | ", flush=True)
            rows.append(cells)
    told = page(rows, asked.steps)
    if asked.write:
        PAGE.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main()
