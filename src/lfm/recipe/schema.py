"""Recipes: what they may say, checked in one go and without importing torch.

    lfm: 1
    seed: 0
    models: {base: org/small, chat: org/small-chat}
    steps:
      code:   {tune: full, model: base, data: train.jsonl}
      merged: {merge: ties, base: base, models: [code, chat], density: 0.3}
    evaluate: {perplexity: test.txt, compare: [base, merged]}
    out: runs/demo

A step names one verb and one of its methods; its other keys are the verb's inputs and the method's parameters, and
`controls`: what to run beside it to be compared with. Paths are relative to the working directory.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lfm.errors import RequestError, did_you_mean
from lfm.evaluate.spec import Evaluate
from lfm.method import Card, Data, Inputs, Method, Verb, cards, methods_of, verbs
from lfm.models.ref import ModelRef
from lfm.recipe._yaml import Located, read_yaml
from lfm.recipe.foreign import SUFFIXES, ForeignStep, is_foreign, read_foreign, reader

VERSION = 1
RESERVED = ("report.html", "results.json")  # what a run leaves beside the folders of its steps
CONTROLS = "controls"  # of a step: what to run beside it, to be compared with
_CONTROLS_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "object"}],
    "description": "The same step by these methods, or with these changes, to be compared with.",
}
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Step:
    """One step of a recipe: a method, its inputs and its parameters, all of them valid as far as types go."""

    name: str
    card: Card
    inputs: Inputs
    parameters: Mapping[str, Any]
    notes: tuple[str, ...] = ()  # what reading it had to say
    control_of: str | None = None  # the step that this one is there to be compared with

    @cached_property
    def method(self) -> Method:
        """The method itself; imports its module. Raises RequestError where parameters do not go together."""
        try:
            return self.card.load()(**self.parameters)
        except ValidationError as error:  # what the fields alone could not tell, such as two that do not go together
            told = [str(item["msg"]).removeprefix("Value error, ") for item in error.errors(include_url=False)]
            raise RequestError(*(f"{self.card.verb.name} {self.card.name}: {line}" for line in told)) from None

    def models(self) -> Iterator[ModelRef]:
        """Yield every model that the step takes."""
        for _, ref in self.roles():
            yield ref

    def roles(self) -> Iterator[tuple[str, ModelRef]]:
        """Yield (input, model) for every model that the step takes."""
        for role in type(self.inputs).model_fields:
            value = getattr(self.inputs, role)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, ModelRef):
                    yield role, item

    def as_dict(self) -> dict[str, Any]:
        """Return the step as a recipe writes it, defaults left out."""
        inputs = self.inputs.model_dump(mode="json", exclude_defaults=True)
        varied = inputs.pop("vary", {})
        shortened = {role: _shorten(value) for role, value in inputs.items()}
        return {self.card.verb.name: self.card.name, **shortened, **dict(self.parameters), **varied}


def _shorten(value: Any) -> Any:
    if isinstance(value, list):
        return [_shorten(item) for item in value]
    if isinstance(value, dict) and set(value) in ({"ref"}, {"path"}):
        return next(iter(value.values()))
    return value


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    steps: Mapping[str, Step]
    models: Mapping[str, ModelRef]
    out: Path | None
    seed: int = 0
    evaluate: Evaluate | None = None
    text: str = ""
    single: bool = False  # one step that writes `out` itself, as the one-step verbs do


class _Frame(BaseModel):
    """The recipe without its steps."""

    model_config = ConfigDict(extra="forbid")

    lfm: int = Field(description=f"Version of the recipe language: {VERSION}.", ge=VERSION, le=VERSION)
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random.")
    models: dict[str, ModelRef] = Field({}, description="Models by name.")
    steps: dict[str, dict[str, Any]] = Field({}, description="What to do, by the name of what comes out.")
    evaluate: Evaluate | None = Field(None, description="What to measure at the end, of which models.")
    out: str | None = Field(None, description="Folder of the run; -o takes precedence.")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises RequestError with every problem in it, each with file and line."""
    located = read_yaml(path)
    return check_recipe(located, path.read_text(encoding="utf-8"))


