"""Arithmetic on the elements of tensors, written down first and run later.

`a + b` of two arrays is an array that knows how it is made. The engine turns what a method returns into a program of
small steps and runs it over all elements of a tensor in one go (see `program`, `kernels`), so a method reads like its
formula and memory is passed over once. Numbers stand for arrays of equal elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Array:
    """One number for each element of a tensor: an input, or the result of a step on other arrays."""

    __hash__ = object.__hash__
    __slots__ = ("index", "of", "op", "value")

    def __init__(self, op: str, of: tuple[Array, ...] = (), *, index: int = 0, value: float = 0.0) -> None:
        self.op = op
        self.of = of
        self.index = index  # which input, stream of random numbers, or row of kept bits
        self.value = value

    def __add__(self, other: Array | float) -> Array:
        return Array("ADD", (self, array(other)))

    def __radd__(self, other: float) -> Array:
        return Array("ADD", (array(other), self))

    def __sub__(self, other: Array | float) -> Array:
        return Array("SUB", (self, array(other)))

    def __rsub__(self, other: float) -> Array:
        return Array("SUB", (array(other), self))

    def __mul__(self, other: Array | float) -> Array:
        # Most weights and scales are 1, and times 1 nothing changes, to the last bit.
        return Array("MUL", (self, array(other))) if isinstance(other, Array) or other != 1 else self

    def __rmul__(self, other: float) -> Array:
        return Array("MUL", (array(other), self))

    def __truediv__(self, other: Array | float) -> Array:
        return Array("DIV", (self, array(other))) if isinstance(other, Array) or other != 1 else self

    def __rtruediv__(self, other: float) -> Array:
        return Array("DIV", (array(other), self))

    def __neg__(self) -> Array:
        return Array("SUB", (array(0.0), self))

    def __abs__(self) -> Array:
        return Array("ABS", (self,))

    def __lt__(self, other: Array | float) -> Array:
        return Array("LT", (self, array(other)))

    def __le__(self, other: Array | float) -> Array:
        return Array("LE", (self, array(other)))

    def __gt__(self, other: Array | float) -> Array:
        return Array("LT", (array(other), self))

    def __ge__(self, other: Array | float) -> Array:
        return Array("LE", (array(other), self))

    def __bool__(self) -> bool:
        raise TypeError("an array has no truth of its own: use where(condition, a, b)")

    def __repr__(self) -> str:
        told = {"INPUT": f"input {self.index}", "RANDOM": f"random {self.index}", "VALUE": f"{self.value:g}"}
        return told.get(self.op) or f"{self.op.lower()}({', '.join(map(repr, self.of))})"


def array(value: Array | float) -> Array:
    """Return an array, of equal elements where a number is given."""
    return value if isinstance(value, Array) else Array("VALUE", value=float(value))


def where(condition: Array, then: Array | float, otherwise: Array | float) -> Array:
    """Return `then` where the condition is not 0, `otherwise` elsewhere; comparisons give 1 and 0."""
    return Array("WHERE", (condition, array(then), array(otherwise)))


def equal(one: Array, other: Array | float) -> Array:
    """Return 1 where two arrays are equal, 0 elsewhere."""
    return Array("EQ", (one, array(other)))


def once(condition: Array, index: int) -> Array:
    """Return the condition, which costs so much that it is worth a bit of memory for each element: where a tensor is
    passed over again, and the engine has room, it is not worked out again. Each has an index of its own in a merge.
    """
    return Array("ONCE", (condition,), index=index)


def sign(of: Array) -> Array:
    """Return 1, -1 or 0."""
    return Array("SIGN", (of,))


def sqrt(of: Array) -> Array:
    """Return the square root."""
    return Array("SQRT", (of,))


def exp(of: Array) -> Array:
    """Return e to the power of an array; beyond -700 and 700 as at them."""
    return Array("EXP", (minimum(maximum(of, -700.0), 700.0),))


def tanh(of: Array) -> Array:
    """Return the hyperbolic tangent, as exact near 0 as elsewhere."""
    return Array("TANH", (minimum(maximum(of, -20.0), 20.0),))


def minimum(one: Array, other: Array | float) -> Array:
    """Return the smaller of two arrays, element by element."""
    return Array("MIN", (one, array(other)))


def maximum(one: Array, other: Array | float) -> Array:
    """Return the larger of two arrays, element by element."""
    return Array("MAX", (one, array(other)))


def total(parts: Sequence[Array]) -> Array:
    """Return the sum of arrays, added in their order."""
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def equals(one: Any, other: Any) -> bool:
    """Whether two arrays are made the same way (`==` compares identity)."""
    return repr(one) == repr(other)
