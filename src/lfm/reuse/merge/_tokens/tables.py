"""Tensors whose rows belong to tokens: which they are, and reading them row by row in another order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lfm.reuse.merge._tokens.vocabulary import Alignment

CHUNK = 1 << 20  # elements that are summed at a time
DType = type[np.generic] | np.dtype[Any]
Array = np.ndarray[Any, Any]
Read = Callable[[int, int], Array]  # (first element, one after the last) -> the elements, flat

# The part of a name before `.weight`; each of them is an embedding of token ids in some family of models.
EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "tokens_embed", "token_embedding"),
    *("embed_in", "shared", "embeddings", "w"),
)
# The part before `.weight` or `.bias`; each of them gives a score for every token, in some family of models.
HEADS = (
    *("lm_head", "embed_out", "output", "head", "output_layer", "output_projection", "decoder", "out_proj", "proj"),
    *("proj_out", "vocab_projector", "lm_loss", "generator_lm_head", "embedding_decoder", "predictions"),
)
EMBEDDING = re.compile(rf"(.*\.)?({'|'.join(EMBEDDINGS)})\.weight|(.*\.)?embed_tokens\w*\.weight")
HEAD = re.compile(rf"(.*\.)?({'|'.join(HEADS)})\.(weight|bias)|(.*\.)?final_logits_bias")
LAYER = re.compile(r"(^|\.)\d+\.")
SHARED_HEAD = re.compile(r".*\.shared_head\.head\.weight")  # of layers that predict a token further ahead
TEXT_PARTS = ("text_config", "llm_config", "language_config", "text_model_config", "decoder", "thinker_config")


@dataclass(frozen=True)
class Tables:
    """The tensors of a model whose rows belong to tokens.

    `others` are those that have something to do with tokens too, but not one row for each: they cannot follow when
    tokens move.
    """

    rows: int = 0
    names: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def vocabulary_tables(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None = None) -> Tables:
    """Return the tensors whose rows belong to tokens: embeddings, output layers, and the biases of the latter.

    They have as many rows as the input embedding, and either a name that says so or, outside of numbered layers, a
    number of rows that nothing else in the config explains. A bias of shape (1, rows) counts as rows of width 1.
    """
    rows = _rows(shapes, config)
    if not rows:
        return Tables()
    telling = config is not None and rows not in _other_numbers(config)
    names, others = [], []
    for name, shape in shapes.items():
        loose = _is_loose(name)
        named = EMBEDDING.fullmatch(name) or SHARED_HEAD.fullmatch(name) or (loose and HEAD.fullmatch(name))
        if rows_of(shape) == rows and (named or (telling and loose)):
            names.append(name)
        elif (EMBEDDING.fullmatch(name) and len(shape) == 2 and "embed_tokens" in name) or (telling and rows in shape):
            others.append(name)
    return Tables(rows, tuple(names), tuple(others))


def rows_of(shape: Sequence[int]) -> int:
    """Return the number of rows of a tensor of this shape; one row of numbers is taken for a column."""
    if len(shape) == 2 and shape[0] == 1:
        return shape[1]
    return shape[0] if shape else 0


def _rows(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None) -> int:
    """Return the rows of the input embedding: as many as the config says, or else those of the largest that is one."""
    named = [shape[0] for name, shape in shapes.items() if len(shape) == 2 and EMBEDDING.fullmatch(name)]
    if config is not None and (said := vocabulary_size(config)):
        telling = said not in _other_numbers(config)
        likely = (shape for name, shape in shapes.items() if HEAD.fullmatch(name) or (telling and _is_loose(name)))
        if said in named or any(rows_of(shape) == said for shape in likely):
            return said
    return max(named, default=0)


def _is_loose(name: str) -> bool:
    return LAYER.search(name) is None


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Return what a config says of the number of tokens; 0 where it says nothing."""
    parts = [config, *(part for key in TEXT_PARTS if isinstance(part := config.get(key), dict))]
    for part in parts:
        if type(size := part.get("vocab_size")) is int:
            return size
    return 0


