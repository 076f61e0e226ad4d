"""Models behind HTTP endpoints: the OpenAI protocol for text, `/predict` of `lfm serve` for classes.

Every request goes through the ledger (`lfm.models.ledger`): what was answered once is not asked again.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import torch

from lfm.data import Rows
from lfm.errors import BudgetError, LfmError, RequestError
from lfm.method import Access
from lfm.models import _protocol as protocol
from lfm.models._http import Failed, Json, NotThere, OtherName, Wire, key_of, name_of
from lfm.models.encode import Batch, Encoder, Examples
from lfm.models.handle import Model, Tell
from lfm.models.ledger import Budget, Claim, Question, Refused, Sent, open_ledger
from lfm.models.ref import EndpointSpec, ImageSpec, ModelRef, Task
from lfm.models.text import Completion, Message, Prompt, Sampling


def check_endpoint(ref: ModelRef, max_cost: float | None = None) -> None:
    """Raise RequestError for what can be known to be wrong before anything is sent: a missing key or price."""
    key_of(ref)
    spec = ref.endpoint or EndpointSpec()
    if max_cost is not None and spec.price_in is None and spec.price_out is None:
        raise RequestError(
            f"{ref.label}: what it may cost is limited, and its prices are not known; give it "
            "`endpoint: {price_in: ..., price_out: ...}`, per million tokens"
        )


def open_endpoint(ref: ModelRef, access: Access, task: Task | None, budget: Budget) -> Model:
    """Return a handle on a model behind an endpoint, which offers labels, or probabilities where `ref` says so.

    An endpoint of `lfm serve` says what its model is for; others are taken for language models. Raises RequestError
    where a key is missing or the endpoint refuses it, LfmError where it does not answer.
    """
    check_endpoint(ref, budget.max_cost)
    backend = EndpointBackend(ref, budget)
    about = backend.about() if task is None or task.endswith("classification") else {}
    told = about.get("task")
    found: Task = task or (told if told in get_args(Task) else "causal-lm")  # type: ignore[assignment]  # it is one
    classes = protocol.classes_of(about.get("classes"))
    if found.endswith("classification"):
        if classes is None:
            raise RequestError(f"{ref.label}: does not say which classes it tells apart, as `lfm serve` does")
        backend.classes = classes
    encoder = RawEncoder(found, classes, image=protocol.image_of(about.get("image")))
    return Model(backend, access, found, cast(Encoder, encoder), ref.label)


@dataclass(frozen=True)
class RawEncoder:
    """Hands rows over as they are: an endpoint encodes them itself."""

    task: Task
    classes: Mapping[str, int] | None = None
    tokenizer: Any = None
    image: ImageSpec | None = None
    context: int | None = None
    pad: int = 0

    def encode(self, rows: Rows, length: int, *, packed: bool = False, labelled: bool = True) -> Examples:
        """Return the rows as raw texts or images; `length` is the endpoint's own affair."""
        if not self.task.endswith("classification"):
            raise RequestError(
                f"{rows.origin}: an endpoint writes text, and gives no probabilities of a text that it is shown"
            )
        column = "image" if self.task == "image-classification" else "text"
        if column not in rows.columns or (labelled and "label" not in rows.columns):
            raise RequestError(
                f"{rows.origin}: {self.task} takes the columns {column} and label; "
                f"these rows have {', '.join(rows.columns)}. Name them with `columns: {{ours: theirs}}`"
            )
        known = dict(self.classes or {})
        names = [str(label) for label in rows.columns["label"]] if labelled else []
        unknown = sorted({name for name in names if name not in known})
        if unknown:
            raise RequestError(f"{rows.origin}: the endpoint has no class called {', '.join(unknown[:5])}")
        labels = torch.tensor([known[name] for name in names]) if labelled else torch.zeros(len(rows)).long()
        return RawExamples(column, list(rows.columns[column]), labels)


class RawExamples(Examples):
    """Texts or images as they are."""

    def __init__(self, column: str, values: Sequence[Any], labels: torch.Tensor) -> None:
        self._name = f"{column}s"
        self._values = values
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: Sequence[int]) -> Batch:
        values: Any = [self._values[i] for i in indices]
        return {self._name: values, "labels": self._labels[list(indices)]}


class _Stopped(Exception):
    """Another request of the same call has failed."""


