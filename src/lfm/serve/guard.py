"""Who may ask: a token, names of this machine alone, requests of a size that fits."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from lfm.serve.faults import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATIENCE = 8  # times the size that is allowed are read of what is too large


class Guard:
    """Lets requests through to `app` that carry the token, name this machine, and are not too large.

    Without a token a server is for this machine alone, and a page in somebody's browser must not reach it under a name
    of its own: `local` asks for the names that only this machine has.
    """

    def __init__(self, app: App, token: str | None, local: bool, most_bytes: int) -> None:
        self._app = app
        self._wanted = None if token is None else f"Bearer {token}".encode()
        self._local = local
        self._most = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except Refused as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            await JSONResponse(error.body, error.status, {**headers, "Connection": "close"})(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _again(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._local and not is_local(_host(headers.get(b"host", b"").decode("latin-1"))):
            raise Refused(403, "this server answers to names of its own machine alone: 127.0.0.1, localhost", "host")
        open_to_all = self._wanted is None or scope["path"] == "/health"
        if not open_to_all and not hmac.compare_digest(headers.get(b"authorization", b""), self._wanted or b""):
            raise Refused(
                401, "the token is missing or wrong: send it as `Authorization: Bearer ...`", "invalid_api_key"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return all that was sent, of whatever length it says it is; None where the client left.

        What is too large is read to its end and forgotten, within reason: a client that is cut off while it sends does
        not hear why.
        """
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= PATIENCE * self._most:
            message = await receive()
            if message["type"] != "http.request":
                return None
            size += len(message.get("body", b""))
            if size > self._most:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        if size > self._most:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> Refused:
        return Refused(413, f"a request may hold {self._most // 2**20} MiB; send less at a time", "request_too_large")


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, then what else comes: that the client has left."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: str) -> str:
    """Return the name in a Host header, without its port."""
    return header.partition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other machine can reach."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
