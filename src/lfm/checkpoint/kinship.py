"""Which models belong together: fine-tunes of one base, distant relatives, strangers; judged by a sample of weights.

Averaging weights works between models that were trained together until late, and gives noise between independent
trainings. The matrices tell which of the two it is; vectors and embeddings do not, since norms, biases and tables look
alike among strangers. Measured: the median cosine over the matrices, and the accuracy of the two models' average
beside their own.

    fine-tunes of stories260k, 20 to 400 steps            0.987 to 1.000
    fine-tunes of a small ViT on half the digits          0.995          93 %, they 69 and 81 %
    it, and as long a training again at the full rate     0.91           94 %, they 93 and 95 %
    from one initialisation, other data since             0.62           18 %, they 48 and 48 %
    from one initialisation, other lengths of training    0.78           56 %, they 70 and 93 %
    a young ViT and its sevenfold training                0.58           89 %, they 70 and 94 %
    two initialisations of that ViT                       0.00           24 %, they 93 % (all weights: 0.83)
    what cifar10-resnet20 and -resnet56 have in common    0.00           (its matrices: -0.13 to 0.07)

Sorted row norms of two independent matrices differ, in units of their spread over the root of their number, by 0.7 or
more (2,000 draws, 16 to 1,024 rows); those of a matrix and its permuted copy, moved by 2 % since, by 0.4 or less.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np

from lfm.checkpoint._open import Checkpoint
from lfm.checkpoint._sample import Array, Unit, agree, sample, values
from lfm.checkpoint._weights import RAW, Weights
from lfm.errors import RequestError

BLOCKS = 512  # in a sample, of 4,096 elements: 4 MB of each model in bfloat16
FEW_BLOCKS = 64  # in the sample for warnings

RELATED = 0.9  # median cosine of the matrices from which on averaging worked
UNRELATED = 0.1  # below it two matrices have nothing in common, unless they are tiny
MANY = 0.25  # share of unrelated matrices that is more than a new head or two
HALF = 0.5  # share of the larger model's elements that the other has, too, if they are of one architecture
CENTRAL = 0.9  # squared distance from a base to a source over that between sources; 0.5 if orthogonal and as long
OPPOSITE = -0.5  # cosine of two changes that lead apart from their mean, and not from a base
ALIKE = 0.3  # mean cosine of changes from a model that is not the base of the others but has moved less than they
NOTICED = 0.5  # an element has changed noticeably if by this part of the root mean square change of its tensor
ROWS_AGREE = 0.5  # see above; tried on a few matrices, one for warnings, that are not low and not large
ROW_MATRICES, MIN_ROWS, MAX_ELEMENTS = 3, 16, 1 << 22

TABLES = re.compile(r"embed|(^|\.)(wte|wpe|shared)\.")  # rows for tokens or places


class Verdict(StrEnum):
    """What two models are to each other."""

    SAME = "same weights"
    SIBLINGS = "siblings"  # fine-tunes of one base, or base and fine-tune
    DISTANT = "distant relatives"  # continued training, one initialisation, parts in common
    STRANGERS = "strangers"
    PERMUTED = "permuted?"
    OTHER = "other architecture"
    UNKNOWN = "cannot tell"  # no finite matrices that are not zero


@dataclass(frozen=True)
class Pair:
    """Two models compared; numbers are None where there is nothing to take them from."""

    models: tuple[str, str]
    verdict: Verdict
    cosine: float | None  # of all weights that both have
    matrix_cosine: float | None  # median over the matrices
    unrelated: float | None  # share of the matrices that have nothing in common
    distance: float | None  # |A - B| / |A|
    equal: float | None  # share of the shared tensors whose bits agree; in the coarser type where types differ
    shared: int  # tensors of one name, shape and kind
    other_shape: int
    missing: tuple[int, int]  # in the first, in the second


@dataclass(frozen=True)
class TaskVector:
    """How far a source has gone from the base: |source - base| / |base|."""

    model: str
    norm: float | None


@dataclass(frozen=True)
class TaskPair:
    """How the changes of two sources agree."""

    models: tuple[str, str]
    cosine: float | None
    sign_conflict: float | None  # of the elements that both changed noticeably, the share with opposite signs


@dataclass(frozen=True)
class Kinship:
    """Models compared pair by pair and, where there is a base, by their changes from it."""

    pairs: tuple[Pair, ...]
    base: str | None
    task_vectors: tuple[TaskVector, ...]
    task_pairs: tuple[TaskPair, ...]
    compared: float  # share that was read of what the models share


def kinship(checkpoints: Iterable[Checkpoint], base: Checkpoint | None = None, *, everything: bool = False) -> Kinship:
    """Return how models are related, by an evenly spread sample of their weights, or by all of them.

    `base` is one of the models, or one more. Without it, with three models or more, the one that looks like the base of
    the others is taken, if one does: clearly closer to each of them than they are to each other, their changes from it
    the most nearly orthogonal. That cannot be told where one has changed much more than another.
    Raises RequestError for fewer than two models.
    """
    models = _base_first(checkpoints, base)
    if len(models) < 2:
        raise RequestError(f"kinship is between 2 models or more, got {len(models)}")
    refs = [model.ref for model in models]
    survey = _Survey([model.weights for model in models], None if everything else BLOCKS)
    pairs = {places: survey.pair(*places, refs) for places in itertools.combinations(range(len(models)), 2)}
    family = _largest_family(pairs, len(models)) if base is None else list(range(len(models)))
    root = survey.find_base(family) if base is None else 0
    if root is None:
        return Kinship(tuple(pairs.values()), None, (), (), survey.compared)
    sources = [model for model in family if model != root]
    conflicts = survey.sign_conflicts(root, sources)
    return Kinship(
        pairs=tuple(pairs.values()),
        base=refs[root],
        task_vectors=tuple(TaskVector(refs[m], survey.distance(root, m)) for m in sources),
        task_pairs=tuple(
            TaskPair((refs[i], refs[j]), survey.task_cosine(root, i, j), conflict)
            for (i, j), conflict in conflicts.items()
        ),
        compared=survey.compared,
    )


def strangers(checkpoints: Iterable[Checkpoint], base: Checkpoint | None = None) -> list[str]:
    """Return a warning for each pair of models whose average is not likely to work, with what would work instead.

    Takes some ten milliseconds: it reads a small sample of the matrices alone.
    """
    models = _base_first(checkpoints, base)
    refs = [model.ref for model in models]
    survey = _Survey([model.weights for model in models], FEW_BLOCKS, brief=True)
    warnings = (
        _warning(survey.pair(i, j, refs), with_base=base is not None and i == 0)
        for i, j in itertools.combinations(range(len(models)), 2)
    )
    return [warning for warning in warnings if warning]


def _base_first(checkpoints: Iterable[Checkpoint], base: Checkpoint | None) -> list[Checkpoint]:
    return [*([] if base is None else [base]), *(model for model in checkpoints if model is not base)]


def _warning(pair: Pair, *, with_base: bool) -> str | None:
    if pair.verdict in (Verdict.SAME, Verdict.SIBLINGS, Verdict.UNKNOWN) or pair.matrix_cosine is None:
        return None
    one, two = pair.models
    alike = f"median cosine of their matrices {round(pair.matrix_cosine, 2) + 0.0:.2f}"
    if pair.verdict is Verdict.PERMUTED:
        return (
            f"{one} and {two}: one looks like a copy of the other with its neurons permuted ({alike}, yet rows of the "
            "same norms); align the permutations first, or merging them gives noise"
        )
    if pair.verdict is Verdict.DISTANT:
        return (
            f"{one} and {two} are distant relatives ({alike}, of fine-tunes of one base {RELATED} or more"
            f"{_strange_part(pair)}): their merge may be worse than either; measure it, and compare it with their "
            "ensemble or a model distilled from both"
        )
    if with_base:
        return (
            f"{two} does not stem from the base {one} ({alike}), so their difference is no task vector: is it the "
            "right base? If there is none, ensemble the models, or distil them into one"
        )
    return (
        f"{one} and {two} are strangers ({alike}, as between independent trainings), and merging them gives noise: "
        "ensemble them, distil them into one, or align their permutations first"
    )


def _strange_part(pair: Pair) -> str:
    share = pair.unrelated or 0
    return f"; {share:.0%} of the matrices have nothing in common" if share > MANY else ""


def _largest_family(pairs: Mapping[tuple[int, int], Pair], count: int) -> list[int]:
    """Return the models of the largest set that is held together by kinship."""
    family = list(range(count))
    for (i, j), pair in pairs.items():
        if pair.verdict in (Verdict.SAME, Verdict.SIBLINGS, Verdict.DISTANT):
            family = [family[i] if label == family[j] else label for label in family]
    largest = max(family, key=family.count)
    return [model for model, label in enumerate(family) if label == largest]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 and math.isfinite(part) and math.isfinite(whole) else None


def _by_chance(elements: int) -> float:
    """Return the cosine up to which vectors of so many elements may be unrelated: 3 sigma, and what training leaves."""
    return max(UNRELATED, 3 / math.sqrt(elements))


class _Survey:
    """Sums over the tensors that models share, from which all measures follow.

    For unit u and models i, j: `products[u, i, j]` is <w_i, w_j>; `offsets[u, i, j]` is <w_i - w_0, w_j - w_0> with the
    unit's first model 0, from which distances follow without cancellation; both scaled from the sample to the whole
    tensor. `usable[u, i]`: the model has it, and its numbers are finite. `equal[u, i, j]`: the bits agree. A `brief`
    survey looks at matrices alone, and not at their bits.
    """

    def __init__(self, weights: Sequence[Weights], blocks: int | None, *, brief: bool = False) -> None:
        self.weights, self.brief = weights, brief
        self.units, self.compared = sample(weights, blocks, matrices_only=brief)
        shape = (len(self.units), len(weights), len(weights))
        self.products, self.offsets = np.zeros(shape), np.zeros(shape)
        self.equal, self.usable = np.zeros(shape, dtype=bool), np.zeros(shape[:2], dtype=bool)
        self.judged = _judged(self.units)
        self.row_norms = cache(self._row_norms)
        for index, unit in enumerate(self.units):
            with np.errstate(all="ignore"):  # NaN, infinities and overflow end as not usable
                self._add(index, unit)

    def _add(self, index: int, unit: Unit) -> None:
        count = len(unit.members)
        products, offsets = np.zeros((count, count)), np.zeros((count, count))
        equal = np.full((count, count), not self.brief)
        dtypes = [self.weights[model].specs[unit.name].dtype for model in unit.members]
        for start, stop in unit.parts:
            raw = [self.weights[model].read_raw(unit.name, start, stop) for model in unit.members]
            for i, j in itertools.combinations(range(0 if self.brief else count), 2):
                equal[i, j] = equal[i, j] and agree(raw[i], raw[j], (dtypes[i], dtypes[j]))
            if unit.spec.floating:
                w = np.stack([values(*part) for part in zip(raw, dtypes, strict=True)], dtype=np.float64)
                products += w @ w.T
                w -= w[np.isfinite(w).all(1).argmax()].copy()  # of the first that is finite
                offsets += w @ w.T
        finite = np.isfinite(products.diagonal() + offsets.diagonal()) & unit.spec.floating
        both, scale = np.outer(finite, finite), unit.spec.size / unit.read
        place = np.ix_([index], unit.members, unit.members)
        self.products[place] = np.where(both, products * scale, 0)
        self.offsets[place] = np.where(both, offsets * scale, 0)
        self.equal[place] = equal & equal.T
        self.usable[index, unit.members] = finite

    # --- pairs

    def pair(self, i: int, j: int, refs: Sequence[str]) -> Pair:
        """Return models i < j compared."""
        one, two = self.weights[i].specs, self.weights[j].specs
        common = [name for name in one if name in two]
        shared = [name for name in common if one[name].same_as(two[name])]
        whole = len(shared) == len(one) == len(two)
        larger = max(sum(spec.size for spec in specs.values()) for specs in (one, two))
        overlap = sum(one[name].size for name in shared) / larger if larger else 1.0
        both = [u for u, unit in enumerate(self.units) if i in unit.members and j in unit.members]
        equal = float(self.equal[both, i, j].mean()) if both else None
        same = whole and equal == 1 and all(specs[name].dtype in RAW for specs in (one, two) for name in shared)
        rows = self.usable[:, i] & self.usable[:, j]
        product, *squares = (float(self.products[rows, a, b].sum()) for a, b in ((i, j), (i, i), (j, j)))
        cosines = self._cosines(i, j)
        strange = [u for u, cosine in cosines.items() if abs(cosine) < _by_chance(self.units[u].read)]
        return Pair(
            models=(refs[i], refs[j]),
            verdict=Verdict.SAME if same else self._verdict(i, j, overlap, cosines, strange),
            cosine=_ratio(product, math.sqrt(squares[0]) * math.sqrt(squares[1])),
            matrix_cosine=float(np.median(list(cosines.values()))) if cosines else None,
            unrelated=len(strange) / len(cosines) if cosines else None,
            distance=self.distance(i, j),
            equal=equal,
            shared=len(shared),
            other_shape=len(common) - len(shared),
            missing=(len(two) - len(common), len(one) - len(common)),
        )

    def _cosines(self, i: int, j: int) -> dict[int, float]:
        """Return the cosine of each judged matrix that both have and that is zero in neither."""
        norms = np.sqrt(self.products[:, i, i]) * np.sqrt(self.products[:, j, j])
        chosen = np.flatnonzero(self.judged & self.usable[:, i] & self.usable[:, j] & (norms > 0))
        return {int(u): float(self.products[u, i, j] / norms[u]) for u in chosen}

    def _verdict(self, i: int, j: int, overlap: float, cosines: Mapping[int, float], strange: list[int]) -> Verdict:
        """Return what models with different weights are to each other."""
        if not cosines:
            return Verdict.OTHER if overlap < HALF else Verdict.UNKNOWN
        median = float(np.median(list(cosines.values())))
        unrelated = median < _by_chance(sum(self.units[u].read for u in cosines))
        many = len(strange) > MANY * len(cosines)
        if unrelated and overlap < HALF:
            return Verdict.OTHER
        if many and self._rows_agree(i, j, strange):
            return Verdict.PERMUTED
        if unrelated:
            return Verdict.STRANGERS
        return Verdict.SIBLINGS if median >= RELATED and not many else Verdict.DISTANT

    def _rows_agree(self, i: int, j: int, units: list[int]) -> bool:
        """Whether matrices have rows of the same lengths, in whatever order; reads a few of them whole."""
        tried = [u for u in units if self.units[u].spec.shape[0] >= MIN_ROWS]
        tried = sorted((u for u in tried if self.units[u].spec.size <= MAX_ELEMENTS), key=self._size)[
            : 1 if self.brief else ROW_MATRICES
        ]
        gaps = []
        for one, two in ((self.row_norms(i, u), self.row_norms(j, u)) for u in tried):
            spread = float(one.std())
            if spread > 1e-4 * float(one.mean()):  # rows that are normalised tell nothing
                gaps.append(float(np.sqrt(np.square(one - two).mean() * len(one))) / spread)
        return bool(gaps) and float(np.median(gaps)) < ROWS_AGREE

    def _size(self, unit: int) -> int:
        return self.units[unit].spec.size

    def _row_norms(self, model: int, unit: int) -> Array:
        name, weights = self.units[unit].name, self.weights[model]
        spec = weights.specs[name]
        with np.errstate(all="ignore"):
            rows = values(weights.read_raw(name), spec.dtype).reshape(spec.shape[0], -1)
            return np.sort(np.sqrt(np.einsum("rc,rc->r", rows, rows)))

    # --- base and task vectors

    def distance(self, i: int, j: int) -> float | None:
        """Return |w_i - w_j| / |w_i| over what both have."""
        rows = self.usable[:, i] & self.usable[:, j]
        apart = _inner(self.offsets[rows].sum(0), i, j, j)
        return _ratio(math.sqrt(max(0.0, apart)), math.sqrt(float(self.products[rows, i, i].sum())))

    def task_cosine(self, base: int, i: int, j: int) -> float | None:
        """Return the cosine between what i and j have changed in the base."""
        total = self.offsets[self.usable[:, [base, i, j]].all(1)].sum(0)
        lengths = (math.sqrt(max(0.0, _inner(total, base, m, m))) for m in (i, j))
        return _ratio(_inner(total, base, i, j), math.prod(lengths))

    def find_base(self, family: Sequence[int]) -> int | None:
        """Return the model that looks like the base of the others, if one does."""
        if len(family) < 3:
            return None
        total = self.offsets[self.usable[:, family].all(1)].sum(0)
        found = []
        for base in family:
            others = list(itertools.combinations([m for m in family if m != base], 2))
            central = all(
                max(_inner(total, base, i, i), _inner(total, base, j, j)) < CENTRAL * _inner(total, i, j, j)
                for i, j in others
            )
            cosines = [self.task_cosine(base, i, j) for i, j in others] if central else []
            known = [cosine for cosine in cosines if cosine is not None]
            # A merge lies between its sources, too, but from there they lie in opposite directions; and from a sibling
            # that has moved less than the others these lie all on one side, where the base is.
            if central and len(known) == len(others) and min(known) > OPPOSITE and sum(known) < ALIKE * len(known):
                found.append((float(np.abs(known).mean()), base))
        return min(found)[1] if found else None

    def sign_conflicts(self, base: int, sources: Sequence[int]) -> dict[tuple[int, int], float | None]:
        """Return, for each two sources, how often signs differ among the elements that both changed noticeably."""
        noticed = dict.fromkeys(itertools.combinations(sources, 2), 0.0)
        opposed = dict(noticed)
        for index, unit in enumerate(self.units if noticed else ()):
            here = [m for m in sources if self.usable[index, [base, m]].all()]
            for start, stop in unit.parts if len(here) > 1 else ():
                signs = self._changes(index, base, here, start, stop)
                scale = unit.spec.size / unit.read
                for (i, one), (j, two) in itertools.combinations(signs.items(), 2):
                    product = one * two
                    noticed[i, j] += scale * int(np.count_nonzero(product))
                    opposed[i, j] += scale * int(np.count_nonzero(product < 0))
        return {pair: _ratio(opposed[pair], noticed[pair]) for pair in noticed}

    def _changes(self, index: int, base: int, sources: list[int], start: int, stop: int) -> dict[int, Array]:
        """Return the sign of each source's change of each element, 0 where it is not noticeable."""
        unit = self.units[index]
        read = {
            m: values(self.weights[m].read_raw(unit.name, start, stop), self.weights[m].specs[unit.name].dtype)
            for m in (base, *sources)
        }
        signs = {}
        for m in sources:
            change = np.subtract(read[m], read[base], dtype=np.float64)
            least = NOTICED * math.sqrt(max(0.0, _inner(self.offsets[index], base, m, m)) / unit.spec.size)
            signs[m] = np.where(np.abs(change) > least, np.sign(change), 0).astype(np.int8)
        return signs


def _judged(units: Sequence[Unit]) -> Array:
    """Return which tensors are judged by: the matrices that are no embeddings, or those if there is nothing else."""
    matrix = np.array([unit.matrix for unit in units], dtype=bool)
    proper = matrix & np.array([not TABLES.search(unit.name) for unit in units], dtype=bool)
    return proper if proper.any() else matrix


def _inner(offsets: Array, base: int, i: int, j: int) -> float:
    """Return <w_i - w_base, w_j - w_base> from the inner products of offsets from whatever else."""
    return float(offsets[i, j] - offsets[i, base] - offsets[base, j] + offsets[base, base])
