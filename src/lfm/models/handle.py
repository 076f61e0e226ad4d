"""A model behind its interface: what may be asked of it depends on the access that it offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lfm.errors import AccessError
from lfm.method import Access
from lfm.models.ref import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lfm.models.encode import Batch, Encoder


class Backend(Protocol):
    """What does the work behind a handle: a module in memory, later an endpoint."""

    @property
    def offers(self) -> Access: ...

    def logits(self, batch: Batch) -> torch.Tensor: ...

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]: ...


class Model:
    """A handle on a model. Asking for more than `access` raises AccessError, before anything is computed.

    So a method that runs on a handle of some level is thereby shown to need no more than that.
    """

    __slots__ = ("__access", "__backend", "encoder", "label", "task")

    def __init__(self, backend: Backend, access: Access, task: Task, encoder: Encoder, label: str) -> None:
        if access > backend.offers:
            raise AccessError(
                f"{label}: offers {backend.offers.name.lower()}, cannot be opened as {access.name.lower()}"
            )
        self.__backend = backend
        self.__access = access
        self.task = task
        self.encoder = encoder
        self.label = label

    @property
    def access(self) -> Access:
        """What this handle offers."""
        return self.__access

    def restrict(self, access: Access) -> Model:
        """Return a handle on the same model that offers no more than `access`."""
        return Model(self.__backend, min(access, self.access), self.task, self.encoder, self.label)

    @property
    def module(self) -> nn.Module:
        """The module itself; needs WEIGHTS."""
        self._require(Access.WEIGHTS, "its module")
        module: nn.Module = self.__backend.module  # type: ignore[attr-defined]  # only local backends offer WEIGHTS
        return module

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits (batch, [length,] classes), float32, without gradients; needs LOGITS."""
        self._require(Access.LOGITS, "logits")
        return self._logits(batch)

    def probs(self, batch: Batch) -> torch.Tensor:
        """Return probabilities (batch, [length,] classes), float32; needs PROBS."""
        return self.log_probs(batch).exp()

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """Return logarithms of probabilities (batch, [length,] classes), float32; needs PROBS."""
        self._require(Access.PROBS, "probabilities")
        return self._logits(batch).log_softmax(-1)

    def labels(self, batch: Batch) -> torch.Tensor:
        """Return the most probable class of each example (or token), int64; needs LABELS."""
        self._require(Access.LABELS, "labels")
        return self._logits(batch).argmax(-1)

    def complete(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Return a greedy continuation of each prompt, without the prompt; needs LABELS."""
        self._require(Access.LABELS, "text")
        return self.__backend.complete(prompts, max_new_tokens)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.__backend.logits(batch)

    def _require(self, level: Access, what: str) -> None:
        if self.access < level:
            raise AccessError(
                f"{self.label}: {what} cannot be had: this handle offers {self.access.name.lower()}, "
                f"that takes {level.name.lower()}"
            )

    def __repr__(self) -> str:
        return f"Model({self.label!r}, {self.task}, access={self.access.name.lower()})"
