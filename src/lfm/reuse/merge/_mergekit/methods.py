"""The merge methods of mergekit 0.1.5: what each takes, and what it is called and how it is set here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
WEIGHT = "weight"  # what stands for a model's share, which is an input here and no parameter

# How a method stands to `base_model`: it must have one, may have one, takes it as the first of its two models, or as
# one model among the others.
Base = Literal["required", "optional", "first", "ordinary"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of mergekit."""

    ours: str  # its name here; empty where it changes no number
    kind: type = float
    default: Any = REQUIRED
    each: bool = False  # whether models may differ in it
    said: Mapping[Any, Any] = field(default_factory=dict)  # what its values are called here, where not the same
    least: float = -math.inf  # values below and above count as these
    most: float = math.inf
    remark: Callable[[Any], str] | None = None  # what to know about a value, where the two programs differ

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def converted(self, value: Any) -> Any:
        """Return a single value as it is given here. Raises ValueError where it is none of the parameter's kind."""
        found = as_kind(value, self.kind)
        return self.said.get(found, found)


@dataclass(frozen=True)
class Known:
    """A method of mergekit."""

    ours: str
    base: Base
    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what makes ours compute as theirs does
    notes: tuple[str, ...] = ()  # where the two still differ


def as_kind(value: Any, kind: type) -> Any:
    """Return a value as mergekit reads it: 1e-3 is text to YAML, and true counts as 1."""
    if isinstance(value, str) and kind is not bool:
        value = float(value) if _is_number(value) else value
    if kind is bool:
        return _as_bool(value)
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    if kind is int:
        if value != int(value):
            raise ValueError(f"{value!r} is no whole number")
        return int(value)
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


YES = ("1", "on", "t", "true", "y", "yes")
NO = ("0", "off", "f", "false", "n", "no")


def _as_bool(value: Any) -> bool:
    text = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value).lower()
    if text not in (*YES, *NO):
        raise ValueError(f"{value!r} is neither true nor false")
    return text in YES


# --- where numbers still differ


def _where(applies: Callable[[Any], bool], text: str) -> Callable[[Any], str]:
    return lambda value: text if applies(value) else ""


_cut = _where(
    lambda share: 0 < share < 1,
    "changes of exactly the size at the cut are all kept here; mergekit keeps as many as asked for, whichever",
)
_masks = _where(lambda share: 0 < share < 1, "random masks are other ones than mergekit's, made from the seed alone")
_rows = "of tensors with more than two axes, a row is all axes but the first here, and the last axis in mergekit"
_tiny = _where(
    lambda t: t < 1e-6, "mergekit divides by 1e-6 at least, so with this t it changes less where models differ by less"
)

# --- the table

_WEIGHT = {WEIGHT: Parameter(WEIGHT, each=True)}
_MASK = {"int8_mask": Parameter("", bool, False)}
_DENSITY = {"density": Parameter("density", default=1.0, each=True, least=0.0, most=1.0, remark=_cut)}
_CHANCE = {"density": Parameter("density", default=1.0, each=True, most=1.0, remark=_masks)}
_RANKED = {"density": Parameter("density", default=1.0, each=True, least=0.0, most=1.0, remark=_masks)}
_NORM = {True: "norm", False: "none"}


def _task(parameters: Mapping[str, Parameter], *, normalize: bool, rescale: bool | None) -> dict[str, Parameter]:
    """Return the parameters of a method that adds up task vectors."""
    how = Parameter("", bool, False) if rescale is None else Parameter("rescale", bool, rescale, said=_NORM)
    return {
        **_WEIGHT,
        **parameters,
        "lambda": Parameter("scale", default=1.0),
        "normalize": Parameter("normalize", bool, normalize),
        "rescale": how,
        **_MASK,
    }


_TRIMMED = {"scope": "tensor"}
_SIGNS = {"rules": "mergekit"}
_NO_DENSITY = {"density": Parameter("", default=1.0, each=True)}
_GAMMA = {**_DENSITY, "gamma": Parameter("outliers", default=0.01, each=True)}
_EPSILON = {**_RANKED, "epsilon": Parameter("epsilon", default=0.15, each=True)}

METHODS: dict[str, Known] = {
    "linear": Known("linear", "ordinary", {**_WEIGHT, "normalize": Parameter("normalize", bool, True)}),
    "slerp": Known("slerp", "first", {"t": Parameter("t")}, {"straight_from": 0.9995}),
    "nuslerp": Known(
        "nuslerp",
        "optional",
        {
            **_WEIGHT,
            "nuslerp_flatten": Parameter("unit", bool, True, remark=_where(lambda flat: not flat, _rows)),
            "nuslerp_row_wise": Parameter("unit", bool, False),
        },
    ),
    "multislerp": Known(
        "multislerp",
        "optional",
        {
            **_WEIGHT,
            "normalize_weights": Parameter("normalize", bool, True),
            "eps": Parameter("eps", default=1e-8),
        },
    ),
    "karcher": Known(
        "karcher",
        "ordinary",
        {"max_iter": Parameter("max_iter", int, 10), "tol": Parameter("tol", default=1e-5)},
        notes=("nearly parallel tensors come out more exactly than in mergekit, where their angles round to 0",),
    ),
    "passthrough": Known("passthrough", "ordinary", {"scale": Parameter("scale", default=1.0, each=True)}),
    "model_stock": Known(
        "model_stock",
        "required",
        {"filter_wise": Parameter("filter_wise", bool, False, remark=_where(bool, _rows))},
        {"extrapolate": True, "least_product": 1e-6},
    ),
    "nearswap": Known("nearswap", "required", {"t": Parameter("t", remark=_tiny)}),
    "sce": Known(
        "sce",
        "required",
        {"select_topk": Parameter("select_topk", default=1.0, least=0.0, most=1.0, remark=_cut), **_MASK},
        _SIGNS,
    ),
    "arcee_fusion": Known(
        "arcee_fusion",
        "required",
        {},
        notes=(
            "divergences are computed without mergekit's rounding, so where changes are small other weights are taken "
            "over; and quartiles are those of all elements, not of a million drawn at random",
        ),
    ),
    "ram": Known("ram", "required", {"epsilon": Parameter("epsilon", default=1e-5)}),
    "ramplus_tl": Known(
        "ramplus",
        "required",
        {
            "r": Parameter("r", default=0.1),
            "alpha": Parameter("alpha", default=0.2),
            "epsilon": Parameter("epsilon", default=1e-5),
        },
        _TRIMMED,
    ),
    "task_arithmetic": Known("task_arithmetic", "required", _task(_NO_DENSITY, normalize=False, rescale=None)),
    "ties": Known("ties", "required", _task(_DENSITY, normalize=True, rescale=False), {**_TRIMMED, **_SIGNS}),
    "breadcrumbs": Known("breadcrumbs", "required", _task(_GAMMA, normalize=False, rescale=False), _TRIMMED),
    "breadcrumbs_ties": Known(
        "breadcrumbs_ties", "required", _task(_GAMMA, normalize=False, rescale=False), {**_TRIMMED, **_SIGNS}
    ),
    "dare_linear": Known("dare_linear", "required", _task(_CHANCE, normalize=False, rescale=True)),
    "dare_ties": Known("dare_ties", "required", _task(_CHANCE, normalize=False, rescale=True), _SIGNS),
    "della": Known("della", "required", _task(_EPSILON, normalize=True, rescale=True), _SIGNS),
    "della_linear": Known("della_linear", "required", _task(_EPSILON, normalize=False, rescale=True)),
}
ALL_PARAMETERS = {name for known in METHODS.values() for name in known.parameters}
