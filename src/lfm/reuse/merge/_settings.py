"""What a method's parameters and weights are for one tensor: they may differ by layer, by name, and by model.

    0.5                              everywhere
    [0.2, 0.5, 0.9]                  by layer: the first value in the first, the last in the last, straight between
    {mlp: 0.5, attn: [0, 1], default: 1}    by tensor: the first key that is part of the name, `default` for the rest
    {per_model: [0.3, {mlp: 1, default: 0}]}    by model, where the method says that it may

Tensors outside of the layers take the first value of a list. What a slice says goes before what the step says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from lfm.reuse.merge._contract import Inputs, Merge

PER_MODEL = "per_model"
ANY = ("default", "*")


@dataclass(frozen=True, eq=False)
class Resolved:
    """A method with its parameters, and weights, as they are for one tensor."""

    method: Merge
    weights: tuple[float, ...]
    values: dict[str, tuple[Any, ...]]  # of parameters that may differ between sources, one for each source


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its name in the output and in each source, and how deep its layer lies, 0 to 1."""

    name: str
    sources: tuple[str, ...]
    depth: float = 0.0


@dataclass
class Settings:
    """Resolves parameters, tensor by tensor; equal answers are one object."""

    method: Merge
    inputs: Inputs
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known: dict[Any, Resolved] = {}
        self._leaves: dict[Any, Any] = {}
        self._plain = not self.inputs.vary and all(isinstance(w, (int, float)) for w in self.inputs.weights or ())

    def resolve(
        self,
        place: Place,
        *,
        weights: Sequence[Any] | None = None,
        shared: Mapping[str, Any] | None = None,
        own: Sequence[Mapping[str, Any]] | None = None,
    ) -> Resolved:
        """Return method and weights for a tensor; `weights`, `shared` and `own` (by source) are what its slice says."""
        given = weights if weights is not None else self.inputs.weights
        if self._plain and not shared and not any(own or ()) and weights is None:
            key: Any = len(place.sources)
            if key not in self._known:
                self._known[key] = self._resolved({}, given, place)
            return self._known[key]
        levels = [shared or {}, self.inputs.vary]
        levels = [{name: self._numbers(name, value) for name, value in level.items()} for level in levels]
        own = [{name: self._numbers(name, value) for name, value in level.items()} for level in own or ()]
        values: dict[str, tuple[Any, ...]] = {}
        for name in dict.fromkeys(name for level in (*levels, *(own or ())) for name in level):
            values[name] = self._values(name, levels, place, own)
        return self._resolved(values, given, place)

    def _numbers(self, name: str, setting: Any) -> Any:
        """Return a setting with its plain values as the parameter has them: YAML takes 1e-3 for text."""
        if isinstance(setting, dict):
            return {key: self._numbers(name, value) for key, value in setting.items()}
        if isinstance(setting, (list, tuple)):
            return [self._numbers(name, value) for value in setting]
        key = (name, repr(setting))
        if key not in self._leaves:
            try:
                self._leaves[key] = check_one(type(self.method), name, setting)
            except ValueError:  # told elsewhere
                self._leaves[key] = setting
        return self._leaves[key]

    def _values(
        self, name: str, levels: Sequence[Mapping[str, Any]], place: Place, own: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Any, ...]:
        """Return a parameter's value for each source; the same for all where it may not differ."""
        default = getattr(self.method, name)
        found = []
        for index, source in enumerate(place.sources):
            settings = [own[index][name]] if own and name in own[index] else []
            per_source = name in type(self.method).per_source
            for level in levels:
                if name in level:
                    of_model = level[name]
                    if isinstance(of_model, dict) and PER_MODEL in of_model:
                        listed = of_model[PER_MODEL]
                        of_model = listed[index] if index < len(listed) else None
                    settings.append(of_model)
            at = (value_at(setting, source if per_source else place.name, place.depth) for setting in settings)
            found.append(next((value for value in at if value is not None), default))
        return tuple(found)

    def _resolved(
        self,
        values: Mapping[str, tuple[Any, ...]],
        weights: Sequence[Any] | None,
        place: Place,
    ) -> Resolved:
        if weights is None or len(weights) != len(place.sources):  # a wrong number of them is a problem of its own
            weights = [1.0] * len(place.sources)
        found = [value_at(weight, source, place.depth) for weight, source in zip(weights, place.sources, strict=True)]
        numbers = tuple(1.0 if number is None else float(number) for number in found)
        key = (len(place.sources), numbers, tuple(sorted((name, value) for name, value in values.items())))
        if key not in self._known:
            per_source = type(self.method).per_source
            each = {name: values.get(name) or (getattr(self.method, name),) * len(place.sources) for name in per_source}
            plain = {name: value[0] for name, value in values.items() if name not in per_source}
            self._known[key] = Resolved(self._changed(plain, place), numbers, each)
        return self._known[key]

    def _changed(self, plain: Mapping[str, Any], place: Place) -> Merge:
        if not plain:
            return self.method
        given = {name: getattr(self.method, name) for name in self.method.model_fields_set}
        try:
            return type(self.method)(**{**given, **plain})
        except ValidationError as error:
            self.problems += [f"{place.name}: {item['msg']} (got {item['input']!r})" for item in error.errors()]
            return self.method


