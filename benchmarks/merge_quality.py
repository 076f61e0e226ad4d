"""Merge real fine-tunes with every method, and put what comes out beside controls.

python benchmarks/merge_quality.py                            both families, every method that fits
python benchmarks/merge_quality.py --families vision --methods ties,linear
python benchmarks/merge_quality.py --write                    and write the tables into benchmarks/README.md

Fine-tunes and measurements are kept in the work folder; a second run merges anew and measures what has changed.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _quality_tables
import torch
from _family import Family
from _language import Language
from _scores import Measured
from _search import Examined, Merges, examine, left_out
from _vision import Vision

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- merge_quality.py: begin -->", "<!-- merge_quality.py: end -->"
FAMILIES: dict[str, type[Family]] = {"language": Language, "vision": Vision}


def in_parallel(jobs: int, work: Sequence[tuple[Callable[..., Any], Any, Any]]) -> list[Any]:
    """Return what each function gives for its two arguments; each process computes with one thread."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return [future.result() for future in [pool.submit(function, *arguments) for function, *arguments in work]]


def make(family: Family, task: str) -> None:
    """Make a fine-tune, and say how long that took."""
    started = time.monotonic()
    family.make(task)
    print(f"  {family.name}, {task}: {time.monotonic() - started:.0f} s", file=sys.stderr)


def run_method(family: Family, method: str) -> Examined:
    """Examine a method, and say how long that took."""
    found = examine(family, method)
    print(f"  {family.name}, {method}: {found.seconds:.0f} s {found.error}", file=sys.stderr)
    return found


def run_controls(family: Family, _: str) -> tuple[dict[str, Measured], dict[str, dict[str, Measured]]]:
    """Measure what takes no merge but the plainest."""
    controls: dict[str, dict[str, Measured]] = {}
    for variant in family.variants:
        models = {"base": family.base, **{f"tuned on {task}": family.source(task) for task in family.tasks}}
        controls[variant] = {name: family.known(path, "test", variant) for name, path in models.items()}
        with Merges.temporary(family, "linear") as merges:
            controls[variant]["average"] = merges.measure({}, "test", variant)
    ensemble = {task: family.ensemble(task, "test") for task in family.measured_on("test")}
    controls[family.variants[0]]["ensemble of the sources"] = ensemble
    by_task = {task: family.guesses(task) for task in family.measured_on("test")}
    names = next(iter(by_task.values()))
    return {name: {task: by_task[task][name] for task in by_task} for name in names}, controls


def results(families: Sequence[Family], names: list[str] | None, jobs: int) -> list[_quality_tables.Results]:
    """Make what is missing, and measure everything."""
    in_parallel(jobs, [(make, family, task) for family in families for task in family.tasks])
    reasons = left_out(names, 3)
    methods = [name for name, why in reasons.items() if not why]
    work = [(run_controls, family, "") for family in families]
    work += [(run_method, family, method) for method in methods for family in families]
    found = in_parallel(jobs, work)
    controls, examined = found[: len(families)], found[len(families) :]
    return [
        _quality_tables.Results(
            family,
            *controls[place],
            examined[place :: len(families)],
            {name: why for name, why in reasons.items() if why},
        )
        for place, family in enumerate(families)
    ]


def write(tables: str) -> None:
    """Put the tables between the two marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{PAGE} has no place for the tables: put the lines\n{BEGIN}\n{END}\nwhere they belong")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, checked."""
    assets = ROOT / os.environ.get("LFM_ASSETS", "../shared/assets")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="which models (default: %(default)s)")
    parser.add_argument("--methods", help="merges to run, by name (default: every one that fits)")
    parser.add_argument("--assets", type=Path, default=assets, help="checkpoints and data (default: $LFM_ASSETS)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder for what is made")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes beside each other")
    parser.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    options = parser.parse_args(arguments)
    options.families = options.families.split(",")
    if unknown := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"unknown families {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    options.methods = options.methods.split(",") if options.methods else None
    if not options.assets.is_dir():
        parser.error(f"no assets at {options.assets}; name their folder in LFM_ASSETS or with --assets")
    return options


def main() -> None:
    options = parse()
    assets, work = options.assets.resolve(), options.work.resolve()
    families = [FAMILIES[name](assets, work / name) for name in options.families]
    tables = _quality_tables.page(results(families, options.methods, options.jobs))
    print(tables)
    if options.write:
        write(tables)


if __name__ == "__main__":
    main()
