"""The recipe as a picture: a graph in layers from left to right (Sugiyama's method, in its simplest form).

Edges that pass a layer hold a place in it, as if a small box stood there, so that no edge runs through a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lfm.report._svg import Markup, chart, clipped, el, width_of

BOX_HEIGHT, PLACE_HEIGHT, GAP, BETWEEN = 46.0, 4.0, 16.0, 52.0
SWEEPS = 6


@dataclass(frozen=True)
class Box:
    """One node of a graph: `parents` are the indices of the boxes it comes from."""

    name: str
    below: str
    kind: str
    parents: tuple[int, ...]
    link: str = ""
    told: str = ""

    @property
    def width(self) -> float:
        """How much room the two lines of text take."""
        return max(84.0, 28 + 7.6 * width_of(clipped(self.name, 24)), 30 + 6.6 * width_of(clipped(self.below, 28)))


def graph(label: str, boxes: Sequence[Box]) -> Markup:
    """Return the boxes from left to right, each to the right of all that it comes from."""
    layers, chains = _layers([box.parents for box in boxes])
    middles = _middles(layers, chains, len(boxes))
    widths = [max([boxes[i].width for i in layer if i < len(boxes)], default=0.0) for layer in layers]
    lefts = [2 + sum(widths[:rank]) + BETWEEN * rank for rank in range(len(layers))]
    rank_of = {item: rank for rank, layer in enumerate(layers) for item in layer}
    stops = {
        item: (lefts[rank], lefts[rank] + (boxes[item].width if item < len(boxes) else widths[rank]), middles[item])
        for item, rank in rank_of.items()
    }
    width = max((right for _, right, _ in stops.values()), default=0.0) + 2
    height = max(middles.values(), default=0.0) + BOX_HEIGHT / 2 + 2
    return chart(
        label,
        *[_edge([stops[item] for item in chain]) for chain in chains],
        *[_box(box, *stops[index]) for index, box in enumerate(boxes)],
        role="group",
        class_="graph",
        width=round(width),
        height=round(height),
        viewBox=f"0 0 {round(width)} {round(height)}",
    )


def _ranks(parents: Sequence[tuple[int, ...]]) -> list[int]:
    """Return each box's layer: one more than its latest parent's. A cycle, which no recipe has, is cut anywhere."""
    ranks: dict[int, int] = {}
    waiting = list(range(len(parents)))
    while waiting:
        ready = [item for item in waiting if all(parent in ranks for parent in parents[item])] or waiting[:1]
        for item in ready:
            ranks[item] = max((ranks[parent] + 1 for parent in parents[item] if parent in ranks), default=0)
        waiting = [item for item in waiting if item not in ranks]
    for item, above in enumerate(parents):  # what comes from nothing stands just before its first use
        uses = [ranks[child] for child, theirs in enumerate(parents) if item in theirs]
        if not above and uses:
            ranks[item] = max(0, min(uses) - 1)
    return [ranks[item] for item in range(len(parents))]


def _layers(parents: Sequence[tuple[int, ...]]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the items of each layer, and each edge as a chain of items; items past the boxes are places of edges."""
    ranks = _ranks(parents)
    layers: list[list[int]] = [[] for _ in range(max(ranks, default=-1) + 1)]
    for item, rank in enumerate(ranks):
        layers[rank].append(item)
    chains, fresh = [], len(parents)
    for item, above in enumerate(parents):
        for parent in above:
            chain = [parent]
            for rank in range(ranks[parent] + 1, ranks[item]):
                layers[rank].append(fresh)
                chain.append(fresh)
                fresh += 1
            chains.append([*chain, item])
    return layers, chains


