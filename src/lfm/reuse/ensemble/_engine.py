"""Joins models into one handle, learns how from held-out examples, and writes down what it is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_state
from safetensors.torch import save as save_state

from lfm.checkpoint import STATE, OutputFolder, manifest_digest, open_checkpoint
from lfm.errors import RequestError, plural
from lfm.method import Access, Method, methods_of, number_of_models
from lfm.models.encode import IGNORE, Batch, Examples, targets
from lfm.models.handle import Backend, Model, Tell
from lfm.models.open import Around, made_of_others, open_in
from lfm.models.ref import ModelRef
from lfm.models.text import Completion, Prompt, Sampling
from lfm.models.writing import write_with
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.reuse.ensemble._averaging import best_temperature
from lfm.reuse.ensemble._contract import Ensemble, Inputs, State, TextEnsemble, TunedEnsemble
from lfm.reuse.ensemble._members import MEMBERS, Answers, joined_classes, joint_encoder
from lfm.reuse.ensemble._stepping import AveragedStepper, Of

FORMAT = 1
BATCH = 64
Joining = Ensemble | TextEnsemble | TunedEnsemble
TEMPERATURES, TEMPERATURE = "temperatures", "temperature"  # learned by the engine; the rest is the method's


# --- planning -------------------------------------------------------------------------------------------------------


def plan(method: Joining, inputs: Inputs, context: Context) -> StepPlan:
    """Return what an ensemble is made of, and everything that speaks against it."""
    problems = _request_problems(method, inputs)
    try:
        outlines = context.outlines(_all_models(inputs))
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    if inputs.data is not None:
        try:
            context.rows(inputs.data)
        except RequestError as error:
            problems += [f"data: {problem}" for problem in error.problems]
    if inputs.copy_members:
        problems += _copy_problems([context.resolve(ref) for ref in _all_models(inputs)])
    nbytes = sum(outline.nbytes for outline in outlines)
    output = Outline(context.resolve(inputs.models[0]), {}, outlines[0].config, access=Access.PROBS)
    writes = nbytes if inputs.copy_members else 0
    return StepPlan(output, nbytes, writes, 2 * nbytes, problems=tuple(problems))


def _all_models(inputs: Inputs) -> list[ModelRef]:
    """Return the base, where there is one, and the members: the order that a manifest keeps."""
    return [*filter(None, [inputs.base]), *inputs.models]


def _copy_problems(refs: Sequence[ModelRef]) -> Iterator[str]:
    """Yield what keeps a folder from holding all that its members need."""
    for ref in refs:
        folder = made_of_others(ref)
        if ref.is_endpoint:
            yield f"{ref.label}: an endpoint cannot be copied; leave out copy_members"
        elif ref.ref and "+" in ref.ref and not Path(ref.ref).expanduser().exists():
            yield f"{ref.label}: cannot be copied in two parts; merge the adapter in first (lfm merge passthrough)"
        elif ref.module is not None and ".py:" in ref.module:
            yield f"{ref.label}: its code, {ref.module}, is not copied; put it into a package"
        elif folder is not None and not (folder / MEMBERS).is_dir():
            yield f"{ref.label}: its own members lie elsewhere; make it with copy_members, too"


def _request_problems(method: Joining, inputs: Inputs) -> list[str]:
    name, (low, high), got = type(method).__name__, method.needs.sources, len(inputs.models)
    problems = []
    if got < low or (high is not None and got > high):
        problems.append(f"{name} takes {number_of_models(low, high)}, got {got}")
    weights = inputs.weights
    if weights is not None and not method.weighted:
        problems.append(f"{name} takes no weights")
    elif weights is not None and len(weights) != got:
        problems.append(f"{plural(got, 'model')} and {plural(len(weights), 'weight')}: give one weight for each model")
    elif weights is not None and not (min(weights) >= 0 and sum(weights) > 0):
        problems.append(f"weights must be 0 or more, and one of them above 0, got {weights}")
    if inputs.base is None and method.needs.base:
        problems.append(f"{name} needs a base (--base), the model that the members were tuned from")
    if inputs.base is not None and not method.needs.base:
        problems.append(f"{name} does not use a base")
    if isinstance(method, TunedEnsemble) and (inputs.data is not None or inputs.calibrate != "no"):
        return [*problems, f"{name} learns nothing here, and takes neither `data` nor `calibrate`"]
    wants = (isinstance(method, Ensemble) and method.learns) or inputs.calibrate != "no"
    if wants and inputs.data is None:
        problems.append(f"{name} learns from examples here; give `data` that no member was trained on")
    if inputs.calibrate != "no" and isinstance(method, TextEnsemble):
        problems.append(f"{name} writes text, and has nothing that `calibrate` could be about")
    return problems


# --- making one -----------------------------------------------------------------------------------------------------


def run(method: Joining, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Write an ensemble into `folder`."""
    refs = [context.resolve(ref) for ref in _all_models(inputs)]
    members = [open_in(context, ref, access=_asked(method, ref)) for ref in refs]
    even = 1 / len(inputs.models) if isinstance(method, TunedEnsemble) else 1.0  # these are not made to sum to 1
    weights = tuple(inputs.weights or [even] * len(inputs.models))
    state: State = {}
    metrics: dict[str, float] = {}
    backend = _joined(method, members, weights, state)
    if isinstance(backend, Joined) and inputs.data is not None:
        examples = backend.encoder.encode(context.rows(inputs.data), inputs.length)
        metrics = _learn(backend, examples, inputs.calibrate)
    manifest: dict[str, Any] = {
        "lfm": FORMAT,
        "verb": "ensemble",
        "method": _name_of(method),
        "parameters": method.model_dump(mode="json"),
        "weights": list(weights),
        "members": [_entry(ref, index, inputs, folder) for index, ref in enumerate(refs)],
    }
    raw = save_state({name: value.contiguous() for name, value in state.items()}) if state else b""
    if raw:
        (folder.partial / STATE).write_bytes(raw)
    folder.write_json("lfm.json", manifest)
    return StepResult(manifest_digest(manifest, raw), metrics=metrics)


