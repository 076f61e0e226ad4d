"""One model, one thread, one batch at a time: what is asked meanwhile waits, and is answered together if it can be."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lfm.errors import LfmError, RequestError
from lfm.models.handle import Model, Tell
from lfm.models.text import Completion, Prompt, Sampling
from lfm.serve.faults import Refused

LOG = logging.getLogger("lfm")
WAITING = 256  # requests that may wait for one model


class Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Job:
    """Something that a model is asked, by somebody who may leave before it is answered."""

    future: Future[Any] = field(default_factory=Future)
    gone: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> None:
        """Say that nobody waits any more: work that has begun is given up at its next piece of text."""
        self.gone.set()

    def answer(self, result: Any) -> None:
        self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        self.future.set_exception(error)


@dataclass(eq=False)
class Writing(Job):
    """Texts to go on from, or conversations to answer; `tell` is called from the model's thread."""

    prompts: Sequence[Prompt] = ()
    how: Sampling = field(default_factory=Sampling)
    tell: Tell | None = None

    def goes_with(self, others: Sequence[Writing], together: int) -> bool:
        """Whether it may be written in one batch with others: asked alike, and never the same prompt twice.

        Equal prompts of one batch are answered differently, which is for one request with `n`, not for two requests.
        """
        taken = [str(prompt) for other in others for prompt in other.prompts]
        room = len(taken) + len(self.prompts) <= together
        return room and self.how == others[0].how and not {str(prompt) for prompt in self.prompts} & set(taken)


@dataclass(eq=False)
class Looking(Job):
    """Anything else that takes the model: a batch to classify."""

    look: Callable[[], Any] = lambda: None


class Worker:
    """The thread of one model.

    Writings that wait are put together, up to `together` prompts. Batching changes the order in which sums are taken,
    so the last digits of log-probabilities may differ from those of a request alone; with `together` = 1 they do not.
    """

    def __init__(self, model: Model, together: int = 8) -> None:
        self.model = model
        self._together = together
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running: tuple[Job, ...] = ()
        self._thread = threading.Thread(target=self._work, name=f"lfm {model.label}", daemon=True)
        self._thread.start()

    def ask(self, job: Job) -> None:
        """Put a job in line; raises Refused where the line is too long."""
        with self._changed:
            if self._closed or len(self._waiting) >= WAITING:
                raise Refused(503, "too many requests wait for this model; ask again later", "overloaded")
            self._waiting.append(job)
            self._changed.notify()

    def close(self, seconds: float = 5.0) -> None:
        """Give up what is running and what waits, and end the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.leave()
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            if jobs:
                self._run(jobs)
            self._running = ()

    def _next(self) -> tuple[Job, ...] | None:
        """Return what is to be done now: jobs that go together, none where nobody waits for them; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed and not self._waiting:
                return None
            first = self._waiting.popleft()
            jobs = self._joined(first) if isinstance(first, Writing) else (first,)
            # From here on a future cannot be cancelled under the hands of the one who does the work.
            wanted = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            for job in wanted:
                if job.gone.is_set():
                    job.fail(Gone())
            self._running = tuple(job for job in wanted if not job.future.done())
            return self._running

    def _joined(self, first: Writing) -> tuple[Writing, ...]:
        jobs = [first]
        for job in list(self._waiting):
            if isinstance(job, Writing) and not job.gone.is_set() and job.goes_with(jobs, self._together):
                jobs.append(job)
                self._waiting.remove(job)
        return tuple(jobs)

    def _run(self, jobs: tuple[Job, ...]) -> None:
        try:
            if isinstance(jobs[0], Looking):
                jobs[0].answer(jobs[0].look())
            else:
                self._write([job for job in jobs if isinstance(job, Writing)])
        except Exception as error:
            if len(jobs) > 1 and isinstance(error, RequestError):
                for job in jobs:  # one of them is at fault: each learns about itself
                    self._run((job,))
                return
            if not isinstance(error, (LfmError, Gone)):
                LOG.exception("%s failed", self.model.label)
            for job in jobs:
                job.fail(error)

    def _write(self, jobs: Sequence[Writing]) -> None:
        places = [(job, index) for job in jobs for index in range(len(job.prompts))]

        def tell(index: int, piece: str) -> None:
            job, place = places[index]
            if job.tell is not None and not job.gone.is_set():
                job.tell(place, piece)
            if all(other.gone.is_set() for other in jobs):
                raise Gone

        made: list[Completion] = self.model.write([job.prompts[place] for job, place in places], jobs[0].how, tell)
        for job in jobs:
            job.answer([text for (owner, _), text in zip(places, made, strict=True) if owner is job])
