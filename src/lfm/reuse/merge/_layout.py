"""Which tensors come out of a merge, and which tensors of which models go into each: decided from headers alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lfm.checkpoint import Spec
from lfm.errors import did_you_mean, plural
from lfm.models.ref import ModelRef
from lfm.recipe.step import Outline
from lfm.reuse.merge._contract import Inputs, Merge, Slice
from lfm.reuse.merge._settings import Place, Resolved, Settings

LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<number>\d+)\.(?P<rest>.+)")
TABLE = re.compile(r"(.*\.)?(\w*embed\w*|wte|wpe|shared|lm_head)(\.\w+)*\.weight|lm_head\.weight")
FIRST = re.compile(r"(^|.*\.)(\w*embed\w*|wte|wpe|shared|conv1|patch\w*)(\.|$)")  # what comes before the layers
STATISTICS = (".running_mean", ".running_var")
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
Kind = Literal["merge", "copy", "average"]


@dataclass(frozen=True)
class Origin:
    """A tensor of a model."""

    model: ModelRef
    name: str
    spec: Spec


@dataclass(frozen=True)
class Target:
    """A tensor of the output, and what it is made of."""

    name: str
    spec: Spec
    kind: Kind
    sources: tuple[Origin, ...]
    base: Origin | None = None
    resolved: Resolved | None = None
    layer: tuple[int, int] | None = None

    @property
    def is_table(self) -> bool:
        """Whether its rows belong to tokens."""
        return len(self.spec.shape) == 2 and TABLE.fullmatch(self.name) is not None

    @property
    def inputs(self) -> tuple[Origin, ...]:
        return (*self.sources, *([self.base] if self.base else []))


@dataclass
class Layout:
    """All tensors of the output, by name."""

    targets: dict[str, Target] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # what changes in the config

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: target.spec for name, target in self.targets.items()}


def lay_out(method: Merge, inputs: Inputs, outlines: Mapping[ModelRef, Outline]) -> Layout:
    """Return what comes out of a merge of models that look like these; `problems` holds all that speaks against it."""
    maker = _Maker(method, inputs, outlines)
    made = maker.sliced() if inputs.slices else maker.whole()
    made.problems += maker.settings.problems
    return made


class _Maker:
    def __init__(self, method: Merge, inputs: Inputs, outlines: Mapping[ModelRef, Outline]) -> None:
        self._method = method
        self._inputs = inputs
        self._outlines = outlines
        self._layout = Layout()
        self._reference = inputs.base or inputs.models[0]
        self._uses_base = inputs.base is not None and (method.needs.base or type(method).takes_base)
        self.settings = Settings(method, inputs)

    # --- whole models

    def whole(self) -> Layout:
        """Every tensor of the reference, merged with its like in the others; what `only` leaves out is copied."""
        reference = self._outlines[self._reference]
        rest = self._inputs.rest or self._reference
        chosen = [name for name in reference.specs if self._chosen(name)]
        if self._inputs.only and not chosen:
            told = ", ".join(sorted({name.split(".")[0] for name in reference.specs})[:8])
            self._layout.problems.append(f"only: no tensor of {self._reference.label} is called so; it has {told} ...")
        matches = {ref: self._match(ref, chosen) for ref in dict.fromkeys(self._inputs.models)}
        stacks = _stacks(reference.specs)
        for name in chosen:
            origins = [self._origin(ref, matches[ref].get(name)) for ref in self._inputs.models]
            base = Origin(self._reference, name, reference.specs[name]) if self._inputs.base else None
            if all(origins):
                self._add(name, [origin for origin in origins if origin], base, _layer_of(name, stacks))
        for name, spec in self._outlines[rest].specs.items():
            if not self._chosen(name) and name not in self._layout.targets:
                self._copy(Origin(rest, name, spec), name)
        return self._sorted()

    def _chosen(self, name: str) -> bool:
        return not self._inputs.only or any(fnmatch.fnmatchcase(name, pattern) for pattern in self._inputs.only)

    def _origin(self, ref: ModelRef, name: str | None) -> Origin | None:
        return None if name is None else Origin(ref, name, self._outlines[ref].specs[name])

    def _match(self, ref: ModelRef, wanted: Sequence[str]) -> dict[str, str]:
        """Return, for the reference's tensors, the names of their like in another model; what has none is a problem."""
        mine, theirs = self._outlines[self._reference], self._outlines[ref]
        one, two = self._reference.label, ref.label
        prefixes = _prefixes(mine.specs, theirs.specs, wanted)
        if prefixes != ("", ""):
            self._layout.notes.append(
                f"{two}: its {prefixes[1] or 'top level'}* is matched with {prefixes[0]}* of {one}"
            )
        found: dict[str, str] = {}
        absent, shapes = [], []
        for name in wanted:
            other = prefixes[1] + name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else name
            other = other if other in theirs.specs else _tied(name, theirs) or other
            if other not in theirs.specs:
                absent.append(f"{two}: tensor {name!r} is missing; {one} has it")
            elif not mine.specs[name].same_as(theirs.specs[other]):
                shapes.append(f"{two}: tensor {other!r} is {theirs.specs[other]}, in {one} it is {mine.specs[name]}")
            else:
                found[name] = other
        used = set(found.values()) | {line.split("'")[1] for line in shapes}
        extra = [
            f"{two}: tensor {name!r} is not in {one}"
            for name in theirs.specs
            if not self._inputs.only and name not in used and not _tied_copy(name, theirs)
        ]
        self._layout.problems += [line for lines in (absent, extra, shapes) for line in first_few(lines)]
        return found

    # --- layers put together from slices

    def sliced(self) -> Layout:
        """The layers that the slices name, numbered anew; what lies before and after them from the first and last."""
        ends = self._inputs.slices[0], self._inputs.slices[-1]
        stack = self._stack()
        if stack is None or not self._slices_fit(stack):
            return self._layout
        depth = sum(_length(part) for part in self._inputs.slices)
        self._config_depth(stack, depth)
        number = 0
        for part in self._inputs.slices:
            for offset in range(_length(part)):
                self._layer(part, stack, offset, number, depth)
                number += 1
        donor = self._ref(ends[0].sources[0].model)
        for name in self._outlines[donor].specs:
            match = LAYER.fullmatch(name)
            if match is None or match["stack"] != stack:
                self._outside(ends[0] if FIRST.search(name) else ends[1], name)
        return self._sorted()

    def _ref(self, label: str) -> ModelRef:
        known = [*self._inputs.models, *([self._inputs.base] if self._inputs.base else [])]
        return next(ref for ref in known if ref.label == label)

    def _stack(self) -> str | None:
        """Return the prefix of the layers' names, such as `model.layers.`."""
        counts = _stacks(self._outlines[self._reference].specs)
        config = self._outlines[self._reference].config or {}
        depths = {config[key] for key in DEPTH_KEYS if isinstance(config.get(key), int)}
        found = [stack for stack, count in counts.items() if not depths or count in depths]
        if len(found) != 1:
            told = ", ".join(f"{stack}* ({count})" for stack, count in counts.items()) or "none"
            self._layout.problems.append(
                f"slices: which layers? A model with one stack of layers is needed, got {told}"
            )
            return None
        return found[0]

    def _slices_fit(self, stack: str) -> bool:
        known = [ref.label for ref in (*self._inputs.models, *([self._inputs.base] if self._inputs.base else []))]
        problems = []
        for index, part in enumerate(self._inputs.slices):
            where = f"slices.{index}"
            lengths = {source.layers[1] - source.layers[0] for source in part.sources}
            if len(lengths) > 1:
                problems.append(f"{where}: sources with different numbers of layers: {sorted(lengths)}")
            for source in part.sources:
                if source.model not in known:
                    hint = did_you_mean(source.model, known)
                    problems.append(f"{where}: {source.model!r} is none of the step's models{hint}")
                    continue
                count = _stacks(self._outlines[self._ref(source.model)].specs).get(stack, 0)
                if not 0 <= source.layers[0] < source.layers[1] <= count:
                    told = f"{source.model} has {plural(count, 'layer')}, of which [{source.layers[0]}, "
                    problems.append(f"{where}: {told}{source.layers[1]}] is no slice")
            if part.base and part.base not in [source.model for source in part.sources]:
                problems.append(f"{where}.base: {part.base!r} is none of the slice's sources")
            low, high = self._method.needs.sources
            got = len(self._sources_of(part))
            if not low <= got <= (high or got):
                problems.append(f"{where}: {type(self._method).__name__} does not take {plural(got, 'source')}")
        self._layout.problems += problems
        return not problems

    def _sources_of(self, part: Slice) -> list[int]:
        """Return which of a slice's sources are merged: all but the base, where the method has one."""
        base = (part.base or self._inputs.base.label) if self._uses_base and self._inputs.base else None
        found = [index for index, source in enumerate(part.sources) if source.model != base]
        return found or list(range(len(part.sources)))  # the base alone, which did not change

    def _layer(self, part: Slice, stack: str, offset: int, number: int, depth: int) -> None:
        first = part.sources[self._sources_of(part)[0]]
        prefix = f"{stack}{first.layers[0] + offset}."
        names = [name for name in self._outlines[self._ref(first.model)].specs if name.startswith(prefix)]
        place = offset / (_length(part) - 1) if _length(part) > 1 else 1.0
        for name in names:
            rest = name.removeprefix(prefix)
            self._slice_target(part, f"{stack}{number}.{rest}", f"{stack}{{}}.{rest}", offset, place, (number, depth))

    def _outside(self, part: Slice, name: str) -> None:
        self._slice_target(part, name, name, 0, 0.0, None)

    def _slice_target(
        self, part: Slice, name: str, pattern: str, offset: int, depth: float, layer: tuple[int, int] | None
    ) -> None:
        """Add a tensor that a slice makes: from the tensors called `pattern`, with their layer's number in it."""
        origins: dict[int, Origin] = {}
        for index, source in enumerate(part.sources):
            ref, there = self._ref(source.model), pattern.format(source.layers[0] + offset)
            there = there if there in self._outlines[ref].specs else _tied(there, self._outlines[ref]) or there
            if there not in self._outlines[ref].specs:
                self._layout.problems.append(f"{ref.label}: tensor {there!r} is missing; the slices ask for it")
                return
            origins[index] = Origin(ref, there, self._outlines[ref].specs[there])
        merged = self._sources_of(part)
        bases = [origin for index, origin in origins.items() if index not in merged]
        base = bases[0] if bases else self._base_of_slice(origins[merged[0]])
        sources = [part.sources[index] for index in merged]
        labels = [ref.label for ref in self._inputs.models]
        given = self._inputs.weights or [1.0] * len(labels)
        weights = [
            source.weight
            if source.weight is not None
            else dict(zip(labels, given, strict=False)).get(source.model, 1.0)
            for source in sources
        ]
        own = [source.parameters for source in sources]
        chosen = [origins[index] for index in merged]
        self._add(name, chosen, base, layer, weights=weights, shared=part.parameters, own=own, depth=depth)

    def _base_of_slice(self, like: Origin) -> Origin | None:
        if not self._inputs.base:
            return None
        specs = self._outlines[self._inputs.base].specs
        return Origin(self._inputs.base, like.name, specs[like.name]) if like.name in specs else None

    def _config_depth(self, stack: str, depth: int) -> None:
        """Say the new number of layers in the config, and cut what the config lists layer by layer."""
        config = self._outlines[self._reference].config or {}
        before = _stacks(self._outlines[self._reference].specs)[stack]
        picked = [part.sources[0].layers[0] + offset for part in self._inputs.slices for offset in range(_length(part))]
        for key, value in config.items():
            if key in DEPTH_KEYS and value == before:
                self._layout.config[key] = depth
            elif isinstance(value, list) and len(value) == before and all(index < before for index in picked):
                self._layout.config[key] = [value[index] for index in picked]

    # --- one tensor

    def _add(
        self,
        name: str,
        sources: Sequence[Origin],
        base: Origin | None,
        layer: tuple[int, int] | None,
        *,
        weights: Sequence[Any] | None = None,
        shared: Mapping[str, Any] | None = None,
        own: Sequence[Mapping[str, Any]] | None = None,
        depth: float | None = None,
    ) -> None:
        like = (base or sources[0]).spec
        uneven = next((origin for origin in sources if not origin.spec.same_as(like)), None)
        if uneven is not None:
            self._layout.problems.append(
                f"{uneven.model.label}: tensor {uneven.name!r} is {uneven.spec}, elsewhere it is {like}"
            )
            return
        if not like.floating:
            self._layout.targets[name] = Target(name, Spec(like.dtype, like.shape), "copy", (*sources,), base)
            return
        if depth is None:
            depth = 0.0 if layer is None else layer[0] / (layer[1] - 1) if layer[1] > 1 else 1.0
        place = Place(name, tuple(origin.name for origin in sources), depth)
        resolved = self.settings.resolve(place, weights=weights, shared=shared, own=own)
        average = name.endswith(STATISTICS) and not type(self._method).interpolates
        self._layout.targets[name] = Target(
            name,
            Spec(DTYPES[self._inputs.dtype] if self._inputs.dtype else like.dtype, like.shape),
            "average" if average else "merge",
            tuple(sources),
            base if self._uses_base else None,
            resolved,
            layer,
        )

    def _copy(self, origin: Origin, name: str) -> None:
        dtype = DTYPES[self._inputs.dtype] if self._inputs.dtype and origin.spec.floating else origin.spec.dtype
        self._layout.targets[name] = Target(name, Spec(dtype, origin.spec.shape), "copy", (origin,))

    def _sorted(self) -> Layout:
        """Put the tensors in the order of their names: bytes do not depend on how the inputs are laid out."""
        averaged = sum(target.kind == "average" for target in self._layout.targets.values())
        if averaged:
            self._layout.notes.append(
                f"{plural(averaged, 'statistic')} of BatchNorm averaged; recompute them on data of the task if you can"
            )
        self._layout.targets = dict(sorted(self._layout.targets.items()))
        return self._layout