def check_recipe(located: Located, text: str = "") -> Recipe:
    """Turn what a recipe file holds into a Recipe, or raise RequestError with everything that is wrong."""
    if not isinstance(located.value, dict):
        raise RequestError(f"{located.name}: a recipe is a mapping with the keys lfm, models, steps; this is not one")
    problems: list[str] = []
    frame = validate(_Frame, located.value, located, (), problems)
    raw_steps = located.value.get("steps")
    raw_steps = raw_steps if isinstance(raw_steps, dict) else {}
    steps: dict[str, Step] = {}
    for name, raw in raw_steps.items():
        if isinstance(raw, dict):
            for step in check_steps(name, raw, located, ("steps", name), problems):
                if step.name in steps or (step.name != name and step.name in raw_steps):
                    problems.append(f"{located.where(('steps', name))}: makes {step.name!r}, as another step does")
                steps[step.name] = step
    if frame is not None:
        problems += [f"{located.where(place)}: {text}" for place, text in _name_problems(frame, steps)]
    if not problems:
        problems += [f"{located.where(('steps', name))}: {text}" for name, text in _cycles(steps)]
    if problems or frame is None:
        raise RequestError(*problems)
    frame = _compared(frame, steps)
    out = Path(frame.out) if frame.out else None
    return Recipe(steps, frame.models, out, frame.seed, frame.evaluate, text)


def _compared(frame: _Frame, steps: Mapping[str, Step]) -> _Frame:
    """Let the controls of a step be measured where the step is."""
    if frame.evaluate is None or frame.evaluate.compare is None:
        return frame
    wanted = [
        name
        for one in frame.evaluate.compare
        for name in (one, *(step.name for step in steps.values() if step.control_of == one))
    ]
    return frame.model_copy(
        update={"evaluate": frame.evaluate.model_copy(update={"compare": list(dict.fromkeys(wanted))})}
    )


def check_steps(name: str, raw: Mapping[str, Any], located: Located, place: Place, problems: list[str]) -> list[Step]:
    """Check one step, or those that a configuration of another program stands for: see `lfm.recipe.foreign`."""
    verb = next((verbs()[key] for key in raw if key in verbs()), None)
    if verb is None or not is_foreign(verb, raw[verb.name]):
        plain = {key: value for key, value in raw.items() if key != CONTROLS}
        step = check_step(name, plain, located, place, problems)
        if step is None or CONTROLS not in raw:
            return [] if step is None else [step]
        return [step, *_controls(step, plain, raw[CONTROLS], located, (*place, CONTROLS), problems)]
    for key in raw:
        if key != verb.name:
            problems.append(f"{located.where((*place, key))}: unknown key; {raw[verb.name]} says all there is to say")
    try:
        return check_foreign(read_foreign(verb, raw[verb.name], name), problems)
    except RequestError as error:
        problems += error.problems
        return []


def _controls(
    step: Step, raw: Mapping[str, Any], asked: Any, located: Located, place: Place, problems: list[str]
) -> list[Step]:
    """Return the steps that a step is to be compared with: the same, by other methods or with other inputs.

    `[noise]` names methods; `{real: {distill: response, data: train.npz}}` says what is different.
    """
    asked = dict.fromkeys(asked) if isinstance(asked, list) and all(isinstance(one, str) for one in asked) else asked
    if not isinstance(asked, dict):
        problems.append(f"{located.where(place)}: controls are a list of methods, or a mapping from names to changes")
        return []
    verb, found = step.card.verb, []
    for label, changes in asked.items():
        changes = changes or {}
        if not isinstance(changes, dict):
            problems.append(f"{located.where((*place, label))}: a control is a mapping of what is different")
            continue
        method = changes.get(verb.name, label)
        known = methods_of(verb.name).get(method if isinstance(method, str) else "")
        kept = {key: value for key, value in raw.items() if known is None or _has_place_for(key, known)}
        control = check_step(
            f"{step.name}-{label}", {**kept, verb.name: method, **changes}, located, (*place, label), problems
        )
        found += [] if control is None else [replace(control, control_of=step.name)]
    return found


def _has_place_for(key: str, card: Card) -> bool:
    """Whether a method can take over what is said for another one under that key."""
    if key in ("data", "validation") and card.needs.data is Data.NONE:
        return False
    return key in card.verb.inputs.model_fields or key in card.parameters.model_fields


def check_foreign(found: Sequence[ForeignStep], problems: list[str]) -> list[Step]:
    """Check steps that were read from a configuration of another program."""
    steps = [(check_step(item.name, item.raw, item.located, (), problems), item.notes) for item in found]
    return [replace(step, notes=notes) for step, notes in steps if step is not None]


