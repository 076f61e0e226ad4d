"""The report: well-formed, self-contained, honest about numbers, and unmoved by whatever it is given."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.report import (
    Change,
    Chart,
    Column,
    Curve,
    Estimate,
    HeatMap,
    Node,
    Note,
    Run,
    Table,
    TrainingLog,
    render,
    write,
)
from lfm.report._graph import Box, graph
from lfm.report._model import MAX_POINTS, as_json
from lfm.report._page import MAX_CHARTS, MAX_DOTS
from lfm.report._style import STYLE
from lfm.report._svg import Scale, Shades, clipped, number

NAN, INF = math.nan, math.inf
VOID = {"meta", "link", "img", "br", "hr", "input", "base", "source", "embed"}
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!-- -->]]><style>*{display:none}</style>",
    "&lt;b&gt; &amp; 'quotes' \"double\"",
    "\x00\x1b[31m\ud800\ufffe\u2028\u202eevil",
    "https://example.com/?a=1&b=2 javascript:alert(1)",
    "日本語 — ünïcødé 💥 e\u0301",
)


class Page(HTMLParser):
    """What a page holds; reading it fails where a tag is not closed in its place."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> does not close itself in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def payload(self):
        return json.loads("".join(self.scripts), parse_constant=pytest.fail)


def estimate(value: float, half: float = 0.02, n: int | None = 500) -> Estimate:
    return Estimate(value, value - half, value + half, n)


def falling(label: str, count: int) -> Curve:
    """A loss that falls from 3.2 to 1.2, with a ripple in place of noise."""
    heights = [1.2 + 2 * math.exp(-5 * i / count) + 0.05 * math.sin(i * i) for i in range(count)]
    return Curve(label, tuple(float(i) for i in range(count)), tuple(heights))


def typical() -> Run:
    rows = ("base", "chat", "code", "merged", "student", "fixed")
    columns = (
        Column("accuracy", "arithmetic", "higher"),
        Column("accuracy", "translation", "higher"),
        Column("perplexity", "test.txt", "lower"),
        Column("edit success", "facts.jsonl", "higher", "%"),
        Column("drift", "probe", "none", "nats"),
    )
    cells = {(row, j): estimate(0.4 + 0.05 * ((i * 7 + j) % 6)) for i, row in enumerate(rows) for j in range(5)}
    layers = tuple(str(i) for i in range(24))
    changes = tuple(tuple(abs(math.sin(i / 7 + j)) * 3 for i in range(24)) for j in range(4))
    return Run(
        title="Code and chat in one small model",
        version="0.1.0",
        nodes=(
            Node("base", "model", digest="sha256:" + "ab" * 32, detail={"ref": "org/small", "bytes": "269 MB"}),
            Node("chat", "model", detail={"ref": "org/small-chat"}),
            Node("code", "step", "tune", "lora", ("base",), "sha256:" + "cd" * 32, {"rank": "16", "seconds": "412"}),
            Node("merged", "step", "merge", "ties", ("base", "code", "chat"), None, {"density": "0.3"}),
            Node("student", "step", "distill", "self_generated", ("merged",), None, {"layers": "4"}),
            Node("fixed", "step", "edit", "memit", ("merged",), None, {"requests": "facts.jsonl"}),
        ),
        tables=(Table("Before and after", rows, columns, cells, "base", "Intervals by bootstrap."),),
        logs=(
            TrainingLog("code", (falling("loss", 1000), falling("validation", 11))),
            TrainingLog("student", (falling("total", 1000), falling("cross-entropy", 1000))),
        ),
        heat_maps=(
            HeatMap("Relative change of each layer", ("chat", "code", "merged", "fixed"), layers, changes, "%"),
        ),
        notes=(Note("info", "Seed 0."), Note("warning", "The licence of org/small-chat is unknown.")),
        recipe="lfm: 1\nmodels: {base: org/small}\n",
        environment={"python": "3.11.7", "torch": "2.13.0"},
    )


