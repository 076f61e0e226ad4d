"""Sending requests to an endpoint: its key, time limits, backing off, and what its refusals say."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from lfm import __version__
from lfm.errors import LfmError, RequestError
from lfm.models.ledger import Refused
from lfm.models.ref import DEFAULT_KEY, EndpointSpec, ModelRef

AGAIN = (408, 409, 425, 429)  # with 500 and above: statuses after which the same request may succeed
LONGEST = 30.0  # seconds between two sends, unless the endpoint asks for more
PATIENCE = 600.0  # seconds that an endpoint may ask for
BIGGEST = 64 << 20  # bytes of an answer
NEWER = "max_completion_tokens"  # what servers say that no longer take `max_tokens`, or do not know this yet
Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer that was understood: `read` is what its reader made of it."""

    text: str
    read: Any


class Failed(LfmError):
    """The endpoint did not answer, however often it was asked."""


class NotThere(Refused):
    """The endpoint knows no such path."""


class OtherName(Refused):
    """The endpoint wants the limit of an answer under another name than it was given."""


class NotUsable(Exception):
    """An answer that is not what was asked for; the same request may bring a better one."""


class _Lost(Exception):
    """One send that failed; `wait` is how long the endpoint asked to be left alone."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def base_of(ref: ModelRef) -> str:
    """Return an endpoint's address without its model: `http://host/v1`."""
    return str(ref.ref).partition("#")[0].rstrip("/")


def name_of(ref: ModelRef) -> str:
    """Return the name of the model at an endpoint."""
    return str(ref.ref).partition("#")[2]


def key_of(ref: ModelRef) -> str | None:
    """Return the key that the environment holds for an endpoint. Raises RequestError where a named one is missing."""
    name = (ref.endpoint or EndpointSpec()).key
    key = os.environ.get(name, "").strip() if name else ""
    if not key and name not in ("", DEFAULT_KEY):
        raise RequestError(f"{ref.label}: its key is to come from the environment variable {name}, which is not set")
    if not (key.isascii() and key.isprintable()):
        raise RequestError(f"{ref.label}: {name} holds characters that a key cannot have; set it again")
    return key or None


class Wire:
    """The way to one endpoint. Its key is in here and in no message; any number of threads may send."""

    def __init__(self, ref: ModelRef) -> None:
        self._label = ref.label
        self._spec = ref.endpoint or EndpointSpec()
        self._key = key_of(ref)
        self.base = base_of(ref)
        self._slots = threading.BoundedSemaphore(self._spec.concurrency)
        self._quiet_until = 0.0  # the endpoint asked all of us to wait
        headers = {"User-Agent": f"learn-from-model/{__version__}", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=self._spec.concurrency, max_keepalive_connections=self._spec.concurrency)
        self._client = httpx2.Client(headers=headers, timeout=self._spec.timeout, limits=limits, follow_redirects=False)
        weakref.finalize(self, self._client.close)

    @property
    def longest(self) -> float:
        """Seconds that one question may be under way, all its sends together."""
        return (self._spec.retries + 1) * (self._spec.timeout + PATIENCE)

    def send(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Json], Any],
        idempotency: str = "",
        sent: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Return the answer, with what `read` makes of it; `sent` is called before each send.

        A request that fails is sent again, later and later. Raises Failed when it has failed for good, Refused where
        the endpoint says that it will not answer.
        """
        headers = {"Idempotency-Key": idempotency} if idempotency else {}
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        if content is not None:
            headers["Content-Type"] = "application/json"
        for attempt in range(self._spec.retries + 1):
            self._stay_quiet()
            try:
                with self._slots:
                    sent()
                    text = self._once(method, url, content, headers)
                return Answer(text, _read(text, read))
            except _Lost as lost:
                if attempt == self._spec.retries:
                    raise Failed(f"{self._label}: {self._safe(str(lost))}{_times(attempt + 1)}") from None
                self._back_off(attempt, lost.wait)
        raise AssertionError("unreachable")

    def _once(self, method: str, url: str, content: bytes | None, headers: Mapping[str, str]) -> str:
        """Send one request and return the text that came back, within the time there is for it."""
        deadline = time.monotonic() + self._spec.timeout
        parts: list[bytes] = []
        try:
            with self._client.stream(method, url, content=content, headers=dict(headers)) as response:
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise _Lost(f"no whole answer within {self._spec.timeout:g} s")
                    if sum(map(len, parts)) > BIGGEST:
                        raise Refused(f"{self._label}: its answer has more than {BIGGEST >> 20} MiB")
        except httpx2.TimeoutException:
            raise _Lost(f"no answer within {self._spec.timeout:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Lost(_reason(error)) from None
        text = self._safe(b"".join(parts).decode("utf-8", "replace"))
        if response.status_code // 100 == 2:
            return text
        raise self._complaint(response, text)

    def _complaint(self, response: httpx2.Response, text: str) -> Exception:
        """Return what a status other than 2xx means."""
        status = response.status_code
        said = f"status {status}{_message(text)}"
        if status in AGAIN or status >= 500:
            return _Lost(said, _wait(response.headers.get("retry-after")))
        if status in (404, 405):
            return NotThere(f"{self._label}: refused with {said}")
        if status in (400, 422) and NEWER in text:
            return OtherName(f"{self._label}: refused with {said}")
        if status // 100 == 3:
            return Refused(f"{self._label}: sends elsewhere ({said}); name the address itself")
        return Refused(f"{self._label}: refused with {said}")

    def _back_off(self, attempt: int, asked: float | None) -> None:
        """Wait before the next send: as long as the endpoint asks, otherwise twice as long each time."""
        if asked is not None:
            self._quiet_until = max(self._quiet_until, time.monotonic() + min(asked, PATIENCE))
        else:
            pause = min(LONGEST, self._spec.backoff * 2.0 ** min(attempt, 20))
            time.sleep(pause * random.uniform(0.5, 1.0))  # by chance, so that callers do not come back all at once

    def _stay_quiet(self) -> None:
        while (left := self._quiet_until - time.monotonic()) > 0:
            time.sleep(left)

    def _safe(self, text: str) -> str:
        """Return text without the key, which some endpoints repeat when they refuse it."""
        return text.replace(self._key, "***") if self._key else text

    def __repr__(self) -> str:
        return f"Wire({self._label!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a connection to an endpoint cannot be pickled")


def _read(text: str, read: Callable[[Json], Any]) -> Any:
    try:
        answer = json.loads(text)
        if not isinstance(answer, dict):
            raise NotUsable("JSON, but no object")
        if "error" in answer and answer["error"] and "choices" not in answer:
            raise NotUsable(f"an error{_message(text)}")
        return read(answer)
    except NotUsable as error:
        raise _Lost(f"it answered {error}") from None
    except (ValueError, RecursionError):
        raise _Lost(f"it answered no JSON: {_short(text)!r}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Lost(f"its answer lacks what was asked for: {_short(text)!r}") from None


def _message(text: str) -> str:
    """Return what a body says in words, after a colon; empty where it says nothing."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    said = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return f": {_short(said)}" if said.strip() else ""


def _short(text: str, length: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."


def _reason(error: Exception) -> str:
    words = _short(str(error)) or type(error).__name__
    return f"no connection ({words})" if isinstance(error, httpx2.ConnectError) else f"the answer broke off ({words})"


def _times(count: int) -> str:
    return f" (asked {count} times)" if count > 1 else ""


def _wait(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