def check_step(name: str, raw: Mapping[str, Any], located: Located, place: Place, problems: list[str]) -> Step | None:
    """Check one step; adds to `problems` and returns None where it cannot be understood."""
    named = [key for key in raw if key in verbs()]
    if len(named) != 1:
        known = ", ".join(verbs())
        hints = "".join(did_you_mean(key, verbs()) for key in raw if key not in verbs()) if not named else ""
        problems.append(
            f"{located.where(place)}: a step has one of the keys {known}; got {' and '.join(named) or 'none'}{hints}"
        )
        return None
    verb, method = verbs()[named[0]], raw[named[0]]
    known_methods = methods_of(verb.name)
    if not isinstance(method, str) or method not in known_methods:
        problems.append(
            f"{located.where((*place, verb.name))}: unknown method {method!r}"
            f"{did_you_mean(str(method), known_methods)} (`lfm methods` lists them)"
        )
        return None
    card = known_methods[method]
    inputs_keys, parameter_keys = set(verb.inputs.model_fields), set(card.parameters.model_fields)
    before = len(problems)
    for key in raw:
        if key not in inputs_keys | parameter_keys | {verb.name}:
            hint = did_you_mean(key, sorted(inputs_keys | parameter_keys))
            problems.append(f"{located.where((*place, key))}: unknown key{hint}")
    given = {key: value for key, value in raw.items() if key in parameter_keys}
    varied = _varied(verb, card, given, located, place, problems)
    given = {key: value for key, value in given.items() if key not in varied}
    raw_inputs = {key: value for key, value in raw.items() if key in inputs_keys}
    if varied:
        raw_inputs["vary"] = {**raw_inputs.get("vary", {}), **varied}
    inputs = validate(verb.inputs, raw_inputs, located, place, problems)
    parameters = validate(card.parameters, given, located, place, problems)
    if inputs is None or parameters is None or len(problems) > before:
        return None
    return Step(name, card, inputs, parameters.model_dump(exclude_unset=True))


def _varied(
    verb: Verb, card: Card, given: Mapping[str, Any], located: Located, place: Place, problems: list[str]
) -> dict[str, Any]:
    """Return the parameters that are given by layer, tensor or model, where the verb's inputs have a place for them."""
    if "vary" not in verb.inputs.model_fields:
        return {}
    fields = card.parameters.model_fields
    plain = {name for name, info in fields.items() if get_origin(info.annotation) not in (list, tuple, dict)}
    varied = {name: value for name, value in given.items() if name in plain and isinstance(value, (list, dict))}
    for name, value in varied.items():
        for leaf in _leaves(value):
            told: list[str] = []
            validate(card.parameters, {name: leaf}, located, place, told)
            start = f"{located.where((*place, name))}: "
            problems += [line for line in told if line.startswith(start) and line not in problems]
    return varied


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what lists and mappings hold in the end."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from _leaves(part)


def validate(model: type[BaseModel], value: Any, located: Located, place: Place, problems: list[str]) -> Any:
    """Return `value` as a `model`, or None, with a line for each thing that is wrong added to `problems`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            problems.append(f"{located.where((*place, *_place(item['loc'], value)))}: {_message(item, model)}")
        return None


def _place(loc: Place, value: Any) -> Place:
    """Keep the part of pydantic's location that exists in the file; it also names alternatives of unions."""
    place: list[str | int] = []
    for part in loc:
        if isinstance(value, dict) and isinstance(part, str):
            place.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            place.append(part)
            value = value[part]
    return tuple(place)


def _message(item: Any, model: type[BaseModel]) -> str:
    kind, got = item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(item['loc'][-1]), _keys_at(model, item['loc'][:-1]))}"
    if kind == "missing":
        field = model.model_fields.get(str(item["loc"][0])) if len(item["loc"]) == 1 else None
        what = (field.description or "").rstrip(".") if field is not None else ""
        return f"is missing: {what[:1].lower()}{what[1:]}" if what else "is missing"
    text = str(item["msg"]).removeprefix("Value error, ")
    return text if isinstance(got, (dict, list)) or kind == "value_error" else f"{text} (got {got!r})"


def _keys_at(model: Any, loc: Place) -> list[str]:
    """Return the keys that the mapping at `loc` of a model may have."""
    for part in loc:
        kinds = model if isinstance(model, tuple) else (model,)
        fields = [kind.model_fields for kind in kinds if hasattr(kind, "model_fields")]
        found = [_models_in(known[str(part)].annotation) for known in fields if part in known]
        model = tuple(kind for kinds in found for kind in kinds) if found else model
    kinds = model if isinstance(model, tuple) else (model,)
    return sorted({key for kind in kinds for key in getattr(kind, "model_fields", ())})


