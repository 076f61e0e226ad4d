"""What the `parameters` of a mergekit configuration amount to, as settings of ours.

mergekit looks for a parameter at up to four levels: that of the model, of the slice, of the module, of the whole file.
At a level it takes the first entry whose `filter` is part of the tensor's name; where none is, the next level decides.
All levels see the same name, so their entries can be written one after the other: {filter: value, ..., default: value}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfm.errors import did_you_mean
from lfm.recipe._yaml import Located
from lfm.reuse.merge._mergekit.methods import ALL_PARAMETERS, Known, Parameter, as_kind
from lfm.reuse.merge._settings import ANY, PER_MODEL, leaves

Place = tuple[str | int, ...]
DEFAULT = ANY[0]


@dataclass(frozen=True)
class Level:
    """The parameters that stand at one place of the file."""

    values: dict[str, Any]
    place: Place  # of the mapping
    of_model: bool = False

    def where(self, name: str) -> Place:
        return (*self.place, name)


@dataclass
class Reading:
    """Reads parameters of one method; gathers what is wrong, and what is to be known."""

    located: Located
    called: str
    known: Known
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origins: dict[str, Place] = field(default_factory=dict)  # where a key of ours comes from

    def __post_init__(self) -> None:
        self._told: set[str] = set()

    def problem(self, place: Place, text: str) -> None:
        self.problems.append(f"{self.located.where(place)}: {text}")

    def note(self, place: Place, text: str) -> None:
        """Tell it, at the first place where it holds."""
        if text not in self._told:
            self._told.add(text)
            self.notes.append(f"{self.located.where(place)}: {text}")

    # --- names

    def check(self, level: Level) -> None:
        """Look at the names of a level: each is one of the method's, or another's, or wrong."""
        for name in level.values:
            parameter = self.known.parameters.get(name)
            if parameter is None and name not in ALL_PARAMETERS:
                hint = did_you_mean(name, [*self.known.parameters, *ALL_PARAMETERS])
                self.problem(level.where(name), f"{self.called} has no such parameter{hint}")
            elif parameter is None:
                self.note(level.where(name), f"{self.called} has no such parameter, so it has no effect")
            elif not parameter.ours:
                self.note(level.where(name), "changes no number, here as in mergekit")
            elif level.of_model and not parameter.each:
                self.problem(
                    level.where(name),
                    "is one value for all models, and mergekit ignores it here; move it to the `parameters` of the "
                    "slice or of the whole file",
                )

    # --- values

    def value(self, name: str, levels: Sequence[Level], place: Place) -> Any:
        """Return a parameter as a setting of ours, from levels in the order of precedence; None where it is missing.

        `place` is what needs it.
        """
        parameter, before = self.known.parameters[name], len(self.problems)
        found: dict[str, Any] = {}
        for level in levels:
            if name in level.values:
                self.origins.setdefault(parameter.ours, level.where(name))
                for part, value in self._entries(parameter, level.values[name], level.where(name)):
                    if DEFAULT not in found:
                        found.setdefault(part, value)
                if DEFAULT in found:
                    return found[DEFAULT] if len(found) == 1 else found
        if not parameter.required:
            default = parameter.converted(parameter.default)
            return {**found, DEFAULT: default} if found else default
        if found:
            told = f"{self.called} needs `{name}` for every tensor, and it is given for those that filters match"
            self.problem(place, f"{told}; add an entry without `filter` as the last")
        elif len(self.problems) == before:
            each = ", of its own or for all models" if parameter.each else ""
            self.problem(place, f"{self.called} needs `{name}`{each}, and it is not given")
        return None

    def _entries(self, parameter: Parameter, raw: Any, place: Place) -> Iterator[tuple[str, Any]]:
        """Yield (part of a name, value) for each entry of a setting; `default` for every name."""
        if isinstance(raw, dict):
            yield from self._entry(parameter, raw, place)
        elif isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
            for index, item in enumerate(raw):
                yield from self._entry(parameter, item, (*place, index))
        elif isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
            self.problem(place, "mixes values with entries of `filter` and `value`; write every one as such an entry")
        elif not isinstance(raw, list) or raw:  # an empty list says nothing, as in mergekit
            yield DEFAULT, self._converted(parameter, raw, place)

    def _entry(self, parameter: Parameter, raw: dict[str, Any], place: Place) -> Iterator[tuple[str, Any]]:
        for key in raw:
            if key not in ("filter", "value"):
                hint = did_you_mean(key, ("filter", "value"))
                self.problem((*place, key), f"unknown key; an entry has `value` and perhaps `filter`{hint}")
        part = raw.get("filter")
        if "value" not in raw:
            self.problem(place, "has no `value`")
        elif part is not None and not isinstance(part, str):
            self.problem((*place, "filter"), f"is a part of the tensors' names, got {part!r}; put it in quotes")
        elif part in (DEFAULT, PER_MODEL):
            self.problem((*place, "filter"), f"{part!r} has a meaning of its own here; use a longer part of the names")
        elif isinstance(raw["value"], list) and not raw["value"]:
            self.problem((*place, "value"), "an empty list has no values")
        else:
            yield DEFAULT if part in (None, *ANY) else part, self._converted(parameter, raw["value"], (*place, "value"))

    def _converted(self, parameter: Parameter, raw: Any, place: Place) -> Any:
        """Return a value, or a list of values by layer, as it is given here."""
        values = raw if isinstance(raw, list) else [raw]
        found = []
        for index, value in enumerate(values):
            try:
                found.append(parameter.converted(value))
            except ValueError as error:
                self.problem((*place, index) if isinstance(raw, list) else place, str(error))
        if len(found) < len(values):
            return None
        found = self._within(parameter, found, place)
        remarks = [parameter.remark(as_read(parameter, value)) for value in values if parameter.remark]
        for remark in dict.fromkeys(filter(None, remarks)):
            self.note(place, remark)
        return found if isinstance(raw, list) else found[0]

    def _within(self, parameter: Parameter, values: list[Any], place: Place) -> list[Any]:
        """Return values no smaller and no larger than what they can amount to."""
        if parameter.kind is bool:
            return values
        inside = [min(max(value, parameter.least), parameter.most) for value in values]
        if inside != values and len(set(values)) > 1:
            self.problem(
                place, f"goes beyond {parameter.least:g} to {parameter.most:g} within a list by layer: {values}"
            )
        elif inside != values:
            self.note(place, f"{values[0]} counts as {inside[0]:g}")
        return inside


def as_read(parameter: Parameter, value: Any) -> Any:
    """Return a value as mergekit understands it."""
    return as_kind(value, parameter.kind)


def mapped(setting: Any, change: Callable[[Any], Any]) -> Any:
    """Return a setting with every plain value changed."""
    if isinstance(setting, dict):
        return {part: mapped(value, change) for part, value in setting.items()}
    if isinstance(setting, list):
        return [mapped(value, change) for value in setting]
    return change(setting)


def is_plain(setting: Any, value: Any) -> bool:
    """Whether a setting is this value everywhere."""
    return all(leaf == value for leaf in leaves(setting))
