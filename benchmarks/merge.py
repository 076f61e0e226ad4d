"""Measure `lfm merge` beside mergekit: same inputs, same settings, whole processes, by turns.

python benchmarks/merge.py                                  everything; takes an hour or two, most of it mergekit's
python benchmarks/merge.py --methods linear2,ties --repeats 5
python benchmarks/merge.py --sizes tiny                     whether all of it works
python benchmarks/merge.py --big 3B                         memory of a merge of large models, lfm alone
"""

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _checkpoints
import _mergekit
import _tables
from _compare import compare
from _merges import BIG, CASES, Case
from _processes import MB, RunFailed, Usage, machine, measure, warm

HERE = Path(__file__).parent
SIZES = {
    "334M": _checkpoints.llama(1024, 4096, 16, 16, 16, 32000, 250_000_000),
    "tiny": _checkpoints.llama(64, 256, 4, 4, 4, 1000, 400_000),
    "3B": _checkpoints.llama(3072, 8192, 28, 24, 8, 32000, 2_500_000_000),
}
Row = dict[str, Any]


def aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: the memory of this one is the least that any child is said to have."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def disk_size(folder: Path) -> int:
    """Return the bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Bench:
    """Where things are, and how often to measure."""

    work: Path
    lfm: Path
    venv: Path | None
    only: str | None
    size: str
    tensors: int
    repeats: int
    compares: bool

    def models(self, case: Case) -> dict[str, Path]:
        """Return the checkpoints of a case, made if they are not there."""
        shapes = {
            "llama": (self.size, SIZES[self.size]),
            "many": (f"{self.tensors}-tensors", _checkpoints.plain(self.tensors)),
            "mixture": ("experts", _checkpoints.mixture()),
        }
        name, shape = shapes[case.layout]
        made: dict[str, Path] = aside(_checkpoints.make, self.work / name, shape)
        return made

    def ours(self, case: Case, label: str, models: dict[str, Path], out: Path) -> list[str | Path]:
        """Return lfm's command."""
        base = ("--base", models["base"]) if case.base else ()
        sources = [models[name] for name in case.sources]
        return [self.lfm, "merge", case.method, *sources, *base, *case.ours[label], "-o", out, "--quiet"]

    @property
    def cache(self) -> Path:
        """The cache folder that lfm keeps between runs."""
        return self.work / "cache"

    @contextmanager
    def caches_without_digests(self) -> Iterator[Path]:
        """Give a copy of the cache that knows none of the inputs."""
        fresh = self.work / "cache-new"
        shutil.rmtree(fresh, ignore_errors=True)
        if self.cache.exists():
            shutil.copytree(self.cache, fresh, ignore=shutil.ignore_patterns("digests"))
        yield fresh
        shutil.rmtree(fresh, ignore_errors=True)

    def run_ours(self, case: Case, label: str, models: dict[str, Path], out: Path, *, known: bool) -> Usage:
        """Run lfm; `known`: on inputs whose digests are in its cache."""
        command = self.ours(case, label, models, out)
        if known:
            return measure(command, {"XDG_CACHE_HOME": str(self.cache)})
        with self.caches_without_digests() as fresh:
            return measure(command, {"XDG_CACHE_HOME": str(fresh)})


def run_case(bench: Bench, case: Case) -> list[Row]:
    """Measure a case and return its rows, one for each way that lfm does it."""
    models = bench.models(case)
    warm(path for name in case.inputs for path in sorted(models[name].glob("*.safetensors")))
    rows = [_row(case, label, models) for label in case.ours]
    out = bench.work / "out"
    peer = bench.venv if case.with_peer and bench.only != "ours" else None
    if peer and bench.compares and bench.only != "peer":
        rows[0]["difference"] = _difference(bench, peer, case, models)
    for repeat in range(bench.repeats):
        if peer and repeat < (case.peer_repeats or bench.repeats):
            used = _attempt(rows[0], "peer", out, lambda: measure(_mergekit.command(peer, case, models, out)))
            for row in rows[1:]:
                row["runs"]["peer"] = rows[0]["runs"]["peer"]
            print(f"  {case.name}: mergekit {used}", file=sys.stderr)
        for row in rows if bench.only != "peer" else ():
            _measure_ours(bench, case, row, models, out)
    return rows