def _length(part: Slice) -> int:
    return part.sources[0].layers[1] - part.sources[0].layers[0]


def _stacks(names: Mapping[str, Any]) -> dict[str, int]:
    """Return how many layers each stack of numbered modules has, by the part of the names before the number."""
    counts: dict[str, int] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            counts[match["stack"]] = max(counts.get(match["stack"], 0), int(match["number"]) + 1)
    return counts


def _layer_of(name: str, stacks: Mapping[str, int]) -> tuple[int, int] | None:
    match = LAYER.fullmatch(name)
    return (int(match["number"]), stacks[match["stack"]]) if match else None


def _tied(name: str, outline: Outline) -> str | None:
    """Return the name of the embedding for an output layer that a model does not store because the two are one."""
    if name.endswith(HEADS) and (outline.config or {}).get("tie_word_embeddings", True):
        return next((other for other in outline.specs if other.endswith(EMBEDDINGS)), None)
    return None


def _tied_copy(name: str, outline: Outline) -> bool:
    """Whether a tensor is an output layer that is stored although it is the embedding."""
    return name.endswith(HEADS) and bool((outline.config or {}).get("tie_word_embeddings", False))


def _prefixes(mine: Mapping[str, Spec], theirs: Mapping[str, Spec], wanted: Sequence[str]) -> tuple[str, str]:
    """Return what the names of equal tensors begin with in two models: ("", ""), or where one is a part of the other.

    A language model within a vision-language model has `model.language_model.` where the plain one has `model.`.
    """
    best, score = ("", ""), _fits(mine, theirs, wanted, "", "")
    if score == len(wanted):
        return best
    for one, two in sorted(_candidates(mine, theirs, wanted)):
        found = _fits(mine, theirs, wanted, one, two)
        if found > score:
            best, score = (one, two), found
    return best


