"""What answers in the name of several classifiers, or of several language models with one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import Batch
from lfm.models.handle import Model, Tell
from lfm.models.text import Completion, Prompt, Sampling
from lfm.models.writing import write_with
from lfm.reuse.ensemble._contract import Ensemble, State
from lfm.reuse.ensemble._members import Answers, joined_classes, joint_encoder
from lfm.reuse.ensemble._stepping import AveragedStepper, Of

TEMPERATURES, TEMPERATURE = "temperatures", "temperature"  # learned by the engine; the rest is the method's


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
        size = len(self.classes) if self.classes else 0
        return Answers(self.members, self.places, size, batch, self._temperatures, self.calls)

    @property
    def _temperatures(self) -> list[float] | None:
        """The temperature of each member, where they were calibrated."""
        found: list[float] | None = self.state[TEMPERATURES].tolist() if TEMPERATURES in self.state else None
        return found

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
        steppers = [member.stepper() for member in self.members]
        one = float(self.state[TEMPERATURE]) if TEMPERATURE in self.state else 1.0
        stepper = AveragedStepper(steppers, chosen, of, self._temperatures, one)
        return write_with(stepper, self.members[0].wording, prompts, how, tell)