def _asked(method: Method, ref: ModelRef) -> Access:
    """Return how much of a member is used: what the method needs, more for what is written token by token."""
    return max(method.needs.access, min(ref.offers, Access.PROBS))


def _name_of(method: Method) -> str:
    return next(name for name, card in methods_of("ensemble").items() if card.module == type(method).__module__)


def _entry(ref: ModelRef, index: int, inputs: Inputs, folder: OutputFolder) -> dict[str, Any]:
    """Return what the manifest says of a member: where it is, as seen from the folder, and what it has to be."""
    told = ref.model_dump(mode="json", exclude_defaults=True)
    if ref.is_endpoint:
        return told
    checkpoint = open_checkpoint(str(ref.ref))
    place = checkpoint.folder
    if inputs.copy_members:
        inside = Path(MEMBERS) / f"{index}-{place.name}"
        one = Path(str(ref.ref)).expanduser()
        wanted = [one] if one.is_file() else [file for file in place.rglob("*") if file.is_file()]
        folder.copy({str(inside / file.relative_to(place)): file for file in wanted})
        told["ref"] = str(inside / one.name if one.is_file() else inside)
    elif "+" not in str(ref.ref) and Path(str(ref.ref)).expanduser().exists():
        here, there = folder.out.absolute(), Path(str(ref.ref)).expanduser().absolute()
        beside = there.is_relative_to(here.parent)
        told["ref"] = os.path.relpath(there, here) if beside else str(there)
    return {**told, "digest": checkpoint.digest}