def hostile() -> Run:
    """Every text of a run is an attack, and every number is out of range."""
    one, two, three, *_ = HOSTILE
    everything = " ".join(HOSTILE)
    numbers = (NAN, INF, -INF, 1e308, -1e308, 5e-324, 0.0, -0.0)
    columns = tuple(Column(word, word, "higher", word) for word in HOSTILE)
    cells = {(word, j): Estimate(numbers[j], numbers[-j], NAN, j) for word in HOSTILE for j in range(len(HOSTILE))}
    return Run(
        title=everything,
        version=one,
        nodes=tuple(Node(word, "step", word, word, (one, "missing", word), word, {word: word}) for word in HOSTILE),
        tables=(Table(everything, HOSTILE, columns, cells, two, three),),
        logs=(TrainingLog(everything, (Curve(one, numbers, numbers[::-1]), Curve(two, (), ())), two, three),),
        heat_maps=(HeatMap(everything, HOSTILE[:2], HOSTILE, (numbers[:7], (None,) * 7), one, two),),
        notes=tuple(Note("warning", word) for word in HOSTILE),
        recipe=everything,
        environment={word: word for word in HOSTILE},
    )


def large() -> Run:
    rows = tuple(f"model-{i:02d}-with-a-long-name/density=0.{i}" for i in range(60))
    columns = tuple(Column(f"metric {j}", "task", "lower") for j in range(14))
    cells = {(row, j): estimate(i * 10.0 ** (j - 6)) for i, row in enumerate(rows) for j in range(14)}
    layers = tuple(f"model.layers.{i}.mlp" for i in range(200))
    values = tuple(tuple(None if i % 17 == 0 else (i * 31 % 97) - 40.0 for i in range(200)) for _ in range(8))
    nodes = [Node(f"expert-{i}", "model") for i in range(8)]
    for i in range(24):
        inputs = {nodes[(i * 5) % len(nodes)].name, nodes[(i * 11 + 3) % len(nodes)].name}
        nodes.append(Node(f"step-{i}", "step", "merge", "ties", tuple(sorted(inputs))))
    return Run(
        title="large",
        version="0.1.0",
        nodes=tuple(nodes),
        tables=(Table("Sixty rows", rows, columns, cells, rows[0]), Table("None", (), (), {})),
        logs=(TrainingLog("many", tuple(falling(f"term {i}", 1000) for i in range(12))),),
        heat_maps=(HeatMap("200 columns", tuple("abcdefgh"), layers, values), HeatMap("none", (), (), ())),
    )


RUNS = {"typical": typical(), "hostile": hostile(), "large": large(), "empty": Run("", "")}


@pytest.fixture(params=RUNS, name="run")
def _run(request):
    return RUNS[request.param]


# -- the file ---------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_names_nothing_twice(run):
    page = Page(render(run))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for _, attributes in page.tags if "href" in attributes}
    assert targets <= {f"#{name}" for name in ids}
    labels = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert labels <= set(ids)


def test_page_is_self_contained(run):
    page = Page(render(run))
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes.pop("src").startswith("data:image/png;base64,")
        assert tag not in {"link", "iframe", "object", "embed", "image", "use", "base", "form"}
        assert not {name for name in attributes if name.startswith("on") or name in {"src", "srcset", "action"}}
    assert [dict(a) for tag, a in page.tags if tag == "script"] == [{"type": "application/json", "id": "lfm-run"}]
    assert len([tag for tag, _ in page.tags if tag == "style"]) == 1
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def main_of(source: str) -> ET.Element:
    """The page without its head and payload, which is XML as well."""
    found = re.search(r"<main>.*</main>", source, re.DOTALL)
    assert found is not None
    return ET.fromstring(found[0])


def drawings(element: ET.Element) -> list[ET.Element]:
    """The outermost SVGs."""
    return [element] if element.tag == "svg" else [svg for child in element for svg in drawings(child)]


def test_every_drawing_is_xml_with_a_label(run):
    assert main_of(render(run)).tag == "main"
    for drawing in drawings(main_of(render(run))):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"
        assert drawing.get("role") in {"img", "group", None}


