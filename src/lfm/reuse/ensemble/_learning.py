"""What an ensemble learns: from held-out examples, from prompts, or from what its own members write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from lfm.data import Rows
from lfm.errors import RequestError
from lfm.models.encode import IGNORE, Examples, Given, targets
from lfm.models.handle import Model
from lfm.models.samples import sampled_tokens
from lfm.reuse.ensemble._averaging import best_temperature
from lfm.reuse.ensemble._contract import State, TextEnsemble
from lfm.reuse.ensemble._cost import CostCurve
from lfm.reuse.ensemble._joined import TEMPERATURE, TEMPERATURES, Joined

BATCH = 64
WRITTEN = 8192  # tokens that members write, all together, for an ensemble to be calibrated by


@dataclass(frozen=True)
class Learned:
    """What is worth telling of what was learned; the rest is in the state of the ensemble."""

    metrics: dict[str, float] = field(default_factory=dict)
    curve: CostCurve | None = None


def from_data(backend: Joined, examples: Examples, calibrate: str) -> Learned:
    """Fill the ensemble's state from held-out examples."""
    method, state = backend.method, backend.state
    task = backend.members[0].task
    if calibrate != "no" and task == "masked-lm":
        raise RequestError("`calibrate` is for classifiers and models that write, and these are masked-lm models")
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
    return Learned(metrics, method.curve(held, held.targets))


def _told(state: State, members: Sequence[Model]) -> Iterator[tuple[str, float]]:
    """Yield what was learned and can be said in numbers."""
    if "weights" in state:
        yield from ((f"weight of {m.label}", float(w)) for m, w in zip(members, state["weights"], strict=True))
    yield from ((name, float(state[name])) for name in ("threshold", "penalty") if name in state)


def from_prompts(method: TextEnsemble, members: Sequence[Model], rows: Rows) -> Learned:
    """Return what it costs to answer prompts."""
    return Learned(curve=method.curve(members, prompts_of(rows)))


def prompts_of(rows: Rows) -> list[str]:
    """Return the prompts of rows, or their texts where they have none. Raises RequestError where they have neither."""
    column = next((name for name in ("prompt", "text") if name in rows.columns), None)
    if column is None:
        raise RequestError(
            f"{rows.origin}: takes the column prompt, or text; these rows have {', '.join(rows.columns)}. "
            "Name it with `columns: {prompt: theirs}`"
        )
    return [str(text) for text in rows.columns[column]]


# --- text of one's own ----------------------------------------------------------------------------------------------


def from_own_text(backend: Joined, length: int, seed: int) -> Learned:
    """Fit the temperature of an ensemble of language models to what its members write, each as much as it weighs.

    It is the right one for text that the members themselves could have written, and learns nothing of any other.
    """
    held = _Held(backend, Given(_own_texts(backend, length, seed)))
    scores = backend.method.combine(held, backend.weights, backend.state)
    temperature = best_temperature(scores, held.targets)
    backend.state[TEMPERATURE] = torch.tensor([temperature], dtype=torch.float64)
    after = (scores / temperature).log_softmax(-1)
    before, now = (float(functional.nll_loss(said, held.targets)) for said in (scores, after))
    told = {"tokens of own text": float(len(held.targets)), "NLL of own text": before}
    return Learned({"temperature": temperature, **told, "NLL of own text, calibrated": now})


def _own_texts(backend: Joined, length: int, seed: int) -> list[torch.Tensor]:
    """Return what members write out of nothing, in tokens. Raises RequestError where they do not write."""
    first = backend.members[0]
    if first.task != "causal-lm":
        raise RequestError(f"{first.label}: a {first.task} model writes nothing to calibrate by; give `data`")
    texts = []
    for index, (member, weight) in enumerate(zip(backend.members, backend.weights, strict=True)):
        room = min(length, member.wording.context or length)
        count = math.ceil(WRITTEN / room * weight / sum(backend.weights))
        texts += sampled_tokens(member, count, room, seed=seed + index)
    return texts


# --- examples -------------------------------------------------------------------------------------------------------


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