def _learn(backend: Joined, examples: Examples, calibrate: str) -> dict[str, float]:
    """Fill the ensemble's state from held-out examples; returns what was found."""
    method, state = backend.method, backend.state
    if calibrate != "no" and not backend.members[0].task.endswith("classification"):
        raise RequestError(f"`calibrate` is for classifiers, and these are {backend.members[0].task} models")
    held = _Held(backend, examples)
    metrics: dict[str, float] = {}
    if calibrate == "members":
        found = [best_temperature(held.log_probs(index), held.targets) for index in range(len(held))]
        state[TEMPERATURES] = torch.tensor(found, dtype=torch.float64)
        metrics |= {f"temperature of {m.label}": t for m, t in zip(backend.members, found, strict=True)}
        held = _Held(backend, examples)
    if method.learns:
        state |= method.learn(held, held.targets, backend.weights)
    scores = method.combine(held, backend.weights, state)
    if calibrate == "ensemble":
        state[TEMPERATURE] = torch.tensor([best_temperature(scores, held.targets)], dtype=torch.float64)
        metrics["temperature"] = float(state[TEMPERATURE])
    metrics["held-out accuracy"] = float((scores.argmax(-1) == held.targets).double().mean())
    metrics |= _told(state, backend.members)
    return metrics


def _told(state: State, members: Sequence[Model]) -> Iterator[tuple[str, float]]:
    """Yield what was learned and can be said in numbers."""
    if "weights" in state:
        yield from ((f"weight of {m.label}", float(w)) for m, w in zip(members, state["weights"], strict=True))
    if "threshold" in state:
        yield "threshold", float(state["threshold"])
    for threshold, accuracy, beyond in state.get("curve", torch.zeros(0, 3)).tolist():
        yield f"accuracy at threshold {threshold:g}", accuracy
        yield f"share beyond the first at threshold {threshold:g}", beyond


# --- using one ------------------------------------------------------------------------------------------------------


def load(manifest: Mapping[str, Any], folder: Path, around: Around) -> Model:
    """Return a handle on an ensemble that `run` wrote. Raises RequestError where a member is not what it was."""
    if manifest.get("lfm") != FORMAT or manifest.get("method") not in methods_of("ensemble"):
        raise RequestError(f"{folder / 'lfm.json'}: written by another version of lfm ({manifest.get('method')!r})")
    method = methods_of("ensemble")[manifest["method"]].load()(**manifest["parameters"])
    problems: list[str] = []
    members = [model for entry in manifest["members"] if (model := _member(entry, method, folder, around, problems))]
    if problems:
        raise RequestError(*problems)
    path = folder / STATE
    state: State = load_state(path.read_bytes()) if path.is_file() else {}
    weights = tuple(manifest["weights"])
    if not isinstance(method, Joining):
        raise AssertionError(f"{type(method).__name__} is no ensemble")
    backend = _joined(method, members, weights, state)
    encoder = backend.encoder if isinstance(backend, Joined) else members[0].encoder
    return Model(backend, Access.PROBS, members[0].task, encoder, str(folder))


def _joined(method: Joining, members: Sequence[Model], weights: Sequence[float], state: State) -> Joined | Backend:
    """Return what answers in the name of all members. Raises RequestError where they do not go together."""
    if isinstance(method, TunedEnsemble):
        base, *tuned = members
        return method.backend(base, tuned, weights)
    if isinstance(method, TextEnsemble):
        return method.backend(members, weights)
    return Joined(method, members, weights, state)


def _member(
    entry: Mapping[str, Any], method: Method, folder: Path, around: Around, problems: list[str]
) -> Model | None:
    """Open a member, or say what became of it."""
    told = {key: value for key, value in entry.items() if key != "digest"}
    inside = folder / str(told.get("ref"))
    if inside.exists():
        told["ref"] = str(inside)
    try:
        ref = ModelRef.model_validate(told)
        if "digest" in entry and open_checkpoint(str(ref.ref)).digest != entry["digest"]:
            raise RequestError(f"{ref.label}: is not what it was when {folder} was made; make the ensemble again")
        return open_in(around, ref, access=_asked(method, ref))
    except RequestError as error:
        problems += error.problems
        return None