def _measure_ours(bench: Bench, case: Case, row: Row, models: dict[str, Path], out: Path) -> None:
    def run(known: bool) -> Usage:
        return bench.run_ours(case, row["label"], models, out, known=known)

    if not row["runs"]["known"] and not row["errors"]:  # fills the caches; not counted
        _attempt({"errors": row["errors"], "runs": {"known": []}}, "known", out, lambda: run(True))
    for lane in ("new", "known"):
        if not row["errors"].get("known"):
            used = _attempt(row, lane, out, lambda lane=lane: run(lane == "known"))
            print(f"  {case.name} {row['label']}: lfm, {lane} inputs, {used}", file=sys.stderr)


def _row(case: Case, label: str, models: dict[str, Path]) -> Row:
    read = sum(disk_size(models[name]) for name in case.inputs)
    return {
        "name": case.name,
        "label": label,
        "random": case.random,
        "read_mb": round(read / MB, 1),
        "runs": {"peer": [], "new": [], "known": []},
        "errors": {},
    }


def _attempt(row: Row, lane: str, out: Path, run: Callable[[], Usage]) -> str:
    """Measure one run into a row, or note why it failed; remove its output."""
    try:
        used = run()
    except RunFailed as error:
        row["errors"][lane] = str(error)
        return str(error)
    finally:
        if out.exists():
            row.setdefault("written_mb", round(disk_size(out) / MB, 1))
        shutil.rmtree(out, ignore_errors=True)
    row["runs"][lane].append(used.rounded())
    return (
        f"{used.wall:.2f} s wall, {used.cpu:.2f} s CPU, {used.rss:.0f} MB resident, {used.anonymous:.0f} MB anonymous"
    )


def _difference(bench: Bench, venv: Path, case: Case, models: dict[str, Path]) -> dict[str, Any]:
    """Merge with both, mergekit in float32 as lfm always does, and compare what they wrote."""
    ours, peer = bench.work / "out-ours", bench.work / "out-peer"
    try:
        bench.run_ours(case, next(iter(case.ours)), models, ours, known=True)
        measure(_mergekit.command(venv, case, models, peer, exact=True))
        found: dict[str, Any] = aside(compare, ours, peer, models["base" if case.base else "a"])
    except (RunFailed, ValueError) as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(ours, ignore_errors=True)
        shutil.rmtree(peer, ignore_errors=True)
    return found


def run_limits(bench: Bench) -> list[Row]:
    """Measure what reading one, two or three models and writing one costs at least: cat and cp."""
    models = bench.models(CASES["linear2"])
    out, script = bench.work / "out", 'out=$1; model=$2; shift 2; cat "$@" > /dev/null && cp -r "$model" "$out"'
    rows = []
    for count in (1, 2, 3):
        files = [path for name in ("a", "b", "base")[:count] for path in sorted(models[name].glob("*.safetensors"))]
        warm(files)
        command = ["/bin/sh", "-c", script, "limit", out, models["a"], *files]
        row: Row = {"models": count, "runs": {"limit": []}, "errors": {}}
        for _ in range(bench.repeats):
            _attempt(row, "limit", out, lambda command=command: measure(command))
        rows.append(row)
    return rows


def environment(bench: Bench) -> dict[str, Any]:
    """Return what the numbers belong to."""
    said = subprocess.run([bench.lfm, "--version"], capture_output=True, text=True, check=False).stdout
    ours = f"lfm {said.split()[-1]}" if said.split() else "lfm"
    peer = _mergekit.versions(bench.venv) if bench.venv else {}
    return {"machine": machine(), "lfm": ours, "mergekit": peer}


