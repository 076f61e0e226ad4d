"""Results of benchmarks/merge.py as a Markdown page."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from _processes import Usage, median

Row = dict[str, Any]
NONE = "–"


def page(found: dict[str, Any]) -> str:
    """Return the page of all results."""
    rows, big = found["rows"], found["big"]
    parts = [_heading(found), *((_times(rows), _limits(found["limits"]), _memory(rows)) if rows else ())]
    parts += [_differences(rows), _large(big), _errors([*rows, *big])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(found: dict[str, Any]) -> str:
    about = found["environment"]
    machine, peer = about["machine"], about["mergekit"]
    beside = f" beside mergekit {peer['mergekit']} (torch {peer['torch']})" if peer else ""
    size = f" Models of {found['size'].split(',')[0]} parameters." if found["size"] else ""
    return (
        f"# Speed of merging\n\n{about['lfm']}{beside} on {machine['cores']} cores of {machine['processor']}, "
        f"{machine['system']}.{size} bfloat16. Medians; whole processes with their start-up, inputs in the page cache. "
        f"{_others([*found['rows'], *found['big']])} Written by `benchmarks/merge.py`; benchmarks/README.md says how."
    )


def _others(rows: Iterable[Row]) -> str:
    """Say how idle the machine was: wall times count only where it was."""
    cores = [run["others"] for row in rows for runs in row["runs"].values() for run in runs]
    if not cores:
        return "Nothing was measured."
    return (
        f"Meanwhile other processes kept {statistics.median(cores):.2f} cores busy in the median run, "
        f"{max(cores):.2f} in the worst."
    )


def _name(row: Row) -> str:
    name = f"{row['name']} ({row['label']})" if row["label"] else row["name"]
    return f"{name} †" if row.get("apart") else name


def _median(row: Row, lane: str) -> Usage | None:
    runs = row["runs"].get(lane)
    return median([Usage(**run) for run in runs]) if runs else None


def _times(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        peer, new, known = (_median(row, lane) for lane in ("peer", "new", "known"))
        seconds = [_number(used, get, ".2f") for used in (new, known, peer) for get in (_wall, _cpu)]
        ratios = [_ratio(peer, used, get) for used in (new, known) for get in (_wall, _cpu)]
        lines.append([_name(row), *seconds, *ratios, _counts(row)])
    heads = ["merge"]
    heads += [f"{who} {what}, s" for who in ("new:", "known:", "mergekit") for what in ("wall", "CPU")]
    heads += [f"mergekit / {who} {what}" for who in ("new", "known") for what in ("wall", "CPU")]
    return (
        "## Time\n\n`new`: lfm on inputs that it has never seen, whose digests it computes. `known`: on inputs whose "
        "digests are in its cache, as from the second merge of the same models on. mergekit computes none. CPU is user "
        "and system time. Runs: those of lfm (each way) and of mergekit."
        + (" †: the two were not measured by turns." if any(row.get("apart") for row in rows) else "")
        + f"\n\n{_table([*heads, 'runs'], lines)}"
    )


def _wall(used: Usage) -> float:
    return used.wall


def _cpu(used: Usage) -> float:
    return used.cpu


def _number(used: Usage | None, get: Callable[[Usage], float], form: str) -> str:
    return format(get(used), form) if used else NONE


def _ratio(peer: Usage | None, ours: Usage | None, get: Callable[[Usage], float]) -> str:
    return f"{get(peer) / get(ours):.1f}" if peer and ours else NONE


def _counts(row: Row) -> str:
    return f"{len(row['runs']['known'])}, {len(row['runs']['peer'])}"


def _limits(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        used = _median(row, "limit")
        lines.append([str(row["models"]), _number(used, _wall, ".2f"), _number(used, _cpu, ".2f")])
    if not lines:
        return ""
    heads = ["models read", "wall, s", "CPU, s"]
    return "## Limits\n\nReading the models with `cat` and writing one with `cp`:\n\n" + _table(heads, lines)


def _memory(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        peer, new, known = (_median(row, lane) for lane in ("peer", "new", "known"))
        ours = max((used for used in (new, known) if used), key=lambda used: used.rss, default=None)
        numbers = [f"{used.rss:.0f} | {used.anonymous:.0f}" if used else f"{NONE} | {NONE}" for used in (ours, peer)]
        lines.append([_name(row), f"{row['read_mb']:.0f}", f"{row.get('written_mb', 0):.0f}", *numbers])
    heads = ["merge", "read, MB", "written, MB", "lfm resident, MB", "lfm anonymous, MB"]
    heads += ["mergekit resident, MB", "mergekit anonymous, MB"]
    return (
        "## Memory\n\nPeaks, in megabytes of 10^6 bytes. Resident memory counts pages of files that the process has "
        "mapped, which the system takes back when it needs them; anonymous memory (sampled every 20 ms) does not.\n\n"
        + _table(heads, lines)
    )


def _large(rows: Sequence[Row]) -> str:
    """Return the memory of merging models of 3 B parameters."""
    lines = []
    for row in rows:
        if used := _median(row, "new"):
            numbers = (row["read_mb"] / 1000, row.get("written_mb", 0) / 1000, used.wall, used.cpu)
            memory = (used.rss, used.anonymous)
            lines.append([_name(row), *(f"{n:.1f}" for n in numbers), *(f"{n:.0f}" for n in memory)])
    if not lines:
        return ""
    heads = ["merge", "read, GB", "written, GB", "wall, s", "CPU, s", "resident, MB", "anonymous, MB"]
    return "## Models of 3 B parameters\n\nlfm alone, on new inputs, once:\n\n" + _table(heads, lines)


def _differences(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        found = row.get("difference")
        if found and "error" not in found:
            lines.append(
                [
                    _name(row) + (" *" if row["random"] else ""),
                    f"{100 * found['differing']:.4f}",
                    f"{100 * found['beyond_one_ulp']:.4f}",
                    f"{found['largest_ulps']:.0f}",
                    *(NONE if found[key] is None else f"{found[key]:.4f}" for key in ("relative_rms", "change_ratio")),
                ]
            )
    if not lines:
        return ""
    heads = [
        "merge",
        "weights that differ, %",
        "by more than 1 ulp, %",
        "largest, ulps",
        "RMS / change",
        "change ratio",
    ]
    return (
        "## The same work\n\nlfm's output beside that of mergekit computing in float32 (its default, measured above, "
        "is the type of the inputs). An ulp is the distance of neighbouring bfloat16 numbers. RMS / change: root mean "
        "square of the difference, over that of mergekit's change to the base (to the first model where there is no "
        "base). Change ratio: lfm's change over mergekit's. `*`: random choices, which two programs cannot share, so "
        "that only the last column is comparable.\n\n" + _table(heads, lines)
    )


def _errors(rows: Iterable[Row]) -> str:
    lines = [f"- {_name(row)}, {lane}: {error}" for row in rows for lane, error in row["errors"].items()]
    lines += [
        f"- {_name(row)}, comparison: {row['difference']['error']}"
        for row in rows
        if "error" in row.get("difference", {})
    ]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *lines])