def value_at(setting: Any, name: str, depth: float) -> Any:
    """Return a setting's value for a tensor; None where none of its filters matches."""
    if isinstance(setting, dict):
        for part, value in setting.items():
            if part in ANY or part in name:
                return value_at(value, name, depth)
        return None
    if isinstance(setting, (list, tuple)):
        return _between(setting, depth)
    return setting


def _between(values: Sequence[Any], depth: float) -> Any:
    place = depth * (len(values) - 1)
    index = min(int(place), len(values) - 1)
    after = values[min(index + 1, len(values) - 1)]
    if any(isinstance(value, (bool, str)) for value in (values[index], after)):
        return values[index]
    value = (1 - (place - index)) * values[index] + (place - index) * after
    return int(value) if all(isinstance(item, int) for item in values) and value == int(value) else value


def leaves(setting: Any) -> Iterator[Any]:
    """Yield every plain value of a setting."""
    if isinstance(setting, dict):
        for value in setting.values():
            yield from leaves(value)
    elif isinstance(setting, (list, tuple)):
        for value in setting:
            yield from leaves(value)
    else:
        yield setting


def setting_problems(method: Merge, inputs: Inputs) -> list[str]:
    """Return what is wrong with everything that varies: names, shapes, and each value by itself."""
    given = [("", inputs.vary)]
    given += [(f"slices.{i}.", part.parameters) for i, part in enumerate(inputs.slices)]
    given += [
        (f"slices.{i}.sources.{j}.", source.parameters)
        for i, part in enumerate(inputs.slices)
        for j, source in enumerate(part.sources)
    ]
    problems = []
    for where, settings in given:
        for name, setting in settings.items():
            problems += [f"{where}{name}: {line}" for line in _problems(method, name, setting, len(inputs.models))]
    return problems


def _problems(method: Merge, name: str, setting: Any, models: int) -> Iterator[str]:
    if name not in type(method).model_fields:
        yield f"{type(method).__name__} has no such parameter"
        return
    if isinstance(setting, dict) and PER_MODEL in setting:
        if name not in type(method).per_source:
            yield "cannot differ between models"
        if len(setting) > 1 or not isinstance(setting[PER_MODEL], list) or len(setting[PER_MODEL]) != models:
            yield f"per_model takes a list with one value for each of the {models} models, and nothing beside it"
            return
    for value in leaves(setting):
        try:
            check_one(type(method), name, value)
        except ValueError as error:
            yield str(error)
    if any(isinstance(part, (list, tuple)) and not part for part in _lists(setting)):
        yield "an empty list has no values"


def _lists(setting: Any) -> Iterator[Any]:
    if isinstance(setting, dict):
        for value in setting.values():
            yield from _lists(value)
    elif isinstance(setting, (list, tuple)):
        yield setting
        for value in setting:
            yield from _lists(value)


def check_one(model: type[BaseModel], name: str, value: Any) -> Any:
    """Return `value` as the parameter `name` has it, or raise ValueError where it can be none."""
    info = model.model_fields[name]
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{error.errors()[0]['msg']} (got {value!r})") from None