def earlier(results: Path | None, bench: Bench) -> dict[str, Any]:
    """Return what the results file holds, with nothing that belongs to another machine, version or size."""
    about = environment(bench)
    nothing: dict[str, Any] = {"environment": about, "size": "", "rows": [], "limits": [], "big": []}
    if results is None or not results.exists():
        return nothing
    found: dict[str, Any] = json.loads(results.read_text())
    there = found["environment"]
    if (there["machine"], there["lfm"]) != (about["machine"], about["lfm"]):
        return nothing
    if about["mergekit"] not in ({}, there["mergekit"]):
        if there["mergekit"]:
            return nothing
        there["mergekit"] = about["mergekit"]
    return found


def joined(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return rows with new ones in the place of old ones; a side not measured this time keeps its runs, marked."""
    was = {(row["name"], row["label"]): row for row in old}
    for row in new:
        before = was.pop((row["name"], row["label"]), None)
        for lane, runs in before["runs"].items() if before else ():
            if runs and not row["runs"][lane] and lane not in row["errors"]:
                row["runs"][lane], row["apart"] = runs, True
    return [*was.values(), *new]


def run(bench: Bench, names: Sequence[str], results: Path | None) -> dict[str, Any]:
    """Measure the named cases; rows that the results file has already are kept unless they are measured again."""
    found = earlier(results, bench)
    size = f"{bench.size}, {bench.tensors}"
    if found["size"] != size:
        found |= {"size": size, "rows": [], "limits": []}
    found["limits"] = run_limits(bench)
    for name in names:
        print(name, file=sys.stderr)
        found["rows"] = joined(found["rows"], run_case(bench, CASES[name]))
        _keep(found, results)
    return found


def run_big(bench: Bench, results: Path | None) -> dict[str, Any]:
    """Measure lfm's memory on large models, and delete them."""
    found = earlier(results, bench)
    needed = 5 * 2 * SIZES[bench.size].parameters
    free = shutil.disk_usage(bench.work).free
    if free < needed:
        sys.exit(
            f"--big {bench.size} needs {needed / 1e9:.0f} GB of disk in {bench.work}, which has {free / 1e9:.0f} GB"
        )
    try:
        found["big"] = [row for case in BIG for row in run_case(bench, case)]
    finally:
        shutil.rmtree(bench.work / bench.size, ignore_errors=True)
    _keep(found, results)
    return found


def _keep(found: dict[str, Any], results: Path | None) -> None:
    if results:
        results.write_text(json.dumps(found, indent=1) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(CASES), help="cases to measure (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts (default: 3)")
    parser.add_argument("--mergekit", type=Path, help="virtual environment with mergekit; made if left out")
    parser.add_argument("--lfm", type=Path, default=Path(sys.executable).parent / "lfm", help="the lfm command")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="folder for checkpoints and outputs")
    parser.add_argument("--sizes", choices=["334M", "tiny"], default="334M", help="size of the models (default: 334M)")
    parser.add_argument("--tensors", type=int, default=8000, help="tensors of the case tiny_tensors (default: 8000)")
    parser.add_argument("--only", choices=["ours", "peer"], help="measure one of the two")
    parser.add_argument("--no-compare", action="store_true", help="do not compare what the two wrote")
    parser.add_argument("--big", choices=["3B"], help="measure lfm's memory on models of that size instead")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep results here; earlier ones of this machine stay"
    )
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/merge.md")
    options = parser.parse_args(arguments)
    options.methods = [name for name in options.methods.split(",") if name]
    if unknown := [name for name in options.methods if name not in CASES]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(CASES)}")
    return options


def main() -> None:
    options = parse()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    peer = not options.big and options.only != "ours"
    bench = Bench(
        work=work,
        lfm=options.lfm.absolute(),
        venv=_mergekit.install((options.mergekit or work / "mergekit").absolute()) if peer else None,
        only="ours" if options.big else options.only,
        size=options.big or options.sizes,
        tensors=options.tensors,
        repeats=1 if options.big else options.repeats,
        compares=not options.no_compare,
    )
    found = run_big(bench, options.json) if options.big else run(bench, options.methods, options.json)
    page = _tables.page(found)
    print(page)
    if options.write:
        (HERE / "merge.md").write_text(page)


if __name__ == "__main__":
    main()