def test_typical_run_has_every_kind_of_drawing():
    labels = [drawing.get("aria-label") or "" for drawing in drawings(main_of(render(typical())))]
    assert sum(label.endswith("with 95 % intervals") for label in labels) == 5
    assert sum(label.startswith("loss over step") for label in labels) == 2
    assert sum(label.startswith("Recipe graph of 6 models") for label in labels) == 1
    assert labels.count("Relative change of each layer") == 1


def test_payload_is_the_run(run):
    source = render(run)
    assert Page(source).payload == as_json(run)
    assert "<" not in source.split('id="lfm-run">')[1].split("</script>")[0]


def test_payload_keeps_every_digit_of_an_estimate():
    cells = {("a", 0): Estimate(1 / 3, 0.1 + 0.2, None, 7), ("b", 0): Estimate(NAN, -INF, INF)}
    run = Run("t", "0", tables=(Table("t", ("a", "b", "c"), (Column("m"),), cells),))
    assert Page(render(run)).payload["tables"][0]["cells"] == [
        [{"value": 1 / 3, "low": 0.1 + 0.2, "high": None, "n": 7}],
        [{"value": "nan", "low": "-inf", "high": "inf", "n": None}],
        [None],
    ]


def test_hostile_text_is_shown_as_text():
    page = Page(render(hostile()))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in Page(render(typical())).tags}
    for word in (*HOSTILE[:4], *HOSTILE[5:]):
        assert word in page.text
    assert "\ufffd\ufffd[31m\ufffd\ufffd" in page.text


@pytest.mark.parametrize("seed", ["1", "2"])
def test_equal_runs_give_equal_bytes_in_every_process(tmp_path, seed):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_report import typical, write; write(typical(), Path(sys.argv[2]))"
    )
    out = tmp_path / "report.html"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(out)], check=True, env=environment)
    assert out.read_bytes() == render(typical()).encode()


def test_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "report.html"
    write(RUNS["hostile"], path)
    write(RUNS["typical"], path)
    assert path.read_text(encoding="utf-8") == render(RUNS["typical"])
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_typical_report_is_small():
    assert len(render(typical()).encode()) < 60_000


def test_report_needs_no_torch():
    code = "import sys, lfm.report; sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# -- what it says -----------------------------------------------------------------------------------------------------


def test_page_tells_what_the_run_holds():
    page, run = Page(render(typical())), typical()
    told = [run.title, *[node.name for node in run.nodes], *[note.text for note in run.notes], run.tables[0].note]
    told += ["tune · lora", "merge · ties", "↑ higher is better", "↓ lower is better", "n = 500", "baseline"]
    told += ["facts.jsonl · %", "density", "abababababab"[:10], run.recipe, "torch", "2.13.0"]
    for words in told:
        assert words in page.text
    assert page.text.index("Warning") < page.text.index("Seed 0.")
    assert any(attributes.get("title") == "sha256:" + "ab" * 32 for _, attributes in page.tags)


def test_page_without_parts_has_no_empty_sections():
    page = Page(render(Run("only a title", "0.1.0")))
    assert [tag for tag, _ in page.tags if tag in {"section", "nav", "table", "svg", "details"}] == []


def results(**cells: Estimate | None) -> Table:
    return Table("t", tuple(cells), (Column("m", better="higher"),), {(k, 0): v for k, v in cells.items()}, "base")


@pytest.mark.parametrize(
    ("better", "cell", "change"),
    [
        ("higher", estimate(0.6), Change(0.125, "better")),
        ("lower", estimate(0.6), Change(0.125, "worse")),
        ("none", estimate(0.6), Change(0.125, "")),
        ("higher", estimate(0.5, 0.1), Change(0.025, "unclear")),
        ("higher", Estimate(0.475), Change(0.0, "same")),
        ("higher", Estimate(0.476), Change(0.001, "")),
        ("higher", Estimate(NAN), None),
        ("higher", None, None),
    ],
)
def test_change_from_the_baseline(better, cell, change):
    table = replace(results(base=estimate(0.475), other=cell), columns=(Column("m", better=better),))
    found = table.change("other", 0)
    assert (found and found.verdict) == (change and change.verdict)
    assert (found and found.difference) == pytest.approx(change and change.difference)
    assert table.change("base", 0) is None


