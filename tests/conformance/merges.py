"""Properties that every merge has, on models, numbers of them, weights and parameters that hypothesis makes up."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, reject, settings
from hypothesis import strategies as st
from tests.merging import merge, merge_in_memory, near, tensors

from lfm.errors import LfmError
from lfm.method import Card, Method
from lfm.reuse.merge import _engine
from lfm.reuse.merge._machine import kernels

Model = dict[str, torch.Tensor]

# What is true of a method by its own formula, and so is no flaw of it.
SELECTIVE = {"arcee_fusion"}  # takes over what moved most, whatever its parameters: never all of a source
FIRST_OF_EQUALS = {"magmax"}  # of changes that are equally large, that of the earlier model counts
THINNED = {"dare_linear", "dare_ties", "della", "della_linear"}  # at random, and what is kept is divided
ELECTING = {"ties", "breadcrumbs_ties", "dare_ties", "della"}
ADDING = {"task_arithmetic", "breadcrumbs", "dare_linear", "della_linear"}

WHOLE = {"density": 1.0, "scale": 1.0, "t": 1e38, "beta": 0.0, "epsilon": 0.0}  # nothing dropped, all the way gone
UNORDERED = {"decay": 1.0, "task": None, "select_topk": 1.0}  # else by place in the list, or by rounding of variances
PLAIN = {"normalize": True, "scale": 1.0}  # so that equal models without a base give that model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.1.a.weight", "model.norm.weight", "x")
ODD = torch.tensor([-0.0, 0.0, 1e-40, -1e-44, 3e38, 1.0])  # what arithmetic may lose: signs of 0, denormals


PHASES = tuple(Phase)


def settled(examples: int) -> Any:
    """Settings of a property: the same examples every time, and no clock on shared machines.

    A card's examples are few and each takes several merges: making them up is slow beside what hypothesis expects.
    """
    quiet = [HealthCheck.too_slow]
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=quiet,
        report_multiple_bugs=False,
        phases=PHASES,
    )


# --- what is made up


@dataclass(frozen=True)
class Tensor:
    """How one tensor of all models is made; the numbers themselves come from a seed, which is quick."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    change: str
    seed: int

    @property
    def unit(self) -> float:
        sizes = {"tiny": 1e-30, "huge": 1e30}
        narrow = {"tiny": 1e-6, "huge": 1e3}
        return (narrow if self.dtype == torch.float16 else sizes).get(self.kind, 1.0)

    def make(self, count: int) -> list[torch.Tensor]:
        """Return the base's tensor and those of `count` sources."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw() -> torch.Tensor:
            if self.kind == "zeros":
                return torch.zeros(self.shape, dtype=torch.float64)
            if self.kind == "ties":
                return torch.randint(-1, 2, self.shape, generator=generator).double() / 2
            return torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.unit

        def moved(base: torch.Tensor) -> torch.Tensor:
            if self.change == "none":
                return base
            if self.change == "few":  # elements, and the others stay, as in sparse tuning
                return base + draw() * (torch.rand(self.shape, generator=generator) < 0.3)
            return base + draw() / (8 if self.change == "small" else 1)

        base = draw().to(self.dtype)
        return [base, *(moved(base.double()).to(self.dtype) for _ in range(count))]


SHAPES = st.one_of(
    st.just(()),
    st.integers(0, 70).map(lambda n: (n,)),
    st.tuples(st.integers(0, 9), st.integers(1, 9)),
    st.sampled_from([(3, 2, 3, 1), (2, 0, 3), (1, 33), (33, 1)]),
)
KINDS = ("normal", "ties", "zeros", "tiny", "huge")


def tensors_of(kinds: Sequence[str]) -> st.SearchStrategy[dict[str, Tensor]]:
    """Models of one to four tensors, each of a type, shape and kind of its own."""
    one = st.builds(
        Tensor,
        st.sampled_from(DTYPES),
        SHAPES,
        st.sampled_from(kinds),
        st.sampled_from(["small", "large", "few", "none"]),
        st.integers(0, 1 << 20),
    )
    return st.dictionaries(st.sampled_from(NAMES), one, min_size=1, max_size=4)


def counts(card: Card, least: int = 1, most: int = 4) -> st.SearchStrategy[int]:
    low, high = card.needs.sources
    return st.integers(max(low, least), max(min(high or most, most), low))


def weights(card: Card, count: int, signed: bool = False) -> st.SearchStrategy[list[float] | None]:
    """Weights that are powers of 2, so that changes which balance out do so in every order."""
    if not card.load().weighted:
        return st.none()
    numbers = [0.5, 1.0, 2.0, *([-1.0] if signed else [])]
    return st.none() | st.lists(st.sampled_from(numbers), min_size=count, max_size=count)


def parameters(card: Card, **fixed: Any) -> st.SearchStrategy[Method]:
    """The method with parameters from all over their ranges; `fixed` ones as given, if it has them."""
    found: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in card.load().model_fields.items():
        kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
        if name in fixed:
            found[name] = st.just(fixed[name])
        elif get_origin(field.annotation) is Literal:
            found[name] = st.sampled_from(get_args(field.annotation))
        elif kinds == [bool]:
            found[name] = st.booleans()
        elif kinds in ([int], [float]):
            found[name] = st.just(field.default) | _numbers(kinds[0], field.default, _bounds(field.metadata))
    return st.fixed_dictionaries(found).map(lambda values: card.load()(**values))


def _bounds(metadata: Sequence[Any]) -> dict[str, float]:
    """Return ge, gt, le and lt, as far as they are given."""
    found: dict[str, float] = {}
    for item in metadata:
        parts = item if isinstance(item, annotated_types.GroupedMetadata) else [item]
        for part in parts:
            found |= {key: getattr(part, key) for key in ("ge", "gt", "le", "lt") if hasattr(part, key)}
    return found


def _numbers(kind: type, default: Any, bounds: Mapping[str, float]) -> st.SearchStrategy[Any]:
    """Numbers of a range; where it is open, not far above its default, for steps of training take time."""
    low = bounds.get("ge", bounds.get("gt", -2.0))
    if kind is int:
        return st.integers(int(low), min(int(bounds.get("le", 5)), 5))
    small = default is not None and 0 < default < 0.01
    top = bounds.get("le", bounds.get("lt", 10 * default if small else 2.0))
    if "gt" in bounds:
        low += (top - low) / 1000
    return st.sampled_from([low, low + (top - low) / 4, low + (top - low) / 2, top if "lt" not in bounds else low])


# --- running and comparing


def run(card: Card, method: Method, models: Sequence[Model], with_base: bool = True, **options: Any) -> Model:
    """Merge in memory; `models` begin with the base, which goes along where the method takes one."""
    takes = card.needs.base or (card.load().takes_base and with_base)
    return merge_in_memory(method, models[1:], models[0] if takes else None, **options)


def made(plan: Mapping[str, Tensor], count: int) -> list[Model]:
    columns = {name: tensor.make(count) for name, tensor in plan.items()}
    return [{name: column[place] for name, column in columns.items()} for place in range(count + 1)]


def slack(dtype: torch.dtype) -> tuple[float, float]:
    """Return what a rounding or a few may be: relative to the largest number of a tensor, and absolute."""
    info = torch.finfo(dtype)
    return max(2 * info.eps, 1e-5), 2 * info.smallest_normal * info.eps


def close(found: Model, expected: Model, models: Sequence[Model], extra: float = 0.0) -> None:
    """Compare tensors, to within a rounding of the largest number that went into them."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        largest = max((float(m[name].abs().max()) for m in (*models, expected) if m[name].numel()), default=0.0)
        relative, absolute = slack(tensor.dtype)
        torch.testing.assert_close(
            found[name].double(),
            tensor.double(),
            rtol=0,
            atol=relative * largest + absolute + extra,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, -0.0 and 0.0 apart."""
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


# --- the properties


def keeps_shapes_types_and_numbers(card: Card) -> None:
    @settled(12)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        count = data.draw(counts(card))
        models = made(data.draw(tensors_of(KINDS)), count)
        method, given = data.draw(parameters(card)), data.draw(weights(card, count))
        assume(not method.objections(given or [1.0] * count))
        try:
            found = run(card, method, models, data.draw(st.booleans()), weights=given)
        except LfmError as error:
            if "overflows" not in str(error):
                raise
            reject()  # beyond what the type holds: refused, not written
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
            n: (t.shape, t.dtype) for n, t in models[0].items()
        }
        assert all(torch.isfinite(tensor).all() for tensor in found.values())

    holds()


def gives_back_what_is_everywhere_the_same(card: Card) -> None:
    """Sources that are the base give the base bit for bit; without a base, equal models give that model."""

    @settled(10)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        count = data.draw(counts(card))
        based = card.needs.base or (card.load().takes_base and data.draw(st.booleans()))
        odd = ODD if based else ODD.clamp(max=1e38)  # 2 a - a needs room
        model = {**made(data.draw(tensors_of(KINDS)), 0)[0], "odd": odd}
        method, given = data.draw(parameters(card, **({} if based else PLAIN))), data.draw(weights(card, count))
        assume(not method.objections(given or [1.0] * count))
        found = run(card, method, [model] * (count + 1), based, weights=given)
        if based:
            same = {name: same_bits(found[name], model[name]) for name in model}
            assert all(same.values()), same
        else:
            close(found, model, [])

    holds()


def gives_back_a_single_source(card: Card) -> None:
    if card.needs.sources[0] > 1 or card.name in SELECTIVE:
        return

    @settled(12)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        models = made(data.draw(tensors_of(KINDS)), 1)
        fixed = {**WHOLE, "alpha": 1.0, "select_topk": 1.0, "task": data.draw(st.sampled_from([None, 0]))}
        method = data.draw(parameters(card, **fixed))
        given = data.draw(st.sampled_from([None, [1.0]])) if card.load().weighted else None
        close(run(card, method, models, data.draw(st.booleans()), weights=given), models[1], models)

    holds()


def does_not_depend_on_the_order_of_sources(card: Card) -> None:
    high = card.needs.sources[1]
    if high is not None and (high == 1 or not card.load().weighted):
        return

    @settled(12)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        count = data.draw(counts(card, least=2, most=3))
        models = made(data.draw(tensors_of(KINDS)), count)
        based = data.draw(st.booleans())
        method = data.draw(parameters(card, **UNORDERED, density=data.draw(st.sampled_from([0.25, 0.5, 1.0]))))
        given = data.draw(weights(card, count, signed=True))
        assume(not method.objections(given or [1.0] * count))
        order = data.draw(st.permutations(range(count)))
        turned = [models[0], *(models[1 + place] for place in order)]
        one = run(card, method, models, based, weights=given)
        two = run(card, method, turned, based, weights=given and [given[place] for place in order])
        if card.name in FIRST_OF_EQUALS:
            one, two = (_how_far(model, models[0]) for model in (one, two))
        # A step of Adam is as long where noise points as elsewhere.
        close(two, one, models, 2 * getattr(method, "steps", 0) * getattr(method, "learning_rate", 0))

    holds()


def _how_far(model: Model, base: Model) -> Model:
    return {name: (model[name].double() - base[name].double()).abs().to(base[name].dtype) for name in base}


def does_not_depend_on_how_it_runs(card: Card) -> None:
    """From files or memory, threads, the size of a chunk, and whether there is a compiler: the same bytes."""
    base = tensors(0, shapes={"w": (31, 33), "v": (700,), "none": (0, 3), "one": ()})
    low, high = card.needs.sources
    models = [base, *(near(base, seed) for seed in range(1, 1 + min(max(low, 3), high or 3)))]
    method = card.load()()
    with tempfile.TemporaryDirectory() as folder:
        one = merge(method, models[1:], base if card.needs.base else None, at=Path(folder), threads=1)
    others = [run(card, method, models, False, threads=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "CHUNK", 64)
        patch.setattr(_engine, "KEEP", 0)
        others.append(run(card, method, models, False))
        patch.setattr(kernels, "native", lambda wide: None)
        others.append(run(card, method, models, False))
    for other in others:
        assert all(same_bits(one[name], other[name]) for name in one)


def drops_nothing_at_density_one(card: Card) -> None:
    """Whatever else says how to trim, and whatever the seed; what is left is the method without trimming."""
    if "density" not in card.parameters.model_fields:
        return

    @settled(10)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        count = data.draw(counts(card))
        models = made(data.draw(tensors_of(KINDS)), count)
        shared = {"scale": data.draw(st.sampled_from([0.3, 1.0])), "normalize": data.draw(st.booleans())}
        given = data.draw(weights(card, count))
        fixed = {**shared, "density": 1.0, "rules": "paper"}
        methods = [data.draw(parameters(card, **fixed)) for _ in range(2)]
        one, two = (run(card, method, models, weights=given, seed=seed) for seed, method in enumerate(methods))
        close(two, one, models)
        if card.name in ELECTING | ADDING:
            close(one, _untrimmed(card, models, given, **shared), models)

    holds()


def _untrimmed(card: Card, models: Sequence[Model], given: Sequence[float] | None, scale: float, normalize: bool):
    """Return base + scale * (the sum of the w_i tau_i, or of those that agree with it in sign), maybe divided."""
    found = {}
    for name, base in models[0].items():
        by = torch.tensor(given or [1.0] * (len(models) - 1), dtype=torch.float64)
        by = by.reshape(-1, *(1,) * base.ndim)
        wide = torch.stack([model[name].double() - base.double() for model in models[1:]]) * by
        if card.name in ELECTING:
            agrees = wide.sign() * wide.sum(0).sign() > 0
            change, divisor = (wide * agrees).sum(0), (by * agrees).sum(0)
        else:
            change, divisor = wide.sum(0), by.sum(0)
        change = change / torch.where(divisor > 0, divisor, 1.0) if normalize else change
        found[name] = (base.double() + scale * change).to(base.dtype)
    return found


def is_unbiased_where_it_drops_at_random(card: Card) -> None:
    """The mean over many elements and seeds is that of the method without trimming, to within five standard errors."""
    if card.name not in THINNED:
        return

    @settled(8)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        count = 1 if card.name in ELECTING else data.draw(counts(card, most=3))  # elections are not linear
        shape = data.draw(st.sampled_from([(4099,), (64, 65), (8, 513)]))
        dtype, seed = data.draw(st.sampled_from([torch.float32, torch.float64])), data.draw(st.integers(0, 1 << 20))
        models = made({"w": Tensor(dtype, shape, "normal", "large", seed)}, count)
        density = data.draw(st.sampled_from([0.1, 0.3, 0.5, 0.9]))
        fixed = {"density": density, "scale": 1.0, "rescale": "expectation"}
        method = data.draw(parameters(card, **fixed, epsilon=data.draw(st.sampled_from([0.0, 0.05, density / 2]))))
        whole = run(card, method.model_copy(update={"density": 1.0}), models)["w"].double()
        seeds = data.draw(st.integers(0, 1000).map(lambda first: range(first, first + 4)))
        found = torch.stack([run(card, method, models, seed=seed)["w"].double() for seed in seeds])
        sizes = (whole - models[0]["w"].double()).sign()  # else what is too large and what is too small would cancel
        error = (found - whole) * sizes
        assert error.std() > 0, "nothing was dropped"
        assert abs(error.mean()) < 5 * error.std() / error.numel() ** 0.5

    holds()


MERGE_CHECKS = (
    keeps_shapes_types_and_numbers,
    gives_back_what_is_everywhere_the_same,
    gives_back_a_single_source,
    does_not_depend_on_the_order_of_sources,
    does_not_depend_on_how_it_runs,
    drops_nothing_at_density_one,
    is_unbiased_where_it_drops_at_random,
)
