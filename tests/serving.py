"""A local endpoint that speaks the OpenAI protocol and can be made to misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One request as the server saw it."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class Endpoint:
    """What the server does, and what it was asked. `faults` are taken one after the other, then it behaves."""

    answer: Callable[[Asked], dict[str, Any]] = None  # type: ignore[assignment]
    faults: list[Any] = field(default_factory=list)
    about: dict[str, Any] | None = None  # `lfm` of GET /v1/models/NAME; no such path where None
    pause: float = 0.0
    chat_only: bool = False
    limit: str = "max_tokens"  # the name that chat takes the limit under; the other one is refused
    asked: list[Asked] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)  # prompts by text
    busiest: int = 0
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _busy: int = 0

    def __post_init__(self) -> None:
        self.answer = self.answer or echo

    @property
    def ref(self) -> str:
        return f"{self.url}/v1#model"


def prompt_of(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def echo(asked: Asked) -> dict[str, Any]:
    """Answer `P` with `P!`, at one token a character."""
    prompt = prompt_of(asked.body)
    text = f"{prompt}!"
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text)}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if "prompt" in asked.body:
        choice["text"] = text
        if asked.body.get("logprobs") is not None:
            tops = [{"a": -0.5, "b": -1.5}]
            choice["logprobs"] = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": tops}
    else:
        choice["message"] = {"role": "assistant", "content": text}
        if asked.body.get("logprobs"):
            top = [{"token": "a", "logprob": -0.5}]
            choice["logprobs"] = {"content": [{"token": text, "logprob": -0.5, "top_logprobs": top}]}
    return {"choices": [choice], "usage": usage}


def _refused_limit(body: dict[str, Any], wanted: str) -> Any:
    """Refuse the other name in the words of OpenAI's server."""
    [other] = {"max_tokens", "max_completion_tokens"} - {wanted}
    if other not in body:
        return None
    said = f"Unsupported parameter: '{other}' is not supported with this model. Use '{wanted}' instead."
    return 400, {"error": {"message": said, "type": "invalid_request_error", "param": other}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: Endpoint

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        about = self.endpoint.about
        status = 404 if about is None else 200
        self.reply(status, json.dumps({"id": "model", "object": "model", "lfm": about}).encode())

    def do_POST(self) -> None:
        endpoint = self.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = Asked(self.path, body, {name.lower(): value for name, value in self.headers.items()})
        with endpoint._lock:
            endpoint.asked.append(asked)
            endpoint._busy += 1
            endpoint.busiest = max(endpoint.busiest, endpoint._busy)
            fault = endpoint.faults.pop(0) if endpoint.faults else None
        try:
            if fault is None and endpoint.chat_only and self.path.endswith("/v1/completions"):
                fault = (404, {"error": {"message": "not a completion model"}})
            if fault is None and self.path.endswith("/chat/completions"):
                fault = _refused_limit(body, endpoint.limit)
            if fault is not None:
                self.misbehave(fault, asked)
                return
            if endpoint.pause:
                time.sleep(endpoint.pause)
            content = json.dumps(endpoint.answer(asked)).encode()
            with endpoint._lock:
                if "prompt" in body or "messages" in body:
                    endpoint.answered[prompt_of(body)] += 1
            with contextlib.suppress(OSError):
                self.reply(200, content)
        finally:
            with endpoint._lock:
                endpoint._busy -= 1

    def misbehave(self, fault: Any, asked: Asked) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            if isinstance(fault, tuple):  # a status, what it says, headers
                status, said, *rest = fault
                self.reply(status, json.dumps(said).encode(), **(rest[0] if rest else {}))
            elif isinstance(fault, bytes):
                self.reply(200, fault)
            elif isinstance(fault, float):  # hang, then answer: nobody listens any more
                time.sleep(fault)
                self.reply(200, b"{}")
            elif fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
            elif fault == "drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(12):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                raise AssertionError(fault)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Run an endpoint on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"endpoint": endpoint})
    with _Server(("127.0.0.1", 0), handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()