def test_best_counts_ties_and_needs_a_contest():
    assert results(base=Estimate(1), a=Estimate(2), b=Estimate(2), c=Estimate(NAN)).best(0) == ("a", "b")
    assert results(base=Estimate(1), a=Estimate(1)).best(0) == ()
    assert results(base=Estimate(1)).best(0) == ()


def test_best_is_marked_by_weight_and_word():
    source = render(Run("t", "0", tables=(results(base=estimate(0.4), a=estimate(0.8)),)))
    assert '<span class="star" role="img" aria-label="best">★</span><b>0.800</b>' in source
    assert '<small class="better">+0.400 better</small>' in source
    assert "Against base, a is better in 1 measure, worse in none." in source


def test_charts_that_leave_out_rows_say_so():
    assert f"first {MAX_DOTS} rows and {MAX_CHARTS} measures" in Page(render(large())).text


def test_crooked_intervals_are_written_in_full():
    table = results(base=Estimate(97.0, 92.4, 99.1), a=Estimate(90.0, None, 95.0))
    text = Page(render(Run("t", "0", tables=(table,)))).text
    assert "[92.4, 99.1]" in text
    assert "[–, 95.0]" in text


@pytest.mark.parametrize(
    ("value", "decimals", "written"),
    [
        (None, None, "–"),
        (NAN, 2, "NaN"),
        (-INF, 2, "−∞"),
        (0.0, None, "0"),
        (-0.0001, 2, "0.00"),
        (-1234.5, 1, "−1,234.5"),
        (0.123456, None, "0.1235"),
        (120000.0, None, "120,000"),
        (3.2e-7, None, "3.2e−07"),
        (1e308, 2, "1e+308"),
        (5e-324, None, "4.94e−324"),
    ],
)
def test_number(value, decimals, written):
    assert number(value, decimals) == written


# -- the data ---------------------------------------------------------------------------------------------------------


def test_data_that_would_be_lost_is_refused():
    with pytest.raises(ValueError, match="cell at"):
        Table("t", ("a",), (Column("m"),), {("a", 1): Estimate(1)})
    with pytest.raises(ValueError, match="baseline 'b'"):
        Table("t", ("a",), (Column("m"),), {}, "b")
    with pytest.raises(ValueError, match="2 x and 1 y"):
        Curve("c", (1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="1 rows of 2 columns"):
        HeatMap("h", ("a",), ("x", "y"), ((1.0,),))


def test_thinning_keeps_ends_spikes_and_breaks():
    heights = [1.0] * 5000
    heights[1234], heights[2345], heights[3456] = 99.0, -99.0, NAN
    thin = Curve("c", tuple(map(float, range(5000))), tuple(heights)).thinned()
    kept = dict(zip(thin.x, thin.y, strict=True))
    assert len(thin.x) <= MAX_POINTS + 3
    assert list(thin.x) == sorted(thin.x)
    assert {0.0, 4999.0, 1234.0, 2345.0, 3456.0} <= set(kept)
    assert math.isnan(kept[3456.0])


def test_short_curves_are_kept_whole():
    curve = falling("c", MAX_POINTS)
    assert curve.thinned() is curve


# -- the drawings -----------------------------------------------------------------------------------------------------

FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(FLOATS, max_size=6), st.booleans())
def test_scales_hold_their_values_and_few_ticks(values, log):
    scale = Scale.over(values, log=log)
    assert scale.low < scale.high
    assert 0 <= len(scale.labels()) <= 12
    for place in [place for place, _ in scale.labels()] + [scale.at(v) for v in values if math.isfinite(v)]:
        assert -1e-9 <= place <= 1 + 1e-9


