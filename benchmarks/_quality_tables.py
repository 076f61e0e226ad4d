"""Results of benchmarks/merge_quality.py as Markdown tables."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from _family import Family
from _scores import Measured, draws, half_width, mean, normalised
from _search import Examined, Settings

NONE = "–"


@dataclass
class Results:
    """All that was measured of a family on test data."""

    family: Family
    guesses: dict[str, Measured]
    controls: dict[str, dict[str, Measured]]  # variant -> name -> measured
    examined: list[Examined]
    left_out: Mapping[str, list[str]]


def page(results: Iterable[Results]) -> str:
    """Return the tables of all families."""
    return "\n\n".join(part for one in results for part in _family(one))


def _family(results: Results) -> Iterable[str]:
    failed = [one for one in results.examined if one.error]
    for variant in results.family.variants:
        yield f"### {results.family.title}, {variant}\n\n{results.family.note(variant)}\n\n{_table(results, variant)}"
    if any(tried.masked is not None for one in results.examined for tried in one.tried.values()):
        yield (
            "¹ Not one model: these keep a mask for each task, and are told which task it is. Settings are those "
            "chosen for the merged model."
        )
    if failed:
        yield "Could not be run: " + "; ".join(f"`{one.method}` ({one.error})" for one in failed) + "."
    if results.left_out:
        reasons = (f"`{name}` ({', '.join(why)})" for name, why in results.left_out.items())
        yield "Not in these tables: " + "; ".join(reasons) + "."


def _table(results: Results, variant: str) -> str:
    family = results.family
    heads = [*family.tasks, "mean", *family.others, "normalised", "over the average", "with defaults"]
    lines = ["| | settings | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    comparison = Comparison(results, variant)
    plain = results.guesses if variant == family.variants[0] else {}
    for name, measured in [*plain.items(), *results.controls[variant].items()]:
        lines.append(f"| *{name}* | | " + " | ".join([*comparison.cells(measured), NONE]) + " |")
    tried = [(one.method, one.tried[variant]) for one in results.examined if variant in one.tried and not one.error]
    for method, one in sorted(tried, key=lambda item: -comparison.normalised(item[1].chosen)[0]):
        default = _percent(comparison.normalised(one.default))
        cells = [*comparison.cells(one.chosen), default]
        lines.append(f"| {method} | {_settings(one.settings)} | " + " | ".join(cells) + " |")
    for method, one in tried:
        if one.masked is not None:
            cells = [*comparison.cells(one.masked), NONE]
            lines.append(f"| {method}, a mask for each task¹ | {_settings(one.settings)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Comparison:
    """Puts measurements of one variant beside those of the specialists and of the average."""

    def __init__(self, results: Results, variant: str) -> None:
        self.family = results.family
        first = results.controls[self.family.variants[0]]
        self.specialists = {task: first[f"tuned on {task}"][task] for task in self.family.tasks}
        self.average = self.normalised(results.controls[variant]["average"])

    def normalised(self, measured: Measured) -> np.ndarray:
        return normalised(measured, self.specialists, self.family.metric)

    def cells(self, measured: Measured) -> list[str]:
        """Return a row's numbers, from the first task to the difference from the average."""
        metric = self.family.metric
        values = {task: draws(task, sample, metric) for task, sample in measured.items()}
        own = [values[task] for task in self.family.tasks]
        score = self.normalised(measured)
        difference = score - self.average
        same = np.abs(difference).max() < 1e-9
        return [
            *(_number(value) for value in own),
            _number(mean(own, metric)),
            *(_number(values[task]) if task in values else NONE for task in self.family.others),
            _percent(score),
            NONE if same else f"{difference[0]:+.1f} ± {half_width(difference):.1f}",
        ]


def _number(value: np.ndarray) -> str:
    if not np.isfinite(value[0]) or value[0] >= 1e5:
        return "> 100,000"
    digits = 1 if value[0] < 1000 else 0
    return f"{value[0]:,.{digits}f} ± {half_width(value):,.{digits}f}"


def _percent(value: np.ndarray) -> str:
    return f"{value[0]:.1f} ± {half_width(value):.1f}"


def _settings(settings: Settings) -> str:
    shown = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
    return ", ".join(shown) or "defaults"
