"""Small inline SVG: lines, dots with intervals, heat maps.

A chart stretches with its box while its text does not: positions are percentages of an SVG without a view box, and only
curves and cells sit in an inner SVG that is stretched. Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lfm.report._model import Curve

ROW = 22  # height of a row of dots or cells, in pixels; the style sheet has the same number
PLOT = 200  # height of a line chart
LEVELS = 8  # shades of a heat map on either side of zero
BIG = 1e300  # where drawing stops: the difference of two such numbers is still finite
DRAWN = ("circle", "line", "path", "polyline", "rect")  # elements that need no end tag when they are empty
# Neither XML nor a reader has a use for these, and UTF-8 cannot hold a lone surrogate.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already. Any other string is escaped on its way into an element."""

    __slots__ = ()


def join(parts: Iterable[str | None]) -> Markup:
    """Return the parts as markup, one after the other; plain strings are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else text(part) for part in parts if part is not None))


def text(value: str) -> str:
    """Return `value` escaped for HTML and XML, control characters made visible."""
    return html.escape(CONTROL.sub("\ufffd", value))


def el(name: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """Return an element; attribute names are written with `_` for `-`, and `class_` for `class`."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{text(value if isinstance(value, str) else _short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(
        f"<{name}{written}/>" if name in DRAWN and not children else f"<{name}{written}>{join(children)}</{name}>"
    )


def number(value: float | None, decimals: int | None = None) -> str:
    """Return a number for people: a true minus sign, thousands apart, four digits unless `decimals` says otherwise."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e7 or (decimals is None and 0 < size < 1e-4):
        written = f"{value:.3g}"
    elif decimals is not None:
        written = f"{value:,.{decimals}f}"
    elif value == int(value):
        written = f"{value:,.0f}"
    else:
        written = f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}"
        written = written.rstrip("0").rstrip(".") if "." in written else written
    is_zero = not written.strip("-0.")
    return written.lstrip("-") if is_zero else written.replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _percent(share: float) -> str:
    return f"{_short(round(100 * share, 1))}%"


def _clamped(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else min(BIG, max(-BIG, float(value)))


def width_of(label: str) -> float:
    """Return about how wide a label is, in letters: wide characters count twice, combining ones not at all."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in label
    )


def clipped(label: str, letters: int) -> str:
    """Return the label, cut to a width in letters."""
    if width_of(label) <= letters:
        return label
    kept = ""
    for letter in label:
        if width_of(kept + letter) > letters - 1:
            break
        kept += letter
    return kept + "…"


@dataclass(frozen=True)
class Scale:
    """A range of values along one axis, linear or logarithmic."""

    low: float
    high: float
    log: bool = False
    whole: bool = False  # all values are whole numbers, such as steps; so are the ticks then

    @classmethod
    def over(cls, values: Iterable[float | None], *, log: bool = False, margin: float = 0.0) -> Scale:
        """Return a scale over the finite values; logarithmic if asked and they are positive and span two decades."""
        finite = [value for value in map(_clamped, values) if value is not None] or [0.0, 1.0]
        low, high, whole = min(finite), max(finite), all(value == int(value) for value in finite)
        if log and low > 1e-290 and high / 100 >= low:
            return cls(low, high, log=True)
        size = max(abs(low), abs(high))
        if high - low < max(size * 1e-9, 1e-290):  # one value: it stands in the middle
            half = size * 0.1 if size > 1e-280 and not (whole and size < 5) else 0.5
            return cls(low - half, high + half, whole=whole)
        return cls(low - margin * (high - low), high + margin * (high - low), whole=whole)

    def at(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        value = min(BIG, max(-BIG, value))
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, count: int = 4) -> list[float]:
        """Return about `count` round values in the range."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            apart = max(1, math.ceil((last - first + 1) / (count + 1)))
            return [10.0**exponent for exponent in range(first, last + 1, apart)]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= rough * 0.999)
        step = max(step, 1.0) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def labels(self) -> list[tuple[float, str]]:
        """Return (place, label) of every tick, with as many decimals as tell the ticks apart."""
        ticks = self.ticks()
        if self.log or len(ticks) < 2 or ticks[1] - ticks[0] < 1e-4:
            return [(self.at(tick), number(tick)) for tick in ticks]
        decimals = min(6, max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)))
        if any(round(tick, decimals) != round(tick, 9) for tick in ticks):  # steps of 2.5
            decimals += 1
        return [(self.at(tick), number(tick, decimals)) for tick in ticks]


def chart(label: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """Return an SVG that is one picture with a label."""
    return el(
        "svg", *children, role=attributes.pop("role", "img"), aria_label=label,
        **attributes,
    )  # fmt: skip


def _stretched(columns: int, rows: int, height: float, class_: str | None, *children: str) -> Markup:
    """Return an inner SVG that fills the width of its box, whatever the box's shape."""
    box = f"0 0 {columns} {rows}"
    return el("svg", *children, viewBox=box, preserveAspectRatio="none", width="100%", height=height, class_=class_)