def test_ticks_are_round_and_told_apart():
    assert [label for _, label in Scale(0.38, 0.62).labels()] == ["0.4", "0.5", "0.6"]
    assert [label for _, label in Scale.over([1.0, 2.0, 3.0]).labels()] == ["1", "2", "3"]
    assert [label for _, label in Scale.over([0.1, 900.0], log=True).labels()] == ["0.1", "1", "10", "100"]


def test_shades_share_one_scale_around_zero():
    both = Shades.over([-1.0, 4.0, None, NAN])
    assert both is not None
    assert [both.of(v) for v in (-4.0, -1.0, 0.0, 4.0, None, INF)] == ["n8", "n2", "p0", "p8", None, None]
    near_one = Shades.over([0.96, 0.98])
    assert near_one is not None
    assert (near_one.low, near_one.of(0.96), near_one.of(0.98)) == (0.96, "p0", "p8")
    assert Shades.over([None, NAN]) is None


def test_what_a_step_measured_is_drawn_with_its_note():
    chart = Chart("cheap: what a threshold costs", (Curve("asked of B, %", (0.0, 0.5, 1.0), (0.0, NAN, 100.0)),),
                  "threshold", "asked, %", "40 examples.")  # fmt: skip
    source = render(Run("t", "1", charts=(chart,)))
    page = Page(source)
    for words in ("Cost", "cheap: what a threshold costs", "asked of B, %", "threshold", "asked, %", "40 examples."):
        assert words in page.texts
    [told] = page.payload["charts"]
    assert told["curves"] == [{"label": "asked of B, %", "points": 3, "x": [0, 0.5, 1], "y": [0, "nan", 100]}]
    assert "Cost" not in Page(render(Run("t", "1"))).texts


def test_large_heat_maps_join_their_cells():
    assert len(render(Run("t", "0", heat_maps=large().heat_maps))) < 60_000


