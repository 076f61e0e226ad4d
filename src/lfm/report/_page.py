"""The page: sections from what a run has, in the order of interest."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lfm.errors import plural
from lfm.report._graph import Box, graph
from lfm.report._model import (
    Change,
    Chart,
    Column,
    Curve,
    Estimate,
    HeatMap,
    Node,
    Run,
    Samples,
    Table,
    TrainingLog,
    as_json,
)
from lfm.report._style import STYLE
from lfm.report._svg import (
    Dot,
    Markup,
    Shades,
    dot_chart,
    el,
    heat_chart,
    join,
    line_chart,
    number,
    swatch,
    text,
)

MAX_DOTS = 40  # rows of a chart under a table, and
MAX_CHARTS = 12  # charts under a table; a longer table is read, not seen


def render(run: Run) -> str:
    """Return the report as one HTML document that needs nothing else; equal runs give equal text."""
    sections = [
        ("results", "Results", [_table(index, table) for index, table in enumerate(run.tables)]),
        ("graph", "Recipe graph", [_graph(run)] if run.nodes else []),
        ("training", "Training", [el("div", *map(_log, run.logs), class_="grid wide")] if run.logs else []),
        ("charts", "Cost", [el("div", *map(_chart, run.charts), class_="grid wide")] if run.charts else []),
        ("samples", "Made to learn from", [_samples(one) for one in run.samples]),
        ("layers", "Inside the weights", [_heat_map(heat_map) for heat_map in run.heat_maps]),
        ("lineage", "Lineage", [_lineage(run.nodes)] if run.nodes else []),
        ("sources", "Recipe and environment", _sources(run)),
    ]
    shown = [section for section in sections if section[2]]
    links = [el("li", el("a", title, href=f"#{name}")) for name, title, _ in shown]
    body = [
        el("header", el("h1", run.title), el("p", _summary(run), class_="summary"), class_="top"),
        _notes(run),
        el("nav", el("ul", *links), aria_label="Sections") if len(links) > 1 else None,
        *[_section(name, title, content) for name, title, content in shown],
        _footer(run),
    ]
    return _document(run.title, join([el("main", *body), _payload(run)]))


def _document(title: str, body: Markup) -> str:
    # The policy makes the promise of the first line one that the browser keeps.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)} · lfm</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _section(name: str, title: str, content: list[Markup]) -> Markup:
    return join([Markup("\n"), el("section", el("h2", title), *content, id=name)])


def _payload(run: Run) -> Markup:
    written = json.dumps(as_json(run), separators=(",", ":"), allow_nan=False)
    # Without these three letters nothing in the text can end the element or start another.
    for letter in "<>&":
        written = written.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(f'\n<script type="application/json" id="lfm-run">{written}</script>')


def _summary(run: Run) -> str:
    kinds = Counter(node.kind for node in run.nodes)
    counts = [plural(kinds[kind], kind) for kind in ("model", "step") if kinds[kind]]
    if run.tables:
        counts.append(plural(sum(len(table.columns) for table in run.tables), "measure"))
    parts = [part for part in (", ".join(counts), *map(_verdict, run.tables[:1])) if part]
    return "".join(f"{part}. " for part in parts).rstrip()


def _verdict(table: Table) -> str:
    """Return which model is better than the baseline most often, counting what is worse against it."""
    scores: dict[str, Counter[str]] = {}
    for row in table.rows:
        changes = [change for j in range(len(table.columns)) if (change := table.change(row, j))]
        scores[row] = Counter(change.verdict for change in changes)
    if not any(score["better"] + score["worse"] + score["unclear"] for score in scores.values()):
        return ""
    row, score = max(scores.items(), key=lambda item: item[1]["better"] - item[1]["worse"])
    if score["better"] <= score["worse"]:
        return f"No model is better than {table.baseline} more often than it is worse"
    worse = f"worse in {score['worse']}" if score["worse"] else "worse in none"
    return f"Against {table.baseline}, {row} is better in {plural(score['better'], 'measure')}, {worse}"


def _notes(run: Run) -> Markup | None:
    ordered = sorted(run.notes, key=lambda note: note.level != "warning")
    words = {"warning": "Warning", "info": "Note"}
    items = [el("li", el("b", words[note.level]), " ", note.text, class_=note.level) for note in ordered]
    return el("ul", *items, class_="notes", aria_label="Notes") if items else None


def _footer(run: Run) -> Markup:
    code = el("code", "lfm-run")
    return el(
        "footer",
        f"Written by lfm {run.version}. The numbers are in the page's source as JSON, under the id ",
        code,
        ".",
    )


# -- results ----------------------------------------------------------------------------------------------------------


def _table(index: int, table: Table) -> Markup:
    name = f"table-{index}"
    title = el("h3", table.title, id=name)
    if not table.rows or not table.columns:
        return el("article", title, el("p", "Nothing was measured.", class_="note"))
    measures = [_measure(table, j) for j in range(len(table.columns))]
    head = el("tr", el("th", "Model", scope="col"), *map(_head, measures))
    rows = [_row(table, row, measures) for row in table.rows]
    grid = el("table", el("thead", head), el("tbody", *rows), class_="results")
    return el(
        "article",
        title,
        _scroll(name, grid, few=len(table.columns) < 3),
        el("p", table.note, class_="note") if table.note else None,
        el("p", legend, class_="note") if (legend := _legend(table)) else None,
        *_charts(table, measures),
    )


def _scroll(name: str, grid: Markup, *, few: bool) -> Markup:
    return el("div", grid, class_="scroll few" if few else "scroll", role="region", aria_labelledby=name, tabindex="0")


@dataclass(frozen=True)
class _Measure:
    """A column of a table, and what is the same for all of its cells. `n` is the number of examples they share."""

    index: int
    column: Column
    decimals: int | None
    best: frozenset[str]
    n: int | None

    @property
    def name(self) -> str:
        return " · ".join(part for part in (self.column.metric, self.column.task) if part)


def _measure(table: Table, index: int) -> _Measure:
    cells = [cell for row in table.rows if (cell := table.cells.get((row, index)))]
    counts = {cell.n for cell in cells}
    n = counts.pop() if len(counts) == 1 else None
    return _Measure(index, table.columns[index], _decimals(cells), frozenset(table.best(index)), n)


def _head(measure: _Measure) -> Markup:
    column = measure.column
    ways = {"higher": "↑ higher is better", "lower": "↓ lower is better", "none": ""}
    n = "" if measure.n is None else f"n = {measure.n:,}"
    under = [" · ".join(part for part in (column.task, column.unit) if part), ways[column.better], n]
    return el("th", column.metric, *[el("small", line) for line in under if line], scope="col")


def _row(table: Table, row: str, measures: list[_Measure]) -> Markup:
    tag = el("small", "baseline") if row == table.baseline else None
    head = el("th", el("span", row, class_="who"), tag, scope="row")
    return el("tr", head, *[_cell(table, row, measure) for measure in measures], class_="base" if tag else None)


def _cell(table: Table, row: str, measure: _Measure) -> Markup:
    cell = table.cells.get((row, measure.index))
    if cell is None:
        return el("td", el("span", "–", role="img", aria_label="not measured"), class_="empty")
    value, interval = number(cell.value, measure.decimals), _interval(cell, measure.decimals)
    star = el("span", "★", class_="star", role="img", aria_label="best")
    return el(
        "td",
        join([star, el("b", value)]) if row in measure.best else value,
        el("span", interval, class_="pm") if interval else None,
        _change(table.change(row, measure.index), measure.decimals),
        title=f"n = {cell.n:,}" if cell.n is not None and measure.n is None else None,
    )


def _change(change: Change | None, decimals: int | None) -> Markup | None:
    if change is None or change.verdict == "same":
        return el("small", "same") if change else None
    word = {"better": " better", "worse": " worse", "unclear": " ≈"}.get(change.verdict, "")
    tone = change.verdict if change.verdict in ("better", "worse") else None
    return el("small", _signed(change.difference, decimals) + word, class_=tone)


def _interval(cell: Estimate, decimals: int | None) -> str:
    """Return "± 0.012" where the value is in the middle, else "[0.79, 0.83]"."""
    if cell.low is None and cell.high is None:
        return ""
    if cell.low is not None and cell.high is not None and math.isfinite(cell.high - cell.low):
        below, above = number(cell.value - cell.low, decimals), number(cell.high - cell.value, decimals)
        if below == above and cell.high >= cell.value:
            return f"± {above}"
    return f"[{number(cell.low, decimals)}, {number(cell.high, decimals)}]"


def _signed(difference: float, decimals: int | None) -> str:
    written = number(difference, decimals)
    return f"+{written}" if difference > 0 and written.strip("0.") else written


def _decimals(cells: list[Estimate]) -> int | None:
    """Return how many decimals a column needs: two digits of the usual interval, or four of the largest value."""
    halves = [cell.high / 2 - cell.low / 2 for cell in cells if cell.low is not None and cell.high is not None]
    widths = sorted(half for half in halves if math.isfinite(half) and half > 0)
    if widths:
        return _places(widths[len(widths) // 2], 2)
    sizes = [abs(cell.value) for cell in cells if math.isfinite(cell.value) and cell.value]
    if not sizes or all(size == int(size) for size in sizes):
        return 0 if sizes else None
    return _places(max(sizes), 4)


def _places(size: float, digits: int) -> int | None:
    """Return the decimals that show so many digits; nothing where that takes too many and powers of ten read better."""
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return decimals if decimals <= 7 else None


def _legend(table: Table) -> str:
    cells = [cell for cell in table.cells.values() if cell]
    parts = []
    if any(table.best(j) for j in range(len(table.columns))):
        parts.append("★ best of its column")
    if any(cell.low is not None or cell.high is not None for cell in cells):
        parts.append("± and [ ] 95 % interval")
    if table.baseline is not None and len(table.rows) > 1:
        parts.append(f"second line: difference from {table.baseline}, ≈ where the two intervals overlap")
    return "; ".join(parts) + "." if parts else ""


def _charts(table: Table, measures: list[_Measure]) -> list[Markup]:
    rows, drawn = table.rows[:MAX_DOTS], measures[:MAX_CHARTS]
    if len(rows) < 2:
        return []
    figures = []
    for measure in drawn:
        dots = [_dot(table, row, measure) for row in rows]
        if any(dot.value is not None and math.isfinite(dot.value) for dot in dots):
            drawing = dot_chart(f"{measure.name} of each model, with 95 % intervals", dots)
            figures.append(el("figure", el("figcaption", measure.name), drawing))
    shown = [el("div", *figures, class_="grid")] if figures else []
    if len(rows) < len(table.rows) or len(drawn) < len(measures):
        first = f"The charts show the first {plural(len(rows), 'row')} and {plural(len(drawn), 'measure')}; "
        shown.append(el("p", first, "the table has all.", class_="note"))
    return shown


def _dot(table: Table, row: str, measure: _Measure) -> Dot:
    cell = table.cells.get((row, measure.index))
    mark = "base" if row == table.baseline else "best" if row in measure.best else ""
    if cell is None:
        return Dot(row, None, mark=mark)
    told = f"{number(cell.value, measure.decimals)} {_interval(cell, measure.decimals)}".strip()
    return Dot(row, cell.value, cell.low, cell.high, mark, told)


# -- graph, training, layers ------------------------------------------------------------------------------------------


def _graph(run: Run) -> Markup:
    """Return the graph; an input that no node describes is drawn too."""
    names = list(
        dict.fromkeys([node.name for node in run.nodes] + [name for node in run.nodes for name in node.inputs])
    )
    nodes = {node.name: node for node in run.nodes}
    boxes = [
        _box(nodes.get(name) or Node(name, "model"), names, index if name in nodes else None)
        for index, name in enumerate(names)
    ]
    label = f"Recipe graph of {plural(len(boxes), 'model')}, from what went in on the left to the results on the right"
    drawing = graph(label, boxes)
    return el("div", drawing, class_="scroll plain", tabindex="0", role="region", aria_label="Recipe graph")


def _box(node: Node, names: list[str], index: int | None) -> Box:
    parents = tuple(dict.fromkeys(names.index(name) for name in node.inputs if name != node.name))
    below = _made_by(node) if node.kind == "step" else node.detail.get("ref", "model")
    told = f"{node.name}: {below}" + (f", from {', '.join(node.inputs)}" if node.inputs else "")
    return Box(node.name, below, node.kind, parents, f"#node-{index}" if index is not None else "", told)


def _made_by(node: Node) -> str:
    return " · ".join(part for part in (node.verb, node.method) if part) or node.kind


def _log(log: TrainingLog) -> Markup:
    return _lines(log.step_name, log.curves, log.x_label, log.y_label)


def _chart(chart: Chart) -> Markup:
    return _lines(chart.title, chart.curves, chart.x_label, chart.y_label, chart.note)


def _lines(title: str, curves: tuple[Curve, ...], x_label: str, y_label: str, note: str = "") -> Markup:
    """Return curves with their legend, which tells their last values, and the names of both axes."""
    thin = [curve.thinned() for curve in curves]
    if not any(math.isfinite(x) and math.isfinite(y) for curve in thin for x, y in zip(curve.x, curve.y, strict=True)):
        return el("figure", el("h3", title), el("p", "No value was logged.", class_="note"))
    names = ", ".join(curve.label for curve in curves)
    drawing, is_log = line_chart(f"{y_label} over {x_label} of {title}: {names}", thin)
    legend = [
        el("li", swatch(index), curve.label, " ", el("b", number(curve.y[-1]) if curve.y else "–"))
        for index, curve in enumerate(curves)
    ]
    return el(
        "figure",
        el("h3", title),
        el("ul", *legend, class_="legend", aria_label="Curves and their last values"),
        el("p", y_label, " (logarithmic)" if is_log else None, class_="axis-name"),
        drawing,
        el("p", x_label, class_="axis-name right"),
        el("p", note, class_="note") if note else None,
    )


def _samples(samples: Samples) -> Markup:
    """Return what a student learned from, to be looked at: an image is part of the page."""
    facts = [el("div", el("dt", name), el("dd", number(value))) for name, value in samples.facts.items()]
    picture = None
    if samples.picture is not None:
        coded = base64.b64encode(samples.picture).decode("ascii")
        told = f"Images that {samples.step_name} was taught with"
        picture = el("img", src=f"data:image/png;base64,{coded}", alt=told, class_="samples")
    texts = el("ol", *[el("li", line) for line in samples.texts], class_="samples") if samples.texts else None
    return el("article", el("h3", samples.step_name), picture, texts, el("dl", *facts) if facts else None)


def _heat_map(heat_map: HeatMap) -> Markup:
    title = el("h3", heat_map.title)
    note = el("p", heat_map.note, class_="note") if heat_map.note else None
    shades = Shades.over(value for row in heat_map.values for value in row)
    if shades is None:
        return el("figure", title, note, el("p", "No value was measured.", class_="note"))
    drawing = heat_chart(heat_map.title, heat_map.rows, heat_map.columns, heat_map.values, heat_map.unit)
    return el("figure", title, _scale(heat_map, shades), drawing, el("p", _extreme(heat_map), class_="note"), note)


def _scale(heat_map: HeatMap, shades: Shades) -> Markup:
    bar = el("span", class_="bar both" if shades.low < 0 else "bar")
    gaps = any(value is None or not math.isfinite(value) for row in heat_map.values for value in row)
    return el(
        "p",
        number(shades.low),
        bar,
        f"{number(shades.high)} {heat_map.unit}".strip(),
        el("span", el("span", class_="gap"), "no value") if gaps else None,
        class_="scale",
    )


def _extreme(heat_map: HeatMap) -> str:
    value, row, column = max(
        (
            (value, row, column)
            for row, values in zip(heat_map.rows, heat_map.values, strict=True)
            for column, value in zip(heat_map.columns, values, strict=True)
            if value is not None and math.isfinite(value)
        ),
        key=lambda found: abs(found[0]),
    )
    return f"Largest: {number(value)} {heat_map.unit}".rstrip() + f" ({row}, {column})."


# -- lineage, recipe, environment -------------------------------------------------------------------------------------


def _lineage(nodes: tuple[Node, ...]) -> Markup:
    places = {name: index for index, name in enumerate(dict.fromkeys(node.name for node in nodes))}
    head = [el("th", name, scope="col") for name in ("Name", "Made by", "From", "Details", "Digest")]
    rows, seen = [], set()
    for node in nodes:
        place = None if node.name in seen else f"node-{places[node.name]}"
        seen.add(node.name)
        rows.append(_lineage_row(node, place, places))
    grid = el("table", el("thead", el("tr", *head)), el("tbody", *rows), class_="lineage")
    return el("div", grid, class_="scroll", role="region", aria_label="Lineage", tabindex="0")


def _lineage_row(node: Node, place: str | None, places: Mapping[str, int]) -> Markup:
    inputs = [el("li", el("a", name, href=f"#node-{places[name]}") if name in places else name) for name in node.inputs]
    details = [el("li", el("span", key), " ", value) for key, value in node.detail.items()]
    return el(
        "tr",
        el("th", el("span", node.name, class_="who"), scope="row"),
        el("td", _made_by(node)),
        el("td", el("ul", *inputs, class_="who") if inputs else "–"),
        el("td", el("ul", *details, class_="details") if details else "–"),
        el("td", el("code", _short_digest(node.digest), title=node.digest) if node.digest else "–"),
        id=place,
    )


def _short_digest(digest: str) -> str:
    return digest.rpartition(":")[2][:10]


def _sources(run: Run) -> list[Markup]:
    parts = []
    if run.recipe:
        parts.append(el("details", el("summary", "Recipe"), el("pre", el("code", run.recipe), tabindex="0")))
    if run.environment:
        items = [el("div", el("dt", key), el("dd", value)) for key, value in run.environment.items()]
        parts.append(el("details", el("summary", "Environment"), el("dl", *items)))
    return parts