# -- lines ------------------------------------------------------------------------------------------------------------


def line_chart(label: str, curves: Sequence[Curve]) -> tuple[Markup, bool]:
    """Return the chart, and whether its vertical axis is logarithmic."""
    across = Scale.over(x for curve in curves for x in curve.x)
    up = Scale.over((y for curve in curves for y in curve.y), log=True, margin=0.04)
    y_labels, x_labels = up.labels(), across.labels()
    left = 12 + 6.6 * max((width_of(name) for _, name in y_labels), default=1)
    drawing = chart(
        label,
        *[_grid_line(place, name) for place, name in y_labels],
        el("line", class_="axis", x1="0", x2="100%", y1=PLOT, y2=PLOT),
        *[_below(place, name, PLOT + 18, 260) for place, name in x_labels],
        *[_curve(index, curve, across, up) for index, curve in enumerate(curves)],
        width="100%",
        height=PLOT + 24,
    )
    return el("div", drawing, class_="plot", style=f"padding-left:{_short(left)}px"), up.log


def _grid_line(place: float, name: str) -> Markup:
    y = PLOT * (1 - place)
    return join(
        [
            el("line", class_="rule", x1="0", x2="100%", y1=y, y2=y),
            el("text", name, x="-8", y=y + 4, text_anchor="end"),
        ]
    )


def _below(place: float, name: str, y: float, room: float) -> Markup:
    """Return a label under an axis; on a screen where the axis has that much room, it sticks out by a hair at most."""
    half = 3.4 * width_of(name) - 8
    anchor = "start" if place * room < half else "end" if (1 - place) * room < half else "middle"
    return el("text", name, x=_percent(place), y=y, text_anchor=anchor)


def _curve(index: int, curve: Curve, across: Scale, up: Scale) -> Markup:
    """Return the curve in pieces, broken where a value is not finite; a piece of one point is a dot."""
    lines, dots = [], []
    for piece in _pieces(curve):
        if len(piece) == 1:
            x, y = across.at(piece[0][0]), PLOT * (1 - up.at(piece[0][1]))
            dots.append(el("circle", cx=_percent(x), cy=y, r=3.5))
            continue
        # The view box is whole numbers, fine enough for any screen and short to write.
        points = " ".join(f"{round(999 * across.at(x))},{round(500 * (1 - up.at(y)))}" for x, y in piece)
        lines.append(el("polyline", points=points))
    inner = _stretched(999, 500, PLOT, None, *lines) if lines else None
    return el("g", el("title", curve.label), inner, *dots, class_=f"curve c{index % 8}")


def _pieces(curve: Curve) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def swatch(index: int) -> Markup:
    """Return a legend's sample of the curve with this index, its colour and its dashes."""
    line = el("line", x1="0", x2="24", y1="5", y2="5")
    return el("svg", el("g", line, class_=f"curve c{index % 8}"), width="24", height="10", aria_hidden="true")


# -- dots with intervals ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """One row of a dot chart: a value, its interval, and how to mark it."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = ""  # "best", "base" or nothing
    told: str = ""  # the value in words


def dot_chart(label: str, dots: Sequence[Dot]) -> Markup:
    """Return one row per dot, names on the left, values on a common scale that need not start at zero."""
    scale = Scale.over((v for dot in dots for v in (dot.value, dot.low, dot.high)), margin=0.06)
    base = next((value for dot in dots if dot.mark == "base" and (value := _clamped(dot.value)) is not None), None)
    bottom = ROW * len(dots)
    guide = None
    if base is not None:
        x = _percent(scale.at(base))
        guide = el("line", class_="guide", x1=x, x2=x, y1="0", y2=bottom)
    drawing = chart(
        label,
        el("line", class_="axis", x1="0", x2="100%", y1=bottom, y2=bottom),
        *[_below(place, name, bottom + 16, 170) for place, name in _sparse(scale.labels())],
        *([guide] if guide else []),
        *[_dot(index, dot, scale) for index, dot in enumerate(dots)],
        width="100%",
        height=bottom + 22,
    )
    names = [("★ " if dot.mark == "best" else "") + dot.label for dot in dots]
    return el("div", row_names(names), el("div", drawing, class_="pane dots"), class_="rows")