def _models_in(annotation: Any) -> list[Any]:
    """Return the models that an annotation names, inside lists, mappings and alternatives too."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _name_problems(frame: _Frame, steps: Mapping[str, Step]) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong with names: used twice, unsafe as folders, or near misses of names that exist."""
    names = list(dict.fromkeys([*frame.models, *frame.steps, *steps]))
    yield from _step_names(frame.models, dict.fromkeys([*frame.steps, *steps]))
    for name, model in frame.models.items():
        if model.ref in names and not _is_there(str(model.ref)):
            yield ("models", name), f"{model.ref!r} is a name of this recipe; a model here is a folder or a hub name"
    for name, step in steps.items():
        for role, ref in step.roles():
            if ref.ref == name:
                yield ("steps", name, role), "a step cannot take its own output"
            elif ref.ref and ref.ref not in names and "/" not in ref.ref and not _is_there(ref.ref):
                yield ("steps", name, role), _no_such_name(ref.ref, names)
    if frame.evaluate is not None:
        for index, name in enumerate(frame.evaluate.compare or ()):
            if name not in names:
                yield ("evaluate", "compare", index), _no_such_name(name, names)
        if frame.evaluate.baseline is not None and frame.evaluate.baseline not in names:
            yield ("evaluate", "baseline"), _no_such_name(frame.evaluate.baseline, names)


def _step_names(models: Iterable[str], steps: Iterable[str]) -> Iterator[tuple[Place, str]]:
    """Yield what keeps the steps from having a name, and a folder, each of their own."""
    folders: dict[str, str] = {}
    for name in steps:
        if name in models:
            yield ("steps", name), f"{name!r} is the name of a model too"
        if not name or Path(name).name != name or name[0] == "." or not name.isprintable() or name in RESERVED:
            yield ("steps", name), f"{name!r} cannot name a folder of the run"
        other = folders.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            yield ("steps", name), f"{name!r} and {other!r} are one folder on some systems; give one another name"


def _is_there(ref: str) -> bool:
    try:
        return Path(ref).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, a user without a home
        return False


def _no_such_name(name: str, names: Sequence[str]) -> str:
    return f"{name!r} is no model or step of this recipe{did_you_mean(name, names)}"


def _cycles(steps: Mapping[str, Step]) -> Iterator[tuple[str, str]]:
    try:
        in_order(steps)
    except RequestError as error:
        yield next(iter(steps)), str(error)


def in_order(steps: Mapping[str, Step]) -> list[Step]:
    """Return the steps so that each comes after those whose output it takes; otherwise in the recipe's order."""
    done: dict[str, Step] = {}
    waiting = dict(steps)
    while waiting:
        ready = [name for name, step in waiting.items() if not any(ref.ref in waiting for ref in step.models())]
        if not ready:
            raise RequestError(f"these steps wait for each other: {', '.join(waiting)}")
        done[ready[0]] = waiting.pop(ready[0])
    return list(done.values())


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, every verb and method included, for editors."""
    frame = _Frame.model_json_schema()
    definitions = frame.setdefault("$defs", {})
    alternatives = []
    for (verb, name), card in cards().items():
        inputs = card.verb.inputs.model_json_schema()
        parameters = card.parameters.model_json_schema()
        if "vary" in card.verb.inputs.model_fields:
            parameters["properties"] = {name: _or_varied(of) for name, of in parameters.get("properties", {}).items()}
        definitions |= inputs.pop("$defs", {}) | parameters.pop("$defs", {})
        alternatives.append(
            {
                "title": f"{verb} {name}",
                "description": card.summary,
                "type": "object",
                "properties": {
                    verb: {"const": name},
                    **inputs["properties"],
                    **parameters.get("properties", {}),
                    CONTROLS: _CONTROLS_SCHEMA,
                },
                "required": [verb, *inputs.get("required", ()), *parameters.get("required", ())],
                "additionalProperties": False,
            }
        )
    alternatives += [_foreign_schema(verb.name) for verb in verbs().values() if reader(verb) is not None]
    frame["properties"]["steps"]["additionalProperties"] = {"oneOf": alternatives}
    for definition, short in (("ModelRef", "ref"), ("DataSpec", "path")):
        if definition in definitions:
            full = definitions[definition]
            definitions[definition] = {"anyOf": [{"type": "string", "description": f"Short for {short}."}, full]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lfm recipe", **frame}


def _foreign_schema(verb: str) -> dict[str, Any]:
    file = {"type": "string", "pattern": f"({'|'.join(SUFFIXES)})$".replace(".", r"\.")}
    return {"title": f"{verb}, from a file", "type": "object", "properties": {verb: file}} | {
        "required": [verb],
        "additionalProperties": False,
    }


def _or_varied(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter that may be given by layer (a list), by tensor or by model (a mapping)."""
    about = {str(key): schema[key] for key in ("description", "default", "title") if key in schema}
    alone = {key: value for key, value in schema.items() if key not in about}
    return {**about, "anyOf": [alone, {"type": "array"}, {"type": "object"}]}


def dump(value: Any) -> str:
    """Return canonical JSON, the form in which things are hashed."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def pretty(value: Any) -> str:
    """Return JSON for people; it has no word for numbers that are not finite, and they become null."""
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return pretty(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))