class EndpointBackend:
    """A model behind an endpoint."""

    classes: Mapping[str, int]

    def __init__(self, ref: ModelRef, budget: Budget) -> None:
        self.offers = ref.offers
        self.classes = {}
        self._label = ref.label
        self._spec = ref.endpoint or EndpointSpec()
        self._wire = Wire(ref)
        self._model = name_of(ref)
        self._ledger = open_ledger(budget.ledger)
        self._budget = budget if budget.run else replace(budget, run=f"handle {uuid.uuid4().hex}")
        self._asked: Counter[str] = Counter()  # samples of one prompt that this handle has asked for
        self._counting = threading.Lock()
        self._facts = self._ledger.facts(ref.label)

    # --- what it is -------------------------------------------------------------------------------------------------

    def about(self) -> Json:
        """Return what the endpoint says of its model under `lfm`; nothing where it is none of `lfm serve`."""
        if "about" not in self._facts:
            self._learn(about=self._describe())
        about: Json = self._facts["about"]
        return about

    def _describe(self) -> Json:
        try:
            answer = self._wire.send("GET", f"{self._wire.base}/models/{self._model}", None, lambda found: found)
        except Refused as error:
            if not isinstance(error, NotThere):
                raise
            return {}
        told = answer.read.get("lfm")
        return told if isinstance(told, dict) else {}

    def _learn(self, **facts: Any) -> None:
        self._ledger.learn(self._label, facts)
        self._facts = self._ledger.facts(self._label)

    # --- text -------------------------------------------------------------------------------------------------------

    def write(self, prompts: Sequence[Prompt], how: Sampling, tell: Tell | None) -> list[Completion]:
        """Ask for every text; each is told whole, when it has come."""
        repeats = self._repeats(prompts, how)

        def ask(index: int) -> Completion:
            made = self._complete(prompts[index], how, repeats[index])
            if how.top_logprobs is not None and made.completion_tokens and not made.tokens:
                raise RequestError(f"{self._label}: gives no log-probabilities of what it writes; ask for text alone")
            if tell is not None:
                tell(index, made.text)
            return made

        return self._all(ask, len(prompts))

    def _repeats(self, prompts: Sequence[Prompt], how: Sampling) -> list[int]:
        """Return which sample of its prompt each one is: with a seed, of this call; otherwise, of this handle."""
        if how.temperature == 0:
            return [0] * len(prompts)
        counts: Counter[str] = Counter()
        found = []
        with self._counting:
            asked = counts if how.seed is not None else self._asked
            for prompt in prompts:
                name = json.dumps([_told(prompt), how.model_dump(mode="json")])
                found.append(asked[name])
                asked[name] += 1
        return found

    def _complete(self, prompt: Prompt, how: Sampling, repeat: int) -> Completion:
        asked = self._asked_as(prompt)
        try:
            return self._written(asked, how, repeat)
        except NotThere as refused:
            if not isinstance(asked, str) or self._spec.api != "auto":
                raise
            try:
                made = self._written(_as_message(asked), how, repeat)
            except NotThere:
                raise refused from None
            self._learn(chat_only=True)
            return made

    def _asked_as(self, prompt: Prompt) -> Prompt:
        """Return a prompt in the form that the endpoint takes."""
        if isinstance(prompt, str):
            chat = self._spec.api == "chat" or (self._spec.api == "auto" and self._facts.get("chat_only"))
            return _as_message(prompt) if chat else prompt
        if self._spec.api == "completions":
            raise RequestError(f"{self._label}: is used for completions (`api`), and a conversation takes chat")
        return prompt

    def _written(self, prompt: Prompt, how: Sampling, repeat: int) -> Completion:
        seed = None if how.seed is None else how.seed + repeat
        path, body = protocol.text_body(self._model, prompt, how, seed)
        reserve = protocol.text_reserve(prompt, how, self._spec)
        question = Question(self._label, path, body, repeat, reserve)

        def ask(newer: bool = False) -> Completion:
            # Under which name the limit is sent decides nothing, so the question is the same.
            sent = protocol.renamed(body) if newer else body
            read = partial(protocol.completion, path)
            made: Completion = self._asked_once(question, f"{self._wire.base}{path}", sent, read)
            return made

        return self._under_either_name(ask) if path == protocol.CHAT else ask()

    def _under_either_name(self, ask: Callable[[bool], Completion]) -> Completion:
        """Return what a conversation is answered, its limit sent under the name that the endpoint takes."""
        newer = bool(self._facts.get("newer_limit"))
        try:
            return ask(newer)
        except OtherName as error:
            first = error
        try:
            made = ask(not newer)
        except OtherName as error:  # something else was wrong: the refusal of the newer name says what
            raise (first if newer else error) from None
        self._learn(newer_limit=not newer)
        return made

    # --- classes ----------------------------------------------------------------------------------------------------

    def labels(self, batch: Batch) -> torch.Tensor:
        """Return the class of each example that the endpoint takes for the most probable."""
        return torch.tensor([self._index(found.label) for found in self._predictions(batch)], dtype=torch.long)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return log-probabilities (batch, classes), float32."""
        rows = []
        for found in self._predictions(batch):
            if found.probabilities is None:
                raise RequestError(f"{self._label}: gives labels and no probabilities; leave out `access: probs`")
            row = torch.zeros(len(self.classes))
            for name, value in found.probabilities.items():
                row[self._index(name)] = value
            rows.append(row)
        return torch.stack(rows).log().log_softmax(-1)  # what is rounded, or left out, need not sum to 1

    def _index(self, name: str) -> int:
        if name not in self.classes:
            raise RequestError(
                f"{self._label}: answers with the class {name[:50]!r}, which it did not name; if another model is "
                f"served there now, remove what is known of it: lfm ledger forget --endpoint '{self._label}'"
            )
        return self.classes[name]

    def _predictions(self, batch: Batch) -> list[protocol.Prediction]:
        examples: Any = batch.get("texts", batch.get("images"))
        if examples is None or not self.classes:
            raise RequestError(f"{self._label}: is asked for text (`write`), and not for classes")
        return self._all(lambda index: self._predicted(examples[index]), len(examples))

    def _predicted(self, example: Any) -> protocol.Prediction:
        body, kept = protocol.predict_body(self._model, example)
        question = Question(self._label, protocol.PREDICT, kept)
        url = f"{self._wire.base.removesuffix('/v1')}{protocol.PREDICT}"
        found: protocol.Prediction = self._asked_once(question, url, body, protocol.prediction)
        return found

    # --- asking -----------------------------------------------------------------------------------------------------

    def _asked_once(self, question: Question, url: str, body: Json, read: Callable[[Json], Any]) -> Any:
        """Return what the answer to a question says, from the ledger or from the endpoint."""

        def send(claim: Claim) -> Sent:
            def sent() -> None:
                claim.sends += 1

            answer = self._wire.send("POST", url, body, read, claim.idempotency, sent)
            return protocol.paid(json.loads(answer.text), answer.text, self._spec)

        text, _ = self._ledger.answer(question, self._budget, send, self._wire.longest)
        return read(json.loads(text))

    def _all(self, ask: Callable[[int], Any], count: int) -> list[Any]:
        """Return the answers to `count` questions, in order; after a failure, those under way are still kept."""
        if count == 1:
            return [self._tried(lambda: ask(0), lambda: 0, 1)]
        stop = threading.Event()

        def unless_stopped(index: int) -> Any:
            if stop.is_set():
                raise _Stopped
            try:
                return ask(index)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(min(self._spec.concurrency, max(1, count))) as pool:
            futures = [pool.submit(unless_stopped, index) for index in range(count)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:  # an interruption of this thread, while the others work
                stop.set()
                raise
        failed = [future for future in futures if not isinstance(future.exception(), (_Stopped, type(None)))]
        if failed:
            return [self._tried(failed[0].result, lambda: _answered(futures), count)]
        return [future.result() for future in futures]

    def _tried(self, do: Callable[[], Any], answered: Callable[[], int], count: int) -> Any:
        """Return what `do` gives; a failure also says what was kept."""
        try:
            return do()
        except Refused:
            raise
        except (Failed, BudgetError) as error:
            kept = f"; {answered()} of {count:,} were answered, and their answers are kept in {self._ledger.path}"
            what = f"{error}{kept}"
            if isinstance(error, BudgetError):
                raise BudgetError(f"{self._label}: {what}. Allow more and run the same again to go on") from None
            raise LfmError(f"{what}. Run the same again to go on from there") from None


def _answered(futures: Sequence[Future[Any]]) -> int:
    return sum(1 for future in futures if future.exception() is None)


def _as_message(prompt: str) -> list[Message]:
    return [Message(role="user", content=prompt)]


def _told(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [message.model_dump() for message in prompt]