def _sparse(labels: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the first, middle and last label, or two if they are long: more do not fit on a narrow screen."""
    if len(labels) < 3:
        return labels
    three = [labels[0], labels[len(labels) // 2], labels[-1]]
    return three if sum(width_of(name) for _, name in three) < 16 else [labels[0], labels[-1]]


def _dot(index: int, dot: Dot, scale: Scale) -> Markup | None:
    value = _clamped(dot.value)
    if value is None:
        return None
    low, high = _clamped(dot.low), _clamped(dot.high)
    y = index * ROW + ROW / 2
    ends = [_percent(scale.at(value if end is None else end)) for end in (low, high)]
    return el(
        "g",
        el("title", f"{dot.label}: {dot.told}"),
        el("line", x1=ends[0], x2=ends[1], y1=y, y2=y) if ends[0] != ends[1] else None,
        el("circle", cx=_percent(scale.at(value)), cy=y, r=4.5),
        class_=f"dot {dot.mark}".strip(),
    )


def row_names(names: Sequence[str]) -> Markup:
    """Return the names beside the rows of a chart; the style sheet cuts those that are too long."""
    items = [el("li", name, title=name if width_of(name) > 12 else None) for name in names]
    return el("ul", *items, class_="names")


# -- heat map ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shades:
    """From value to shade. Values of both signs share one scale around zero; else it starts at zero or the least."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Shades | None:
        """Return the shades for these values, or nothing where none is finite."""
        finite = [value for value in map(_clamped, values) if value is not None]
        if not finite:
            return None
        low, high = min(finite), max(finite)
        if low < 0:
            high = max(-low, high)
            return cls(-high, high)
        return cls(0.0 if low < high / 2 else low, high)

    def of(self, value: float | None) -> str | None:
        """Return the class of the shade: p0 ... p8, or n1 ... n8 below zero."""
        value = _clamped(value)
        if value is None:
            return None
        low = max(0.0, self.low)
        share = (abs(value) - low) / (self.high - low) if self.high > low else 1.0
        level = round(LEVELS * min(1.0, max(0.0, share)))
        return f"{'n' if value < 0 and level else 'p'}{level}"


def heat_chart(
    label: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], unit: str
) -> Markup:
    """Return the grid of shades with its names; cells without a finite value stay open."""
    shades = Shades.over(value for row in values for value in row)
    few = len(rows) * len(columns) <= 400
    cells = _told_cells(rows, columns, values, shades, unit) if few else _merged_cells(values, shades)
    bottom = ROW * len(rows)
    names, below, least = _column_names(columns, bottom)
    drawing = chart(
        label,
        _stretched(len(columns), len(rows), bottom, "cells", *cells),
        *names,
        width="100%",
        height=bottom + below,
        class_="map",
        style=f"min-width:{round(least)}px;background-size:100% {bottom}px",
    )
    pane = el("div", drawing, class_="pane", tabindex="0", role="region", aria_label=label)
    return el("div", row_names(rows), pane, class_="rows")


def _told_cells(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    shades: Shades | None,
    unit: str,
) -> list[Markup]:
    """Return one path per cell, with its value to be read by pointing at it."""
    return [
        el("path", el("title", f"{rows[y]}, {columns[x]}: {number(value)} {unit}"), d=_cell_path(x, y, 1), class_=shade)
        for y, row in enumerate(values)
        for x, value in enumerate(row)
        if shades and (shade := shades.of(value))
    ]


def _cell_path(x: int, y: int, width: int) -> str:
    return f"M{x} {y}h{width}v1h-{width}z"


def _merged_cells(values: Sequence[Sequence[float | None]], shades: Shades | None) -> list[Markup]:
    """Return one path per shade, neighbours in a row joined: a large map stays small."""
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(values):
        start = 0
        for x in range(1, len(row) + 1):
            shade = shades.of(row[start]) if shades else None
            if x < len(row) and shades and shades.of(row[x]) == shade:
                continue
            if shade:
                paths.setdefault(shade, []).append(_cell_path(start, y, x - start))
            start = x
    return [el("path", d="".join(parts), class_=shade) for shade, parts in sorted(paths.items())]


def _column_names(columns: Sequence[str], top: float) -> tuple[list[Markup], float, float]:
    """Return the names under the columns, the height they take, and the least width of the map.

    All stand side by side if a wide screen has room for that; else short ones are thinned, long ones stand upright.
    """
    longest = min(18, max(map(width_of, columns), default=0))
    room, count = 7 * longest + 8, max(1, len(columns))
    least = room * count if room * count <= 850 else count * (14 if count <= 48 else 5)
    upright = room * count > 850 and longest > 4
    step = math.ceil((14 if upright else room) / max(least / count, 520 / count))
    names = []
    for index in range(0, len(columns), step):
        middle, name = _percent((index + 0.5) / count), clipped(columns[index], 18)
        if not upright:
            names.append(el("text", name, x=middle, y=top + 16, text_anchor="middle"))
            continue
        turned = el("text", name, transform="rotate(-90)", text_anchor="end", x="0", y="4")
        names.append(el("svg", turned, x=middle, y=top + 6, overflow="visible"))
    return names, 12 + 6.8 * longest if upright else 24, least
