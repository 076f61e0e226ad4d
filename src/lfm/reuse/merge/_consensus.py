"""Mixing task vectors: added up, or averaged over those that agree in sign (steps 2 and 3 of TIES)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lfm.reuse.merge._machine.array import Array, array, maximum, sign, total, where

Rules = Literal["paper", "mergekit"]


def weighted_sum(deltas: Sequence[Array], weights: Sequence[float], *, divide: bool = False) -> Array:
    """Return sum_i w_i tau_i, divided by the sum of the weights if asked (and if that is not 0)."""
    added = total([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
    divisor = sum(weights)
    return added / divisor if divide and abs(divisor) >= 1e-8 else added


def elect_and_average(
    deltas: Sequence[Array], weights: Sequence[float], *, divide: bool = True, rules: Rules = "paper"
) -> Array:
    """Return the mean of the w_i tau_i whose sign is that of their sum, by |w_i| (or their sum, undivided).

    0 where the sum of all is 0: nothing is elected. By mergekit's rules + is elected there, and the mean is by w_i: a
    negative weight cancels itself.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    elected = elect(weighted, rules)
    if not divide:
        return average_agreeing(weighted, elected, None)
    return average_agreeing(weighted, elected, weights if rules == "mergekit" else [abs(w) for w in weights])


def elect(changes: Sequence[Array], rules: Rules) -> Array:
    """Return the sign of the sum of changes; where it is 0, 0 or (by mergekit's rules) 1."""
    added = total(changes)
    return where(added >= 0, array(1.0), -1.0) if rules == "mergekit" else sign(added)


def average_agreeing(
    changes: Sequence[Array], elected: Array, weights: Sequence[float] | None, *, least: float = 0.0
) -> Array:
    """Return the sum of the changes whose sign is the elected one, divided by the sum of their weights (by `least` if
    that is less); 0 where there is none.
    """
    agreeing = [maximum(change * elected, 0.0) for change in changes]  # their sizes
    merged = total(agreeing)
    if weights is not None:
        share = total([sign(size) * weight for size, weight in zip(agreeing, weights, strict=True)])
        merged = merged / (maximum(share, least) if least else where(share, share, 1.0))
    return merged * elected