@dataclass
class Joined:
    """The backend of an ensemble of classifiers, or of language models with one tokenizer."""

    method: Ensemble
    members: Sequence[Model]
    weights: Sequence[float]
    state: State

    def __post_init__(self) -> None:
        tasks = {member.task for member in self.members}
        if len(tasks) > 1:
            told = ", ".join(f"{member.label} ({member.task})" for member in self.members)
            raise RequestError(f"an ensemble takes models for one task, got {told}")
        if not self.members[0].task.endswith("classification"):
            self._check_texts()
        self.classes, self.places = joined_classes(self.members, one_set=self.method.one_set)
        self.encoder = joint_encoder(self.members, self.classes)
        self.calls = [0] * len(self.members)

    def _check_texts(self) -> None:
        if not self.method.writes:
            raise RequestError(f"{type(self.method).__name__} joins classifiers, got {self.members[0].task} models")
        first, *others = (member.encoder.tokenizer for member in self.members)
        for member, tokenizer in zip(self.members[1:], others, strict=True):
            if first is None or tokenizer is None or first.get_vocab() != tokenizer.get_vocab():
                raise RequestError(
                    f"{member.label}: its tokenizer is not that of {self.members[0].label}; "
                    "`byte_average` joins models of different tokenizers"
                )

    @property
    def offers(self) -> Access:
        return Access.PROBS

    def answers(self, batch: Batch) -> Answers:
        """Return what members say about a batch."""
        temperatures = self.state[TEMPERATURES].tolist() if TEMPERATURES in self.state else None
        size = len(self.classes) if self.classes else 0
        return Answers(self.members, self.places, size, batch, temperatures, self.calls)

    def logits(self, batch: Batch) -> torch.Tensor:
        scores = self.method.combine(self.answers(batch), self.weights, self.state)
        if TEMPERATURE in self.state:
            scores = (scores / float(self.state[TEMPERATURE])).log_softmax(-1)
        return scores

    def labels(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch).argmax(-1)

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        if not self.method.writes or self.members[0].task != "causal-lm":
            raise RequestError("this ensemble does not write text")
        of: Of = "logits" if getattr(self.method, "of", "") == "logits" else "probabilities"
        chosen = self.state["weights"].tolist() if "weights" in self.state else list(self.weights)
        stepper = AveragedStepper([member.stepper() for member in self.members], chosen, of)
        return write_with(stepper, self.members[0].wording, prompts, how, tell)


class _Held:
    """What members say of all held-out examples (of texts: of their tokens), asked once: see `Members`."""

    def __init__(self, backend: Joined, examples: Examples) -> None:
        batches = [
            examples.batch(range(start, min(start + BATCH, len(examples)))) for start in range(0, len(examples), BATCH)
        ]
        self._task = backend.members[0].task
        self._labels = [batch["labels"] for batch in batches]
        self._asked = [backend.answers(batch) for batch in batches]
        self._said: dict[int, torch.Tensor] = {}
        self.knows = self._asked[0].knows
        flat = [targets(labels[..., None], labels, self._task)[1] for labels in self._labels]
        self.targets = torch.cat([labels[labels != IGNORE] for labels in flat])

    def __len__(self) -> int:
        return len(self._asked[0])

    def log_probs(self, index: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        if index not in self._said:
            pairs = zip(self._asked, self._labels, strict=True)
            self._said[index] = torch.cat([self._kept(answers.log_probs(index), labels) for answers, labels in pairs])
        return self._said[index] if rows is None else self._said[index][rows]

    def _kept(self, said: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what is said (n, classes) where there is something to predict."""
        flat, wanted = targets(said, labels, self._task)
        return flat[wanted != IGNORE]

    def labels(self, index: int) -> torch.Tensor:
        if index in self._said or not self._task.endswith("classification"):
            return self.log_probs(index).argmax(-1)
        return torch.cat([answers.labels(index) for answers in self._asked])

    def looks(self) -> torch.Tensor:
        return torch.cat([answers.looks() for answers in self._asked])


__all__ = ["load", "plan", "run"]