def _candidates(mine: Mapping[str, Spec], theirs: Mapping[str, Spec], wanted: Sequence[str]) -> set[tuple[str, str]]:
    """Return pairs of prefixes that make a tensor of each model, one that stands inside a layer, the same."""
    found = set()
    ends: dict[str, set[str]] = {}
    for name in theirs:
        if match := LAYER.fullmatch(name):
            ends.setdefault(f"{match['number']}.{match['rest']}", set()).add(match["stack"])
    for name in wanted:
        match = LAYER.fullmatch(name)
        for stack in ends.get(f"{match['number']}.{match['rest']}", ()) if match else ():
            one, two = str(match["stack"] if match else ""), stack
            while one and two and one.split(".")[-2:] == two.split(".")[-2:]:
                one, two = (".".join([*part.split(".")[:-2], ""]).lstrip(".") for part in (one, two))
            found.add((one, two))
    return found


def _fits(mine: Mapping[str, Spec], theirs: Mapping[str, Spec], wanted: Sequence[str], one: str, two: str) -> int:
    return sum(
        other in theirs and mine[name].same_as(theirs[other])
        for name in wanted
        for other in [two + name.removeprefix(one) if name.startswith(one) else name]
    )


def first_few(lines: Sequence[str], limit: int = 3) -> list[str]:
    """Return the first lines, and how many more there are."""
    return [*lines[:limit], *([f"... and {len(lines) - limit} more like it"] if len(lines) > limit else [])]


def codes(outline: Outline) -> Iterator[str]:
    """Yield a line for each tensor that is neither a plain number nor a counter or flag, and so cannot be merged."""
    for name, spec in outline.specs.items():
        if not spec.floating and spec.dtype.startswith(("F", "C")):
            yield (
                f"{outline.ref.label}: tensor {name!r} is {spec}: codes or complex numbers, which cannot be merged; "
                "convert the checkpoint to float32, bfloat16 or float16 first"
            )