def _other_numbers(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of a config that are not about tokens: widths, depths, lengths."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _other_numbers(value)
        elif type(value) is int and "vocab" not in key and not key.endswith(("_token_id", "_token_index")):
            yield value


# --- reading --------------------------------------------------------------------------------------------------------


def read_rows(
    read: Read, rows: Array, width: int, start: int, stop: int, dtype: DType = np.float32
) -> tuple[Array, Array]:
    """Return elements [start, stop) of a table in its new order, and which of the rows they touch are missing.

    `read` gives elements of the table as it is stored; `rows` says for each row of the new order where it stands there,
    -1 for one that does not: its elements are zero. Rows that follow each other are read in one go. The second result
    has one flag for each row from that of element `start` to that of element `stop - 1`.
    """
    first, last = start // width, -(-stop // width)
    wanted = rows[first:last]
    return _gather(read, wanted, first, width, start, stop, dtype), wanted < 0


def _gather(read: Read, wanted: Array, first: int, width: int, start: int, stop: int, dtype: DType) -> Array:
    values = np.zeros(stop - start, dtype)
    for low, high in _runs(wanted):
        if wanted[low] >= 0:
            begin, end = max((first + low) * width, start), min((first + high) * width, stop)
            offset = int(wanted[low]) * width + begin - (first + low) * width
            values[begin - start : end - start] = read(offset, offset + end - begin)
    return values


def _runs(wanted: Array) -> Iterator[tuple[int, int]]:
    """Yield the stretches of rows that stand one behind the other, and those of missing rows."""
    before, after = wanted[:-1], wanted[1:]
    joined = np.where(before < 0, after < 0, after == before + 1)
    cuts = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(wanted)]
    return pairwise(cuts if len(wanted) else ())


def aligned(
    reads: Sequence[Read],
    alignment: Alignment,
    width: int,
    start: int,
    stop: int,
    *,
    means: Sequence[Array] = (),
    dtype: DType = np.float32,
) -> list[Array]:
    """Return elements [start, stop) of one table in every model, in the output's order and with no row missing.

    `reads` and `means` are in the order of the models; `means` (from `mean_rows`) is needed where `alignment.means` has
    a row in that range. `dtype` is a floating-point type.
    """
    first, last = start // width, -(-stop // width)
    parts = [read_rows(read, rows, width, start, stop, dtype) for read, rows in zip(reads, alignment.rows, strict=True)]
    missing = np.any([flags for _, flags in parts], axis=0)
    if missing.any():
        default = _default(reads, alignment, missing, width, start, stop, dtype)
        average = alignment.means[first:last]
        for index, (values, flags) in enumerate(parts):
            lacking = _of_elements(flags, width, start, stop)
            values[lacking] = default[lacking]
            if (flags & average).any():
                places = np.flatnonzero(_of_elements(flags & average, width, start, stop))
                values[places] = means[index][(places + start) % width]
    return [values for values, _ in parts]


def _default(
    reads: Sequence[Read], alignment: Alignment, missing: Array, width: int, start: int, stop: int, dtype: DType
) -> Array:
    """Return the mean of the donors' rows where rows are missing."""
    first = start // width
    total = np.full(stop - start, -0.0)  # the sum of nothing that leaves even the sign of a zero as it is
    count = np.zeros(len(missing))
    for read, donors in zip(reads, alignment.donors, strict=True):
        wanted = np.where(missing, donors[first : first + len(missing)], -1)
        here = _of_elements(wanted >= 0, width, start, stop)
        total[here] += _gather(read, wanted, first, width, start, stop, dtype)[here]
        count += wanted >= 0
    total[_of_elements(count == 0, width, start, stop)] = 0.0
    total /= _of_elements(np.maximum(count, 1), width, start, stop)
    return total.astype(dtype)


def mean_rows(reads: Sequence[Read], alignment: Alignment, width: int, dtype: DType = np.float32) -> list[Array]:
    """Return, for every model, the mean of the rows of tokens in its aligned table, in float64; reads it once.

    Rows that are to become that mean do not count. The parts it reads do not depend on the memory there is: nor do the
    last bits of the sums.
    """
    counted = alignment.named & ~alignment.means
    totals = [np.zeros(width) for _ in reads]
    step = max(1, CHUNK // width)
    nothing = [np.zeros(width) for _ in reads]
    for low in range(0, alignment.size, step):
        high = min(low + step, alignment.size)
        if not counted[low:high].any():
            continue
        parts = aligned(reads, alignment, width, low * width, high * width, means=nothing, dtype=dtype)
        for total, values in zip(totals, parts, strict=True):
            total += values.reshape(-1, width)[counted[low:high]].sum(0, dtype=np.float64)
    return [total / max(int(counted.sum()), 1) for total in totals]


def _of_elements(flags: Array, width: int, start: int, stop: int) -> Array:
    """Return for elements [start, stop) what is given for the rows that they touch."""
    offset = start % width
    return np.repeat(flags, width)[offset : offset + stop - start]
