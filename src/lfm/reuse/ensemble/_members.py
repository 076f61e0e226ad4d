"""Members of an ensemble side by side: one batch for all of them, and one order of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lfm.data import Rows
from lfm.errors import RequestError
from lfm.models.encode import Batch, Encoder, Examples
from lfm.models.handle import Model
from lfm.models.ref import ImageSpec, Task
from lfm.reuse.ensemble._likeness import looks

MEMBERS = "members"  # of a batch: the batch of each member


@dataclass(frozen=True)
class JointEncoder(Encoder):
    """Encodes rows for every member, in the way of each; labels are classes of the ensemble."""

    encoders: tuple[Encoder, ...] = ()

    def encode(self, rows: Rows, length: int, *, packed: bool = False, labelled: bool = True) -> Examples:
        """Return examples for all members."""
        parts = [encoder.encode(rows, length, packed=packed, labelled=False) for encoder in self.encoders]
        return JointExamples(parts, self.labels(rows, labelled))


class JointExamples(Examples):
    """The same examples as each member reads them."""

    def __init__(self, parts: Sequence[Examples], labels: torch.Tensor) -> None:
        self._parts = parts
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        return {MEMBERS: [part.batch(indices) for part in self._parts], "labels": self._labels[list(indices)]}


def joined_classes(members: Sequence[Model], *, one_set: bool) -> tuple[dict[str, int] | None, list[torch.Tensor]]:
    """Return the classes of all members, and for each member the place of each of its classes among them.

    Members that name no classes have to be alone with that, and agree on their number and order. Raises RequestError.
    """
    named = [member.encoder.classes for member in members]
    if not any(named):
        return None, []
    if not all(named):
        nameless = ", ".join(member.label for member, classes in zip(members, named, strict=True) if not classes)
        raise RequestError(f"{nameless}: does not name its classes, which other members do")
    union: dict[str, int] = {}
    for classes in named:
        for name in sorted(classes or {}, key=lambda name: (classes or {})[name]):
            union.setdefault(name, len(union))
    if one_set:
        problems = [
            f"{member.label}: does not know {_some(missing)}, which others do; `max_model` joins models of "
            "different classes"
            for member, classes in zip(members, named, strict=True)
            if (missing := [name for name in union if name not in (classes or {})])
        ]
        if problems:
            raise RequestError(*problems)
    return union, [_places(classes or {}, union) for classes in named]


def _places(classes: Mapping[str, int], union: Mapping[str, int]) -> torch.Tensor:
    by_index = sorted(classes, key=lambda name: classes[name])
    return torch.tensor([union[name] for name in by_index])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" ... ({len(names)})" if len(names) > 5 else "")


def joint_encoder(members: Sequence[Model], classes: Mapping[str, int] | None) -> Encoder:
    """Return what reads rows for all members; for language models of one tokenizer that of the first."""
    first = members[0].encoder
    if members[0].task in ("causal-lm", "masked-lm"):
        return first
    context = min((e.context for e in (m.encoder for m in members) if e.context is not None), default=None)
    task: Task = members[0].task
    image: ImageSpec | None = first.image
    encoders = tuple(member.encoder for member in members)
    return JointEncoder(task, None, image, classes, context, first.pad, encoders)


@dataclass
class Answers:
    """What members say about one batch: see `Members` in `_contract`. `calls` counts the examples each was asked."""

    members: Sequence[Model]
    places: Sequence[torch.Tensor]
    classes: int
    batch: Batch
    temperatures: Sequence[float] | None = None
    calls: list[int] | None = None

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def knows(self) -> torch.Tensor:
        found = torch.zeros(len(self), self.classes, dtype=torch.bool)
        for index, places in enumerate(self.places):
            found[index, places] = True
        return found if self.places else ~found

    def log_probs(self, index: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        said = self.members[index].log_probs(self._of(index, rows)).cpu()
        if self.temperatures is not None:
            said = (said / self.temperatures[index]).log_softmax(-1)
        if not self.places:
            return said
        found = torch.full((len(said), self.classes), -torch.inf)
        if said.shape[-1] != len(self.places[index]):
            raise RequestError(
                f"{self.members[index].label}: names {len(self.places[index])} classes and speaks of {said.shape[-1]}"
            )
        found[:, self.places[index]] = said
        return found

    def labels(self, index: int) -> torch.Tensor:
        said = self.members[index].labels(self._of(index, None)).cpu()
        return self.places[index][said] if self.places else said

    def looks(self) -> torch.Tensor:
        batch = self.batch
        while MEMBERS in batch:  # as the first member reads it, of that the first one
            batch = batch[MEMBERS][0]
        return looks(batch)

    def _of(self, index: int, rows: torch.Tensor | None) -> Batch:
        batch: Batch = self.batch[MEMBERS][index] if MEMBERS in self.batch else self.batch
        if rows is not None:
            batch = {name: _chosen(value, rows) for name, value in batch.items()}
        if self.calls is not None:
            self.calls[index] += len(next(iter(batch.values())))
        return batch


def _chosen(values: Any, rows: torch.Tensor) -> Any:
    if isinstance(values, torch.Tensor):
        return values[rows]
    if values and isinstance(values[0], dict):  # the members of a member that is an ensemble itself
        return [{name: _chosen(part, rows) for name, part in batch.items()} for batch in values]
    return [values[row] for row in rows.tolist()]