def boxes_of(source: str) -> dict[str, tuple[float, float, float, float]]:
    found = {}
    for group in ET.fromstring(source).iter():
        if (group.get("class") or "").startswith("box"):
            rect, name = group.find("rect"), group.find("text")
            assert rect is not None
            assert name is not None
            x, y, width, height = (float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
            found[name.text or ""] = (x, y, x + width, y + height)
    return found


@given(st.lists(st.lists(st.integers(0, 29), max_size=4), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_graph_runs_from_left_to_right_without_overlap(parents):
    acyclic = [tuple(dict.fromkeys(p for p in above if p < i)) for i, above in enumerate(parents)]
    found = boxes_of(graph("g", [Box(f"n{i}", "step", "step", above) for i, above in enumerate(acyclic)]))
    assert len(found) == len(parents)
    for a, b in combinations(found.values(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for i, above in enumerate(acyclic):
        for parent in above:
            assert found[f"n{parent}"][2] < found[f"n{i}"][0]


def test_graph_draws_a_cycle_and_an_unknown_input():
    nodes = (Node("a", "step", inputs=("b", "a")), Node("b", "step", inputs=("a", "elsewhere")))
    drawing = re.search(r"<svg.*?</svg>", render(Run("t", "0", nodes=nodes)), re.DOTALL)
    assert drawing is not None
    assert set(boxes_of(drawing[0])) == {"a", "b", "elsewhere"}


def test_clipped_counts_wide_letters_twice():
    assert clipped("short", 5) == "short"
    assert clipped("日本語日本語", 7) == "日本語…"


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_contrast_in_both_themes(theme):
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", STYLE.split(":root{")[theme + 1].split("}")[0]))
    for ink in ("ink", "muted", "accent", "good", "bad", "warn", *[f"c{i}" for i in range(8)]):
        for ground in ("bg", "soft", "panel"):
            dark, light = sorted((luminance(colours[ink]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


# -- anything at all --------------------------------------------------------------------------------------------------

TEXT = st.one_of(st.text(max_size=12), st.sampled_from(HOSTILE), st.text(st.characters(), max_size=4))
MAYBE = st.none() | FLOATS
ESTIMATES = st.none() | st.builds(Estimate, FLOATS, MAYBE, MAYBE, st.none() | st.integers(0, 10**9))
BETTER = st.sampled_from(["higher", "lower", "none"])
NAMES = st.lists(TEXT, max_size=4, unique=True).map(tuple)
DETAIL = st.dictionaries(TEXT, TEXT, max_size=3)


@st.composite
def tables(draw):
    rows, columns = draw(NAMES), draw(st.lists(st.builds(Column, TEXT, TEXT, BETTER, TEXT), max_size=3))
    cells = {(row, j): draw(ESTIMATES) for row in rows for j in range(len(columns)) if draw(st.booleans())}
    baseline = draw(st.none() | st.sampled_from(rows)) if rows else None
    return Table(draw(TEXT), rows, tuple(columns), cells, baseline, draw(TEXT))


@st.composite
def curves(draw):
    points = draw(st.lists(st.tuples(FLOATS, FLOATS), max_size=8)) * draw(st.sampled_from([1, 1, 1, 40]))
    return Curve(draw(TEXT), tuple(x for x, _ in points), tuple(y for _, y in points))


@st.composite
def heat_maps(draw):
    rows, columns = draw(NAMES), draw(NAMES)
    columns *= draw(st.sampled_from([1, 1, 60]))
    values = tuple(tuple(draw(MAYBE) for _ in range(min(4, len(columns)))) for _ in rows)
    values = tuple((row * 60)[: len(columns)] for row in values)
    return HeatMap(draw(TEXT), rows, columns, values, draw(TEXT), draw(TEXT))


KINDS = st.sampled_from(["model", "step"])
NODES = st.builds(Node, TEXT, KINDS, st.none() | TEXT, st.none() | TEXT, NAMES, st.none() | TEXT, DETAIL)
ANY_RUN = st.builds(
    Run,
    title=TEXT,
    version=TEXT,
    nodes=st.lists(NODES, max_size=5).map(tuple),
    tables=st.lists(tables(), max_size=2).map(tuple),
    logs=st.lists(st.builds(TrainingLog, TEXT, st.lists(curves(), max_size=3).map(tuple), TEXT, TEXT), max_size=2).map(
        tuple
    ),
    charts=st.lists(
        st.builds(Chart, TEXT, st.lists(curves(), max_size=3).map(tuple), TEXT, TEXT, TEXT), max_size=2
    ).map(tuple),
    heat_maps=st.lists(heat_maps(), max_size=2).map(tuple),
    notes=st.lists(st.builds(Note, st.sampled_from(["info", "warning"]), TEXT), max_size=2).map(tuple),
    recipe=TEXT,
    environment=DETAIL,
)


@given(ANY_RUN)
@settings(max_examples=60, deadline=None)
def test_any_run_renders(run):
    source = render(run)
    source.encode("utf-8")
    page = Page(source)
    assert page.payload == as_json(run)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    main_of(source)


# -- in a browser -----------------------------------------------------------------------------------------------------


def widths_in(browser: str, folder, source: str, widths: tuple[int, ...]) -> list[int]:
    """Return how wide the page is in frames of these widths: as wide as the frame, unless something sticks out."""
    frame = '<iframe srcdoc="{}" style="border:0;width:{}px;height:900px"></iframe>'
    frames = "".join(frame.format(html.escape(source), width) for width in widths)
    measure = "[...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth).join()"
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"<meta charset=utf-8><body>{frames}<script>onload = () => document.body.innerHTML = {measure}</script>",
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([browser, *flags, wrapper.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return [int(width) for width in re.sub(r"<[^>]*>", "", done.stdout).strip().split(",")]


@pytest.mark.parametrize("name", ["typical", "hostile", "large"])
def test_page_fits_a_phone(tmp_path, name):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is on PATH: the page was not laid out")
    widths = (320, 360, 768)
    assert widths_in(browser, tmp_path, render(RUNS[name]), widths) == list(widths)