def _middles(layers: list[list[int]], chains: list[list[int]], boxes: int) -> dict[int, float]:
    """Order each layer by its neighbours, in place, and return the vertical middle of every item."""
    before: dict[int, list[int]] = {item: [] for layer in layers for item in layer}
    after: dict[int, list[int]] = {item: [] for layer in layers for item in layer}
    for chain in chains:
        for left, right in pairwise(chain):
            before[right].append(left)
            after[left].append(right)
    heights = {item: BOX_HEIGHT if item < boxes else PLACE_HEIGHT for item in before}
    both = {item: before[item] + after[item] for item in before}
    middles = _stacked(layers, heights)
    for sweep in range(SWEEPS):  # from left to right and back, to find an order
        for layer in reversed(layers) if sweep % 2 else layers:
            wanted = _wanted(layer, after if sweep % 2 else before, middles)
            layer.sort(key=wanted.__getitem__)
            middles |= _stacked([layer], heights)
    for _ in range(SWEEPS):  # then only move things closer
        for layer in layers:
            wanted = _wanted(layer, both, middles)
            middles |= _spread(layer, [wanted[item] for item in layer], heights)
    top = min((middle - heights[item] / 2 for item, middle in middles.items()), default=0.0)
    return {item: middle - top + 2 for item, middle in middles.items()}


def _wanted(layer: list[int], neighbours: dict[int, list[int]], middles: dict[int, float]) -> dict[int, float]:
    """Return the mean of each item's neighbours; an item without any stays where it is."""
    means = {}
    for item in layer:
        places = [middles[other] for other in neighbours[item]] or [middles[item]]
        means[item] = sum(places) / len(places)
    return means


def _stacked(layers: list[list[int]], heights: dict[int, float]) -> dict[int, float]:
    """Return the middles of layers that stand close, each around zero."""
    stacks = [_spread(layer, [0.0] * len(layer), heights) for layer in layers]
    return {item: middle for stack in stacks for item, middle in stack.items()}


def _spread(layer: list[int], wanted: list[float], heights: dict[int, float]) -> dict[int, float]:
    """Return the middles nearest to the wanted ones, in the layer's order, without overlap.

    Least squares under an order is solved by pooling: what would overlap moves as one block, to its mean.
    """
    offsets, offset = [], 0.0
    for before, item in zip([None, *layer], layer, strict=False):
        offset += 0.0 if before is None else (heights[before] + heights[item]) / 2 + GAP
        offsets.append(offset)
    blocks: list[tuple[float, int]] = []  # sum and count
    for middle, offset in zip(wanted, offsets, strict=True):
        total, count = middle - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            more, others = blocks.pop()
            total, count = total + more, count + others
        blocks.append((total, count))
    starts = [total / count for total, count in blocks for _ in range(count)]
    return {item: start + offset for item, start, offset in zip(layer, starts, offsets, strict=True)}


def _edge(stops: Sequence[tuple[float, float, float]]) -> Markup:
    """Return the curve from the first stop's right side, through the places, to the last one's left, with its head."""
    x, y = stops[0][1], stops[0][2]
    path = [f"M{x:.0f} {y:.0f}"]
    for place, (left, right, middle) in enumerate(stops[1:], 1):
        half = (x + left) / 2
        path.append(f"C{half:.0f} {y:.0f} {half:.0f} {middle:.0f} {left:.0f} {middle:.0f}")
        if place < len(stops) - 1:
            path.append(f"H{right:.0f}")
        x, y = right, middle
    head = f"M{stops[-1][0]:.0f} {y:.0f}l-7 -4v8z"
    return el("g", el("path", d="".join(path)), el("path", d=head, class_="head"), class_="edge")


def _box(box: Box, left: float, right: float, middle: float) -> Markup:
    top = middle - BOX_HEIGHT / 2
    content = [
        el("title", box.told) if box.told else None,
        el("rect", x=left, y=top, width=right - left, height=BOX_HEIGHT, rx=5.0 if box.kind == "step" else 23.0),
        el("text", clipped(box.name, 24), x=(left + right) / 2, y=top + 20, class_="name"),
        el("text", clipped(box.below, 28), x=(left + right) / 2, y=top + 36),
    ]
    return (
        el("a", *content, href=box.link, class_=f"box {box.kind}")
        if box.link
        else el("g", *content, class_=f"box {box.kind}")
    )
