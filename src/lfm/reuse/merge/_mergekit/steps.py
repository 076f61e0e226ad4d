"""What a configuration of mergekit means, as steps of a recipe: one, or several for a model of several modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lfm.errors import did_you_mean
from lfm.method import card, number_of_models
from lfm.recipe._yaml import Located
from lfm.recipe.foreign import ForeignStep
from lfm.reuse.merge._mergekit.document import (
    UNKNOWN,
    Document,
    Entry,
    Models,
    ModuleDefinition,
    SliceDefinition,
    SliceEntry,
)
from lfm.reuse.merge._mergekit.methods import METHODS, WEIGHT
from lfm.reuse.merge._mergekit.settings import Level, Place, Reading, is_plain, mapped
from lfm.reuse.merge._mergekit.tokens import tokenizer_of

# What mergekit calls the modules of models that have several, and what the names of their tensors can begin with.
MODULES = {
    "text_decoder": (
        *("model.language_model.*", "language_model.*", "lm_head.*"),
        *("model.layers.*", "model.embed_tokens.*", "model.norm.*"),
    ),
    "vision_tower": (
        *("model.vision_tower.*", "vision_tower.*", "model.visual.blocks.*", "model.visual.patch_embed.*"),
        *("model.visual.pos_embed.*", "visual.blocks.*", "visual.patch_embed.*", "visual.pos_embed.*"),
    ),
    "vision_model": ("model.vision_model.*", "vision_model.*"),
    "multi_modal_projector": (
        *("model.multi_modal_projector.*", "multi_modal_projector.*", "model.visual.merger.*", "visual.merger.*"),
        *("model.visual.deepstack_merger_list.*", "visual.deepstack_merger_list.*"),
    ),
    "encoder": ("encoder.*", "model.encoder.*"),
    "decoder": ("decoder.*", "model.decoder.*"),
    "shared": ("shared.*", "lm_head.*"),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Source:
    """A model that is merged."""

    model: str
    level: Level  # what is said of it alone
    place: Place
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """What is merged into a whole model, or into some of its layers."""

    sources: tuple[Source, ...]  # without the base, where it is more than one model among others
    base: Source | None
    levels: tuple[Level, ...]  # what is said of all its sources, the nearest first
    place: Place

    @property
    def everyone(self) -> tuple[Source, ...]:
        return (*([self.base] if self.base else []), *self.sources)


@dataclass(frozen=True)
class Module:
    """A module of the output, made of layers one after the other if it is `sliced`."""

    name: str
    groups: tuple[Group, ...]
    sliced: bool
    place: Place


def translate(
    document: Document, located: Located, models: Models, name: str, problems: list[str]
) -> list[ForeignStep]:
    """Return the steps that a document stands for, the result last; adds to `problems` what keeps it from that."""
    return _Translator(document, located, models, problems).steps(name)


class _Translator:
    def __init__(self, document: Document, located: Located, models: Models, problems: list[str]) -> None:
        self._document = document
        self._models = models
        self._known = METHODS[document.merge_method]
        self._read = Reading(located, document.merge_method, self._known, problems)
        self._base = None if document.base_model is None else models.label(document.base_model, ("base_model",))
        self._takes_base = self._known.base in ("required", "optional")

    def steps(self, name: str) -> list[ForeignStep]:
        modules = list(self._modules())
        whole = len(modules) == 1 and modules[0].name == "default"
        raws = [(name, self._whole(modules[0]))] if whole else self._in_parts(modules, name)
        dtype = self._dtype()
        for _, raw in raws:
            raw |= {} if dtype is None else {"dtype": dtype}
        self._last(raws)
        steps = [ForeignStep(step, raw, self._located(raw)) for step, raw in raws]
        notes = dict.fromkeys([*self._known.notes, *self._read.notes])
        return [*steps[:-1], replace(steps[-1], notes=tuple(notes))]

    # --- which models are merged where

    def _modules(self) -> Iterator[Module]:
        document = self._document
        whole = self._level(document.parameters, ())
        if not document.modules:
            plain = ModuleDefinition(models=document.models, slices=document.slices)
            yield self._module("default", plain, (), (whole,))
        for name, module in (document.modules or {}).items():
            place = ("modules", name)
            yield self._module(name, module, place, (self._level(module.parameters, place), whole))

    def _module(self, name: str, module: ModuleDefinition, place: Place, levels: tuple[Level, ...]) -> Module:
        if module.slices:
            parts = enumerate(module.slices)
            groups = [self._slice(part, (*place, "slices", index), levels) for index, part in parts]
            return Module(name, tuple(groups), True, place)
        return Module(name, (self._all_layers(module.models or [], (*place, "models"), levels),), False, place)

    def _level(self, values: dict[str, Any] | None, place: Place, *, of_model: bool = False) -> Level:
        level = Level(values or {}, (*place, "parameters"), of_model)
        self._read.check(level)
        return level

    def _all_layers(self, entries: Sequence[Entry], place: Place, levels: tuple[Level, ...]) -> Group:
        sources = [self._source(entry, (*place, index)) for index, entry in enumerate(entries)]
        if self._base is not None and self._base not in [source.model for source in sources]:
            there = ("base_model",)  # it joins the others, as the last
            sources.append(Source(self._base, Level({}, there, of_model=True), there))
        return self._arranged(sources, self._base, place, levels)

    def _slice(self, part: SliceDefinition, place: Place, levels: tuple[Level, ...]) -> Group:
        sources = [self._source(entry, (*place, "sources", index)) for index, entry in enumerate(part.sources)]
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            told = " and ".join(str(length) for length in sorted(lengths))
            self._read.problem(place, f"sources with different numbers of layers: {told}")
        if part.residual_weight is not None:
            self._read.note((*place, "residual_weight"), "has no effect, here as in mergekit")
        base = self._base
        if part.base_model is not None:
            base = self._models.label(part.base_model, (*place, "base_model"))
        return self._arranged(sources, base, place, (self._level(part.parameters, place), *levels))

    def _source(self, entry: Entry, place: Place) -> Source:
        layers = entry.layer_range if isinstance(entry, SliceEntry) else None
        if layers is not None and not 0 <= layers[0] < layers[1]:
            self._read.problem(
                (*place, "layer_range"), f"is the first layer and the one after the last, got {list(layers)}"
            )
        model = self._models.label(entry.model, (*place, "model"))
        return Source(model, self._level(entry.parameters, place, of_model=True), place, layers)

    def _arranged(self, sources: list[Source], base: str | None, place: Place, levels: tuple[Level, ...]) -> Group:
        """Return sources as a group: where the method has a base, it stands apart, or first."""
        labels = [source.model for source in sources]
        for index, source in enumerate(sources):
            if source.model in labels[:index] and source.model != UNKNOWN:
                self._read.problem(source.place, f"{source.model!r} stands here twice")
        mine = next((source for source in sources if source.model == base), None)
        role = self._known.base
        if role in ("required", "first") and base is None:
            self._read.problem(("merge_method",), f"{self._read.called} needs a `base_model`")
        elif role != "ordinary" and base is not None and mine is None:
            self._read.problem(place, f"the base, {base!r}, is not among the sources")
        if role == "ordinary" or mine is None:
            group = Group(tuple(sources), None, levels, place)
        elif role == "first":
            group = Group((mine, *(source for source in sources if source is not mine)), None, levels, place)
        else:
            if mine.level.values:
                self._read.note(mine.level.place, f"{self._read.called} looks at none of this for the base")
            group = Group(tuple(source for source in sources if source is not mine), mine, levels, place)
        self._count(group)
        return group

    def _count(self, group: Group) -> None:
        low, high = card("merge", self._known.ours).needs.sources
        got = len(group.sources)
        alone = group.base is not None and got == 0 and (low, high) == (1, None) and self._known.base == "required"
        if not alone and (got < low or (high is not None and got > high)):
            besides = " besides the base" if self._takes_base else ""
            self._read.problem(
                group.place, f"{self._read.called} takes {number_of_models(low, high)}{besides}, got {got}"
            )

    # --- one step

    def _whole(self, module: Module) -> dict[str, Any]:
        return self._sliced(module) if module.sliced else self._plain(module.groups[0])

    def _plain(self, group: Group) -> dict[str, Any]:
        """Return the step that merges whole models."""
        if not group.sources:
            self._read.note(group.place, "the base alone: it is copied")
            return {"merge": "passthrough", "models": [source.model for source in group.everyone]}
        weights = [self._weight(source, group) for source in group.sources]
        each = [self._each(source, group) for source in group.sources]
        return {
            **self._named([group]),
            **({"weights": weights} if WEIGHT in self._known.parameters else {}),
            **self._shared(group.levels, group.place),
            **{name: _joined([own[name] for own in each]) for name in each[0]},
            **self._known.fixed,
        }

    def _sliced(self, module: Module) -> dict[str, Any]:
        """Return the step that puts a model together from slices."""
        slices = []
        for group in module.groups:
            sources = [self._slice_source(source, group) for source in group.everyone]
            said = {
                self._known.parameters[name].ours for name in group.levels[0].values if name in self._known.parameters
            }
            shared = self._shared(group.levels, group.place)
            shared = {name: value for name, value in shared.items() if name in said}
            own = {"base": group.base.model} if group.base and group.base.model != self._named_base(module) else {}
            slices.append({"sources": sources, **({"parameters": shared} if shared else {}), **own})
        shared = self._shared(module.groups[0].levels[1:], None)  # what is missing here was told by the slices
        return {**self._named(module.groups, self._named_base(module)), "slices": slices, **shared, **self._known.fixed}

    def _named_base(self, module: Module) -> str | None:
        """Return the base of a step in slices: the file's, or the first that a slice has."""
        bases = [group.base.model for group in module.groups if group.base]
        return self._base if self._base is not None or not bases else bases[0]

    def _slice_source(self, source: Source, group: Group) -> dict[str, Any]:
        found: dict[str, Any] = {"model": source.model, "layers": list(source.layers or ())}
        if source is group.base:
            return found
        if WEIGHT in self._known.parameters:
            found["weight"] = self._weight(source, group)
        parameters = self._each(source, group)
        return {**found, **({"parameters": parameters} if parameters else {})}

    def _named(self, groups: Sequence[Group], base: str | None = None) -> dict[str, Any]:
        """Return method, models and base; a base that is no more than one of the models still gives the config."""
        base = base if base is not None else self._base
        named = dict.fromkeys(source.model for group in groups for source in group.everyone)
        models = [model for model in named if not (self._takes_base and model == base)] or list(named)
        with_base = base is not None and self._known.base != "first"
        return {"merge": self._known.ours, "models": models, **({"base": base} if with_base else {})}

    def _weight(self, source: Source, group: Group) -> Any:
        if WEIGHT not in self._known.parameters:
            return None
        return self._read.value(WEIGHT, (source.level, *group.levels), source.place)

    def _each(self, source: Source, group: Group) -> dict[str, Any]:
        """Return the parameters in which models may differ, for one of them."""
        found = {}
        for name, parameter in self._known.parameters.items():
            if parameter.each and parameter.ours and name != WEIGHT:
                found[parameter.ours] = self._read.value(name, (source.level, *group.levels), source.place)
        if "epsilon" in found:
            self._note_narrow(found["density"], found["epsilon"], source.place)
        return {} if self._known.ours == "passthrough" and is_plain(found, 1) else found

    def _note_narrow(self, density: Any, epsilon: Any, place: Place) -> None:
        if not all(isinstance(value, (int, float)) for value in (density, epsilon)):
            return
        room = min(density, 1 - density)
        if 0 < room < epsilon:
            self._read.note(
                place, f"epsilon {epsilon:g} is more than density {density:g} leaves room for: {room:g} counts"
            )

    def _shared(self, levels: Sequence[Level], place: Place | None) -> dict[str, Any]:
        """Return the parameters that are one for all models; those that nothing needs may be missing."""
        found = {}
        for name, parameter in self._known.parameters.items():
            if parameter.each or not parameter.ours:
                continue
            if place is None and parameter.required and not any(name in level.values for level in levels):
                continue
            found[name] = self._read.value(name, levels, place or ())
        if "nuslerp_flatten" in found:
            return {"unit": self._unit(found["nuslerp_flatten"], found["nuslerp_row_wise"], place or ())}
        return {self._known.parameters[name].ours: value for name, value in found.items()}

    def _unit(self, flat: Any, columns: Any, place: Place) -> Any:
        """Return what nuslerp turns by itself, from two parameters of mergekit: name is not what the second means."""
        if not isinstance(columns, (list, dict)):
            return mapped(flat, lambda value: "tensor" if value else "column" if columns else "row")
        if isinstance(flat, (list, dict)):
            self._read.problem(
                place, "nuslerp_flatten and nuslerp_row_wise differ between tensors, both of them; one can"
            )
        return "tensor" if flat is True else mapped(columns, lambda value: "column" if value else "row")

    # --- a model of several modules

    def _in_parts(self, modules: Sequence[Module], name: str) -> list[tuple[str, dict[str, Any]]]:
        """Return a step for each module that is merged; the other modules are taken over on the way."""
        for module in modules:
            if module.sliced:
                told = "slices make whole models here, so a module of its own cannot be made of them; use `models`"
                self._read.problem(module.place, told)
        if any(module.sliced for module in modules):
            return [(name, {"merge": self._known.ours, "models": []})]
        taken = {module.name: self._taken_over(module.groups[0]) for module in modules}
        first = next((model for model in taken.values() if model), None)
        rest = first or self._base or modules[0].groups[0].everyone[0].model
        self._read.note(("modules",), f"modules not named here are those of {rest}; mergekit leaves them out")
        chain = [module for module in modules if taken[module.name] != rest]
        if not chain:
            return [(name, self._taken(rest))]
        steps, before = [], rest
        for index, module in enumerate(chain):
            step = name if index == len(chain) - 1 else f"{name}-{module.name}"
            model = taken[module.name]
            raw = self._plain(module.groups[0]) if model is None else self._taken(model)
            raw |= {"only": list(MODULES.get(module.name, (f"{module.name}.*",))), "rest": before}
            steps.append((step, raw))
            before = step
        return steps

    def _taken(self, model: str) -> dict[str, Any]:
        donor = {"base": self._base} if self._base not in (None, model) else {}
        return {"merge": "passthrough", "models": [model], **donor}

    def _taken_over(self, group: Group) -> str | None:
        """Return the model that a group amounts to, if it is one as it stands."""
        if len(group.everyone) == 1 and group.base is not None:
            return group.base.model
        if len(group.sources) != 1:
            return None
        [source] = group.sources
        method = self._known.ours
        same = (
            method in ("karcher", "multislerp")
            or (method == "passthrough" and not self._each(source, group))
            or (method == "linear" and is_plain(self._shared(group.levels, group.place), True))
        )
        return source.model if same else None

    # --- what holds for the output

    def _dtype(self) -> str | None:
        """Return the type of the output. The type of the arithmetic, which theirs can choose, is told in a note."""
        found = {}
        for key in ("dtype", "out_dtype"):
            text = getattr(self._document, key)
            if text is None:
                continue
            found[key] = text.removeprefix("torch.")
            if found[key] not in DTYPES:
                hint = did_you_mean(found[key], DTYPES)
                self._read.problem((key,), f"{text!r} is none of {', '.join(DTYPES)}{hint}")
        if found.get("dtype", "float32") != "float32":
            told = "arithmetic is in float32 here, in float64 where weights are stored so; the result is rounded once"
            self._read.note(("dtype",), told)
        for key in ("out_dtype", "dtype"):
            if key in found:
                self._read.origins["dtype"] = (key,)
                return str(found[key])
        return None

    def _last(self, raws: list[tuple[str, dict[str, Any]]]) -> None:
        """Give the last step what concerns tokens."""
        raw = raws[-1][1]
        known = [*raw["models"], *([raw["base"]] if "base" in raw else [])]
        tokenizer = tokenizer_of(self._document, self._models, self._read, known)
        if tokenizer is not None and len(raws) > 1:
            self._read.problem(
                ("modules",), "several modules are merged one after the other, and tokens cannot move then"
            )
        raw |= {} if tokenizer is None else {"tokenizer": tokenizer}
        raw |= {} if self._document.chat_template is None else {"chat_template": self._document.chat_template}

    def _located(self, raw: dict[str, Any]) -> Located:
        """Return where the keys of a step come from."""
        located, origins = self._read.located, self._read.origins
        renamed = {"weights": WEIGHT, "merge": "merge_method", "base": "base_model"}
        lines: dict[Place, int] = {}
        options = {}
        for key in raw:
            place = origins.get(renamed.get(key, key), (renamed.get(key, key),))
            lines[(key,)] = located.line(place) or 1
            options[key] = ".".join(str(part) for part in place)
        return Located(located.name, raw, lines, options)


def _joined(values: list[Any]) -> Any:
    """Return a parameter's values for each of the models as one setting."""
    same = all(value == values[0] for value in values)
    return values[0] if same else {"per_model": values}
