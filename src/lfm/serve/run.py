"""Serving: what was asked is checked and the port is taken before any model is opened."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.defence import Defence, defended
from lfm.models.ref import ModelRef

if TYPE_CHECKING:
    import uvicorn

    from lfm.models.handle import Model

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart", "PIL": "pillow"}


@dataclass(frozen=True)
class Serving:
    """Where models are served, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 for any that is free
    token_env: str | None = None  # environment variable that holds the token
    allow_open: bool = False  # serve other machines without a token
    access: Access = Access.PROBS  # the most that clients get
    together: int = 8  # prompts that one model answers in one batch
    most_bytes: int = 32 * 2**20  # of one request
    defence: Defence = field(default_factory=Defence)  # what is done to probabilities before clients get them
    secret_env: str | None = None  # environment variable that holds what noise is keyed with

    @property
    def token(self) -> str | None:
        return None if self.token_env is None else os.environ.get(self.token_env)

    @property
    def secret(self) -> str:
        """What noise is keyed with; a new one every time where none is given."""
        return secrets.token_hex(16) if self.secret_env is None else os.environ.get(self.secret_env, "")

    def problems(self) -> list[str]:
        """Return what speaks against it, one line each."""
        from lfm.serve.guard import is_local

        found = []
        if self.token_env is not None and not self.token:
            found.append(f"--token-env: the environment variable {self.token_env} is not set; put the token there")
        elif self.token is not None and not (
            self.token.isascii() and self.token.isprintable() and " " not in self.token
        ):
            found.append(f"--token-env: {self.token_env} must hold printable ASCII without spaces")
        if self.token_env is None and not is_local(self.host) and not self.allow_open:
            found.append(
                f"--host {self.host} lets other machines in, and nothing asks who they are; name a variable that holds "
                "a token (--token-env VARIABLE), or say --allow-open"
            )
        return [*found, *self._defence_problems()]

    def _defence_problems(self) -> list[str]:
        if self.secret_env is not None and not self.defence.perturb:
            return ["--secret-env: there is no noise to be keyed; say how much (--perturb), or leave it out"]
        if self.secret_env is not None and not self.secret:
            return [f"--secret-env: the environment variable {self.secret_env} is not set; put the secret there"]
        if self.access < Access.PROBS and self.defence.tells_less:
            return ["--round, --top-k, --perturb: clients get no probabilities (--access labels); leave these out"]
        return []


def names_of(refs: Sequence[ModelRef], given: Sequence[str]) -> list[str]:
    """Return the names to serve models under: those given, else what they are called. Raises RequestError."""
    if given and len(given) != len(refs):
        raise RequestError(f"--name: {len(given)} names for {len(refs)} models; give one for each, in their order")
    names = list(given) or [_called(ref) for ref in refs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(names):
        raise RequestError(f"two models are called {', '.join(twice)}; give each a --name, in the order of the models")
    return names


def _called(ref: ModelRef) -> str:
    """Return the last part of a folder's or an endpoint's name; names of the hub are left whole."""
    label = ref.label.rpartition("#")[2] if ref.label.startswith(("http://", "https://")) else ref.label
    return Path(label).resolve().name if Path(label).exists() else label


def serve(
    refs: Sequence[ModelRef],
    names: Sequence[str],
    how: Serving,
    open_model: Callable[[ModelRef], Model],
    tell: Callable[[str], None],
) -> None:
    """Serve models until interrupted. Raises RequestError with all that is wrong before a model is opened."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RequestError(f"serving needs {', '.join(missing)}: pip install 'learn-from-model[serve]'")
    problems = how.problems()
    try:
        called = names_of(refs, names)
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(*problems)
    with bound(how.host, how.port) as place:
        models = opened(dict(zip(called, refs, strict=True)), open_model, how)
        host, port = place.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        for name, model in models.items():
            where = f"{address}/v1" if model.task == "causal-lm" else f"{address}/predict"
            tell(f"serving {name} ({model.task}, {model.access.name.lower()}) at {where}")
        tell("Ctrl-C stops it")
        run(models, how, place)


def bound(host: str, port: int) -> socket.socket:
    """Take a port, so that nobody waits for models to load to hear that it is not free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
        place.listen(128)  # a port that is bound by two is refused here
    except (OSError, UnicodeError) as error:
        place.close()
        why = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"--host {host} --port {port}: {why}; choose another --port (0 for any)") from None
    return place


def opened(refs: Mapping[str, ModelRef], open_model: Callable[[ModelRef], Model], how: Serving) -> dict[str, Model]:
    """Open all models, restricted to what clients get; raises RequestError with all that cannot be served."""
    models: dict[str, Model] = {}
    secret = how.secret
    problems: list[str] = []
    for name, ref in refs.items():
        try:
            model = open_model(ref)
            model = defended(model, how.defence, secret) if how.defence.tells_less else model
        except RequestError as error:
            problems += error.problems
            continue
        if model.task == "masked-lm":
            problems.append(f"{ref.label}: a masked-lm model neither writes text nor classifies; it cannot be served")
        models[name] = model.restrict(how.access)
    if problems:
        raise RequestError(*problems)
    return models


def run(models: Mapping[str, Model], how: Serving, place: socket.socket) -> None:
    """Answer requests on a bound socket until interrupted."""
    server, close = server_of(models, how)
    try:
        server.run(sockets=[place])
    finally:
        close()


def server_of(models: Mapping[str, Model], how: Serving) -> tuple[uvicorn.Server, Callable[[], None]]:
    """Return a server for models, and what ends their work once it has stopped."""
    import uvicorn

    from lfm.serve.app import Service, application
    from lfm.serve.guard import Guard, is_local

    service = Service(models, how.together)
    app = Guard(application(service), how.token, is_local(how.host) and how.token is None, how.most_bytes)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        lifespan="off",
        loop="asyncio",
        http="h11",
    )
    return uvicorn.Server(config), service.close
