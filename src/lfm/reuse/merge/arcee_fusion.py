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
    copies = 2.0

    fence: float = Field(1.5, ge=0, description="Interquartile ranges above the median from which a change matters.")

    def merge(self, tensor: Whole) -> Values:
        [source], base = tensor.sources, tensor.the_base
        scores = _importance(source, base)
        first, median, third = _quartiles(scores)
        np.copyto(source, base, where=scores < median + self.fence * (third - first))
        return source


def _importance(source: Values, base: Values) -> Values:
    """Return |source - base| times the divergence of its row."""
    shape = (-1, source.shape[-1] if source.ndim else 1)
    rows, others = source.reshape(shape), base.reshape(shape)
    scores = np.empty_like(rows)
    step = max(BLOCK // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        change = np.subtract(rows[part], others[part])
        divergence = _divergence(rows[part], change)
        np.abs(change, out=change)
        np.multiply(change, divergence[:, None], out=scores[part])
    return scores.reshape(source.shape)


def _divergence(rows: Values, change: Values) -> Values:
    """Return KL(softmax(rows) || softmax(rows - change)) of each row."""
    p = np.exp(rows - rows.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    u = change - np.einsum("rc,rc->r", p, change)[:, None]
    # e^-u - 1 + u: a series where u is small, for there the difference would lose all digits
    excess = u * u * (1 / 2 - u * (1 / 6 - u * (1 / 24 - u * (1 / 120 - u / 720))))
    large = np.abs(u).max(axis=1) > 0.25
    if large.any():
        wide = u[large].astype(np.float64)
        with np.errstate(over="ignore"):
            excess[large] = np.minimum(np.expm1(-wide) + wide, np.finfo(p.dtype).max)
    divergence: Values = np.log1p(np.einsum("rc,rc->r", p, excess))
    return divergence


def _quartiles(scores: Values) -> list[float]:
    """Return the elements a quarter, a half and three quarters of the way up."""
    rest, start = scores.flatten(), 0
    found: list[float] = []
    for share in (0.25, 0.5, 0.75):
        place = int(share * (scores.size - 1))
        rest[start:].partition(place - start)  # what is before `start` is no larger, and stays there
        found.append(float(rest[place]))
        start = place
    return found
