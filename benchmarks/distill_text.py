"""Distill stories260k into a third of its size: what each rung of access to the teacher is worth, and what it takes.

python benchmarks/distill_text.py                     everything, minutes on one core; print
python benchmarks/distill_text.py --write             and write benchmarks/distill_text.md
python benchmarks/distill_text.py --only ladder --seeds 1 --steps 50      a quick look
python benchmarks/distill_text.py --trl PYTHON        beside TRL's GKD trainer, run by that interpreter
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lfm
from lfm.distill._texts import continued
from lfm.distill.response import Response
from lfm.distill.text.gkd import Gkd
from lfm.distill.text.self_generated import SelfGenerated
from lfm.models.shrink import shrink
from lfm.models.text import Sampling
from lfm.models.writing import ModuleStepper
from lfm.recipe.step import Settings
from lfm.tune.weights.full import Full

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "distill_text.md"
QUIET = Settings(quiet=True)
LENGTH = 256
BATCH = 4
RATE = 5e-3
TEXTS = 384  # that the teacher writes


class Bench:
    """The teacher, the student, and the stories that neither learns from."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self.folder = folder
        self.teacher = str(assets / "checkpoints" / "stories260k")
        self.student = str(folder / "student")
        stories = {"path": str(assets / "data" / "tinystories-600.json"), "held_out": 0.2}
        self.train = {**stories, "part": "train"}
        self.held_out = {**stories, "part": "held_out"}
        self.noise = {"path": str(self._noise())}
        made = shrink(lfm.load(self.teacher), layers=1)
        made.module.save_pretrained(self.student)
        made.encoder.tokenizer.save_pretrained(self.student)

    def _noise(self) -> Path:
        """Write texts of random tokens, as many as a budget of steps reads once."""
        tokenizer = lfm.load(self.teacher).encoder.tokenizer
        generator = torch.Generator().manual_seed(0)
        path = self.folder / "noise.jsonl"
        ids = torch.randint(259, len(tokenizer), (TEXTS, 300), generator=generator)
        texts = tokenizer.batch_decode(ids)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    def loss(self, model: Any) -> float:
        """Return the mean loss per token of the held-out stories."""
        model = lfm.load(model) if isinstance(model, str) else model
        examples = model.encoder.encode(lfm_rows(self.held_out), LENGTH)
        total = count = 0.0
        for first in range(0, len(examples), 16):
            batch = examples.batch(range(first, min(first + 16, len(examples))))
            said, labels = model.logits(batch)[:, :-1], batch["labels"][:, 1:]
            total += float(torch.nn.functional.cross_entropy(said.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
        return total / count


def lfm_rows(spec: dict[str, Any]) -> Any:
    from lfm.data import DataSpec, read

    return read(DataSpec.model_validate(spec))


# --- the ladder -----------------------------------------------------------------------------------------------------


def rungs(bench: Bench, steps: int) -> dict[str, Callable[[str, int], Any]]:
    """Return what teaches a student, by name: each takes a folder and a seed."""
    shared = {"steps": steps, "batch_size": BATCH, "learning_rate": RATE}

    def tuned(out: str, seed: int) -> Any:
        return lfm.tune(Full(**shared), bench.student, bench.train, out=out, length=LENGTH, seed=seed, settings=QUIET)

    def taught(method: Any, data: Any = None) -> Callable[[str, int], Any]:
        return lambda out, seed: lfm.distill(
            method, bench.teacher, bench.student, out=out, data=data, length=LENGTH, seed=seed, settings=QUIET
        )

    kd = Response(temperature=1.0, alpha=1.0, **shared)
    own = {**shared, "count": TEXTS}
    return {
        "real text, no teacher": tuned,
        "real text, KD": taught(kd, bench.train),
        "self-generated, logits": taught(SelfGenerated(answers="logits", **own)),
        "self-generated, top 8 + tail": taught(SelfGenerated(answers="top_k", top_k=8, **own)),
        "self-generated, text alone": taught(SelfGenerated(answers="text", **own)),
        "random tokens, KD (control)": taught(kd, bench.noise),
    }


def ladder(bench: Bench, steps: int, seeds: int) -> list[str]:
    """Return the table of all rungs at equal steps."""
    lines = [
        f"## The ladder: {steps} steps of {BATCH} texts of {LENGTH} tokens",
        "",
        f"Held-out stories, nats per token; the teacher has {bench.loss(bench.teacher):.3f}.",
        "",
        f"| student learns from | mean | {' | '.join(f'seed {seed}' for seed in range(seeds))} | CPU seconds |",
        f"|---|---|{'---|' * seeds}---|",
    ]
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, teach in rungs(bench, steps).items():
            started = time.process_time()
            out = str(bench.folder / f"{name} {seed} {steps}")
            teach(out, seed)
            seconds.setdefault(name, []).append(time.process_time() - started)
            losses.setdefault(name, []).append(bench.loss(out))
            print(
                f"{name}, seed {seed}: {losses[name][-1]:.3f} in {seconds[name][-1]:.0f} s", file=sys.stderr, flush=True
            )
    for name, found in losses.items():
        each = " | ".join(f"{loss:.3f}" for loss in found)
        lines.append(f"| {name} | {statistics.mean(found):.3f} | {each} | {statistics.mean(seconds[name]):.0f} |")
    return lines


def crossing(bench: Bench, budgets: list[int]) -> list[str]:
    """Return from which budget on real text without a teacher is worth more than the teacher's own text."""
    names = ("real text, no teacher", "self-generated, logits", "self-generated, text alone")
    lines = ["## Until when: more steps, seed 0", "", f"| steps | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for steps in budgets:
        losses = []
        for name in names:
            out = str(bench.folder / f"{name} 0 {steps}")
            if not Path(out).exists():
                rungs(bench, steps)[name](out, 0)
            losses.append(bench.loss(out))
        print(steps, losses, file=sys.stderr, flush=True)
        lines.append(f"| {steps:,} | {' | '.join(f'{loss:.3f}' for loss in losses)} |")
    return lines


# --- speed ----------------------------------------------------------------------------------------------------------


def sampling(bench: Bench, length: int = 256, texts: int = 32) -> list[str]:
    """Return tokens per second of sampling with and without the cache of keys and values."""
    module = lfm.load(bench.teacher).module
    lines = ["## Sampling", "", "| | tokens per CPU second |", "|---|---|"]
    for name, cached in (("with a cache of keys and values", True), ("without", False)):
        stepper = ModuleStepper(module) if cached else _Forgetful(module)
        draws = [torch.Generator().manual_seed(text) for text in range(texts)]
        started = time.process_time()
        made = continued(stepper, [[1]] * texts, length, Sampling(temperature=1.0), draws, frozenset({2}))
        rate = sum(len(tokens) for tokens, _ in made) / (time.process_time() - started)
        lines.append(f"| {name}, {texts} texts of {length} tokens at a time | {rate:,.0f} |")
    return lines


def cache(bench: Bench, steps: int = 100) -> list[str]:
    """Return what a step costs with the teacher in it, and by its answers on disk, and how large these are."""
    lines = [
        f"## The teacher's answers on disk: {steps} steps of {BATCH} texts of {LENGTH} tokens",
        "",
        "| | CPU seconds | tokens per CPU second | bytes per token |",
        "|---|---|---|---|",
    ]
    shared = {"steps": steps, "batch_size": BATCH, "learning_rate": RATE, "temperature": 1.0, "alpha": 1.0}
    kinds: dict[str, Response] = {
        "the teacher in every step": Response(**shared),
        "answers computed, then read (k = 16)": Response(top_k=16, cache_teacher=True, **shared),
        "answers read (k = 16)": Response(top_k=16, cache_teacher=True, **shared),
    }
    for name, method in kinds.items():
        out = bench.folder / name
        started = time.process_time()
        lfm.distill(method, bench.teacher, bench.student, out=out, data=bench.train, length=LENGTH, settings=QUIET)
        seconds = time.process_time() - started
        metrics = json.loads((out / "lineage.json").read_text())["metrics"]
        size = metrics.get("cache_bytes_per_token")
        told = "" if size is None else f"{size:.0f} of {metrics['full_bytes_per_token']:.0f}"
        lines.append(f"| {name} | {seconds:.1f} | {steps * BATCH * LENGTH / seconds:,.0f} | {told} |")
    return lines


class _Forgetful(ModuleStepper):
    """Reads the whole text for every token."""

    def _kept(self, made: Any) -> None:
        return None


def gkd_beside_trl(bench: Bench, python: str, steps: int = 30) -> list[str]:
    """Return the speed of on-policy distillation, and of TRL's trainer with the same models, prompts and lengths."""
    rows = lfm_rows({**bench.train, "limit": 64}).columns["text"]
    data = bench.folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": r[:60], "completion": r[60:400]}) + "\n" for r in rows))
    shared = {"steps": steps, "batch_size": BATCH, "learning_rate": 1e-3, "lmbda": 1.0, "max_new_tokens": 64}
    started = time.process_time()
    lfm.distill(Gkd(**shared), bench.teacher, bench.student, out=bench.folder / "gkd", data=str(data), settings=QUIET)
    ours = time.process_time() - started
    lines = [f"## On-policy, {steps} steps of {BATCH} texts of 64 new tokens", "", "| | CPU seconds |", "|---|---|"]
    lines.append(f"| lfm, gkd (models loaded and saved) | {ours:.1f} |")
    script = ROOT / "benchmarks" / "_trl_gkd.py"
    done = subprocess.run(
        [python, str(script), bench.teacher, bench.student, str(data), str(steps), str(BATCH)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    told = done.stdout.strip().splitlines()[-1:] or ["failed"]
    lines.append(f"| trl 1.16.0, GKDTrainer (training alone) | {told[0]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="+", default=["ladder", "crossing", "sampling", "cache"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--budgets", type=int, nargs="+", default=[400, 1200])
    parser.add_argument("--trl", help="interpreter that has trl 1.16.0")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    work = tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = work.name  # nobody's answers but our own
    assets = Path(os.environ.get("LFM_ASSETS", ROOT.parent / "shared" / "assets"))
    with work as folder:
        bench = Bench(assets, Path(folder))
        parts: dict[str, Callable[[], list[str]]] = {
            "ladder": lambda: ladder(bench, asked.steps, asked.seeds),
            "crossing": lambda: crossing(bench, asked.budgets),
            "sampling": lambda: sampling(bench),
            "cache": lambda: cache(bench),
        }
        found = [parts[name]() for name in asked.only if name in parts]
        if asked.trl:
            found.append(gkd_beside_trl(bench, asked.trl))
    text = "\n\n".join("\n".join(lines) for lines in found)
    print(text)
    if asked.write:
        PAGE.write_text(f"# Distilling a language model\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
