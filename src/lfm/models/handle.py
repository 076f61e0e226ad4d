"""A model behind its interface: what may be asked of it depends on the access that it offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.ref import Task
from lfm.models.text import Completion, Prompt, Sampling

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lfm.models._wording import Wording
    from lfm.models.encode import Batch, Encoder
    from lfm.models.writing import Stepper


Tell = Callable[[int, str], None]


class Backend(Protocol):
    """What does the work behind a handle: a module in memory, an endpoint, an ensemble of others.

    A backend that offers less than LOGITS returns log-probabilities as its logits, and nothing is done to them; one
    that offers LABELS alone is never asked for them.
    """

    @property
    def offers(self) -> Access: ...

    def logits(self, batch: Batch) -> torch.Tensor: ...

    def labels(self, batch: Batch) -> torch.Tensor: ...

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]: ...


@runtime_checkable
class Inside(Protocol):
    """What a backend has besides, if what it runs can be looked into: hidden features, gradients to the input."""

    def features(self, batch: Batch) -> torch.Tensor: ...

    def input_gradients(self, batch: Batch, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor: ...


@runtime_checkable
class Stepping(Protocol):
    """What a backend has besides, if next tokens can be asked for one by one."""

    def stepper(self) -> Stepper: ...

    @property
    def wording(self) -> Wording: ...


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

    def features(self, batch: Batch) -> torch.Tensor:
        """Return what the output layer reads (batch, width), float32, of tokens the mean; needs LOGITS."""
        self._require(Access.LOGITS, "hidden features")
        return self._inside("hidden features").features(batch)

    def input_gradients(self, batch: Batch, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the gradient of `loss(logits)`, one number, to the input; needs GRADIENTS.

        The input is the pixels (batch, channels, height, width), of texts the embeddings (batch, length, width).
        """
        self._require(Access.GRADIENTS, "gradients to its input")
        return self._inside("gradients to its input").input_gradients(batch, loss)

    def probs(self, batch: Batch) -> torch.Tensor:
        """Return probabilities (batch, [length,] classes), float32; needs PROBS."""
        return self.log_probs(batch).exp()

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """Return logarithms of probabilities (batch, [length,] classes), float32; needs PROBS."""
        self._require(Access.PROBS, "probabilities")
        said = self._logits(batch)
        return said if self.__backend.offers < Access.LOGITS else said.log_softmax(-1)

    def labels(self, batch: Batch) -> torch.Tensor:
        """Return the most probable class of each example (or token), int64; needs LABELS."""
        self._require(Access.LABELS, "labels")
        return self.__backend.labels(batch)

    def write(
        self, prompts: Sequence[Prompt], how: Sampling | None = None, tell: Tell | None = None
    ) -> list[Completion]:
        """Go on from each text, or answer each conversation; needs LABELS, and PROBS for `top_logprobs`.

        `tell(index, piece)` is called for every piece of text as it is written.
        """
        asked = how or Sampling()
        self._require(Access.LABELS, "text")
        if asked.top_logprobs is not None:
            self._require(Access.PROBS, "log-probabilities of tokens")
        return self.__backend.write(prompts, asked, tell)

    def complete(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Return a greedy continuation of each prompt, without the prompt; needs LABELS."""
        return [made.text for made in self.write(prompts, Sampling(max_new_tokens=max_new_tokens))]

    def stepper(self) -> Stepper:
        """Return what gives the log-probabilities of next tokens, one after the other; needs PROBS."""
        self._require(Access.PROBS, "probabilities of next tokens")
        if not isinstance(self.__backend, Stepping):
            raise RequestError(f"{self.label}: gives no probabilities of all next tokens")
        return self.__backend.stepper()

    @property
    def wording(self) -> Wording:
        """How the model reads and writes text; of one that `stepper` works for."""
        if not isinstance(self.__backend, Stepping):
            raise RequestError(f"{self.label}: does not tell how it reads text")
        return self.__backend.wording

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.__backend.logits(batch)

    def _inside(self, what: str) -> Inside:
        if not isinstance(self.__backend, Inside):
            raise AccessError(f"{self.label}: {what} cannot be had: it is not one module in memory")
        return self.__backend

    def _require(self, level: Access, what: str) -> None:
        if self.access < level:
            raise AccessError(
                f"{self.label}: {what} cannot be had: this handle offers {self.access.name.lower()}, "
                f"that takes {level.name.lower()}"
            )

    def __repr__(self) -> str:
        return f"Model({self.label!r}, {self.task}, access={self.access.name.lower()})"
