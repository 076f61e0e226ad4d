"""Take over from a fine-tune only the weights whose change matters most, and keep the base's others.

    importance = |theta_1 - theta_0| KL(softmax(theta_1) || softmax(theta_0))     softmax and KL along the last axis
    threshold  = q_2 + `fence` (q_3 - q_1)       quartiles of the importance in the tensor
    theta      = theta_1 where the importance is at least the threshold, theta_0 elsewhere

The threshold is that for outliers in a box plot, so few weights change: those that changed much, in rows that changed
much. Quartiles are elements of the tensor: number floor(q (n - 1)) of n in their order.

mergekit works in the type of the weights, adds 1e-8 to both distributions, and takes the quartiles of a million
elements, drawn at random, where there are more. For fine-tuning as small as is usual its KL is mostly rounding (and the
rows it picks are so too); here KL = log1p(sum p (e^-u - 1 + u)), with u the change less its mean under p = softmax(
theta_1), which loses no digits. The two agree where changes are large.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._contract import Tensorwise, Whole

Values = np.ndarray[Any, Any]
BLOCK = 1 << 15  # elements that are looked at together: they stay in a core's share of the caches


class ArceeFusion(Tensorwise):
    needs = Needs(sources=(1, 1), base=True, same_architecture=True, same_tokenizer=True)
    paper = "https://www.arcee.ai"
    weighted = False
    copies = 1.5

    fence: float = Field(1.5, ge=0, description="Interquartile ranges above the median from which a change matters.")

    def merge(self, tensor: Whole) -> Values:
        pairs = list(_blocks(tensor.sources[0], tensor.the_base))
        divergences = [_divergence(rows, rows - others) for rows, others in pairs]
        scores = np.empty(tensor.the_base.size, tensor.the_base.dtype)
        start = 0
        for (rows, others), divergence in zip(pairs, divergences, strict=True):
            scores[start : start + rows.size] = _importance(rows, others, divergence).reshape(-1)
            start += rows.size
        first, median, third = _quartiles(scores)
        threshold = median + self.fence * (third - first)
        for (rows, others), divergence in zip(pairs, divergences, strict=True):
            np.copyto(rows, others, where=_importance(rows, others, divergence) < threshold)
        return tensor.sources[0]


def _blocks(source: Values, base: Values) -> Iterator[tuple[Values, Values]]:
    """Yield the same few rows of both, as views; rows run along the last axis."""
    length = source.shape[-1] if source.ndim else 1
    step = max(BLOCK // length, 1) * length
    one, other = source.reshape(-1), base.reshape(-1)
    for start in range(0, source.size, step):
        part = slice(start, start + step)
        yield one[part].reshape(-1, length), other[part].reshape(-1, length)


def _importance(rows: Values, others: Values, divergence: Values) -> Values:
    scores: Values = np.abs(rows - others)
    scores *= divergence[:, None]
    return scores


def _divergence(rows: Values, change: Values) -> Values:
    """Return KL(softmax(rows) || softmax(rows - change)) of each row."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        p = np.exp(rows - rows.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        u = change - np.einsum("rc,rc->r", p, change)[:, None]
        # e^-u - 1 + u: by its series where u is small, for there the difference would lose all digits
        excess = u * u * (1 / 2 - u * (1 / 6 - u * (1 / 24 - u * (1 / 120 - u * (1 / 720 - u / 5040)))))
        large = np.abs(u) > 0.5
        if large.any():
            most = np.finfo(u.dtype).max
            excess = np.where(large, np.minimum(np.exp(-u) - 1 + u, most), excess)
        divergence: Values = np.log1p(np.einsum("rc,rc->r", p, excess))
    return divergence


def _quartiles(scores: Values) -> list[float]:
    """Return the elements a quarter, a half and three quarters of the way up; changes the order of the scores."""
    start = 0
    found: list[float] = []
    for share in (0.25, 0.5, 0.75):
        place = int(share * (scores.size - 1))
        scores[start:].partition(place - start)  # what is before `start` is no larger, and stays there
        found.append(float(scores[place]))
        start = place
    return found
