"""The addresses that answer: models, completions, chat completions, `/predict`, `/health`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lfm import __version__
from lfm.data import Rows
from lfm.errors import RequestError, did_you_mean
from lfm.method import Access
from lfm.models.handle import Model
from lfm.models.text import Completion, Prompt
from lfm.serve.answers import Form, Kind, event
from lfm.serve.asked import MOST, Asked, AskedChat, AskedCompletion
from lfm.serve.faults import Refused, body, refusal
from lfm.serve.predict import MOST as MOST_ROWS
from lfm.serve.predict import AskedClasses, decoded, look, pictures
from lfm.serve.work import Gone, Job, Looking, Worker, Writing

ANSWER = 512  # tokens of an answer in a conversation where nobody says how many


class Service:
    """The models by the names that they are served under."""

    def __init__(self, models: Mapping[str, Model], together: int = 8) -> None:
        self._workers = {name: Worker(model, together) for name, model in models.items()}
        self._created = int(time.time())

    def close(self) -> None:
        """Give up all work."""
        for worker in self._workers.values():
            worker.close()

    def listed(self) -> list[dict[str, Any]]:
        return [self.described(name) for name in self._workers]

    def described(self, name: str) -> dict[str, Any]:
        """Return what is told of a model."""
        model = self.worker(name).model
        classes = model.encoder.classes or {}
        told = {
            "task": model.task,
            "access": model.access.name.lower(),
            "classes": sorted(classes, key=lambda label: classes[label]) or None,
            "context": model.encoder.context,
            "image": None if model.encoder.image is None else model.encoder.image.model_dump(mode="json"),
        }
        return {"id": name, "object": "model", "created": self._created, "owned_by": "lfm", "lfm": told}

    def worker(self, name: str) -> Worker:
        if name not in self._workers:
            known = f"; there are {', '.join(self._workers)}"
            hint = did_you_mean(name, self._workers) or known
            raise Refused(404, f"no model {name!r} here{hint}", "model_not_found", "model")
        return self._workers[name]

    def chosen(self, name: str | None, text: bool) -> tuple[str, Worker]:
        """Return the model that a request means: the one it names, or the only one that fits."""
        fitting = [known for known, worker in self._workers.items() if _writes(worker.model) is text]
        if name is None and len(fitting) != 1:
            raise Refused(400, f"which model? there are {', '.join(self._workers)}", "model_not_given", "model")
        name = fitting[0] if name is None else name
        worker = self.worker(name)
        if _writes(worker.model) is not text:
            what = "writes text: ask /v1/completions" if _writes(worker.model) else "writes no text: ask /predict"
            raise Refused(400, f"{name} is a {worker.model.task} model, which {what}", "wrong_task", "model")
        return name, worker


def _writes(model: Model) -> bool:
    return model.task == "causal-lm"


# --- text -----------------------------------------------------------------------------------------------------------


async def _write(service: Service, asked: Asked, request: Request, kind: Kind) -> Response:
    assert isinstance(asked, (AskedChat, AskedCompletion))
    name, worker = service.chosen(asked.model, text=True)
    prompts = asked.prompts
    if len(prompts) > MOST:
        raise Refused(400, f"{len(prompts)} answers in one request; ask for {MOST} or fewer", param="n")
    if asked.top_logprobs is not None and worker.model.access < Access.PROBS:
        raise Refused(403, f"{name} gives text alone: log-probabilities cannot be had", "access", "logprobs")
    most = asked.most
    if most is None:
        most = await asyncio.to_thread(_room, worker.model, prompts[0])
    form = Form(kind, name, len(prompts) // asked.n, asked.n, asked.top_logprobs is not None)
    job = Writing(prompts=prompts, how=asked.sampling(most, asked.top_logprobs))
    if asked.stream:
        return await _streamed(worker, job, form, request, asked.stream_options.include_usage)
    return JSONResponse(form.whole(await _answered(worker, job, request)))


def _room(model: Model, prompt: Prompt) -> int:
    """Return how long an answer may be at most where nobody says: what is left of the model's context, if it is less.

    Of a model that is not in this process nobody here can count the tokens.
    """
    tokenizer, context = model.encoder.tokenizer, model.encoder.context
    if tokenizer is None or context is None:
        return ANSWER
    from lfm.models._wording import TokenizerWording

    taken = len(TokenizerWording(tokenizer, frozenset(), context).encode(prompt))
    return max(1, min(ANSWER, context - taken))


async def _answered(worker: Worker, job: Job, request: Request) -> Any:
    """Return a job's result; a client that leaves meanwhile takes its job with it."""
    worker.ask(job)
    watching = asyncio.create_task(_leave_with(request, job))
    try:
        return await asyncio.wrap_future(job.future)
    finally:
        job.leave()
        watching.cancel()


async def _leave_with(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.leave()


async def _streamed(worker: Worker, job: Writing, form: Form, request: Request, usage: bool) -> Response:
    """Return the answer piece by piece; what goes wrong before the first one still gets a status of its own."""
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

    def put(item: tuple[int, str] | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(told.put_nowait, item)

    job.tell = lambda index, piece: put((index, piece))
    job.future.add_done_callback(lambda _: put(None))
    worker.ask(job)
    watching = asyncio.create_task(_leave_with(request, job))
    try:
        head = await told.get()
        if head is None and (error := job.future.exception()) is not None:
            raise error
    except BaseException:
        job.leave()
        watching.cancel()
        raise

    async def pieces() -> AsyncIterator[str]:
        try:
            async for content in _contents(told, head, job, form, usage):
                yield event(content)
            yield "data: [DONE]\n\n"
        finally:
            job.leave()
            watching.cancel()

    return StreamingResponse(pieces(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _contents(
    told: asyncio.Queue[tuple[int, str] | None], head: tuple[int, str] | None, job: Writing, form: Form, usage: bool
) -> AsyncIterator[dict[str, Any]]:
    for index in range(len(job.prompts)):
        if (opening := form.first(index)) is not None:
            yield opening
    item = head
    while item is not None:
        yield form.piece(*item)
        item = await told.get()
    error = job.future.exception()
    if error is not None:
        yield refusal(error if isinstance(error, Exception) else Gone()).body
        return
    made: list[Completion] = job.future.result()
    for index, completion in enumerate(made):
        yield form.last(index, completion)
    if usage:
        yield form.counted(made)


# --- classes --------------------------------------------------------------------------------------------------------


async def _classify(service: Service, request: Request) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        asked, files = await _form(request)
    elif kind == "application/json":
        asked, files = AskedClasses.model_validate_json(await request.body()), None
    else:
        raise Refused(415, "send application/json, or files as multipart/form-data", "unsupported_media_type")
    name, worker = service.chosen(asked.model, text=False)
    wants = "images" if worker.model.task == "image-classification" else "texts"
    if (asked.texts is not None) is (wants == "images"):
        raise Refused(400, f"{name} is a {worker.model.task} model: send `{wants}`", "wrong_task", wants)
    rows = await asyncio.to_thread(_rows, asked, files)
    job = Looking(look=lambda: look(worker.model, rows, asked.length))
    return JSONResponse({"model": name, **await _answered(worker, job, request)})


def _rows(asked: AskedClasses, files: list[bytes] | None) -> Rows:
    if asked.texts is not None:
        return Rows({"text": asked.texts}, "texts")
    return pictures(decoded(asked.images or ()) if files is None else files)


async def _form(request: Request) -> tuple[AskedClasses, list[bytes]]:
    """Return what a form with files asks: each file is a picture, whatever its field is called."""
    async with request.form(max_files=MOST_ROWS) as form:
        files = [await item.read() for _, item in form.multi_items() if not isinstance(item, str)]
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    if not files or set(fields) - {"model"}:
        raise Refused(400, "a form holds files, and `model` where there are several", param="images")
    return AskedClasses(model=fields.get("model"), images=[""] * len(files)), files


# --- application ----------------------------------------------------------------------------------------------------


def application(service: Service) -> FastAPI:
    """Return the application that answers for these models."""
    app = FastAPI(title="lfm", version=__version__, docs_url=None, redoc_url=None)

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.listed()}

    async def model(name: str) -> dict[str, Any]:
        return service.described(name)

    async def completions(asked: AskedCompletion, request: Request) -> Response:
        return await _write(service, asked, request, "completions")

    async def chat(asked: AskedChat, request: Request) -> Response:
        return await _write(service, asked, request, "chat")

    async def predict(request: Request) -> Response:
        return await _classify(service, request)

    app.add_api_route("/health", health)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name:path}", model)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/predict", predict, methods=["POST"], response_model=None)
    for kind in (Refused, RequestError, Exception, Gone):
        app.add_exception_handler(kind, _told)
    app.add_exception_handler(RequestValidationError, _misshapen)
    app.add_exception_handler(ValidationError, _misshapen)
    app.add_exception_handler(HTTPException, _no_such_address)
    return app


async def _told(request: Request, error: Exception) -> Response:
    found = refusal(error)
    return JSONResponse(found.body, found.status)


async def _misshapen(request: Request, error: Exception) -> Response:
    """Tell all that is wrong with a request at once."""
    assert isinstance(error, (RequestValidationError, ValidationError))
    told = [_line(problem) for problem in error.errors()]
    params = [place for place, _ in told if place]
    message = "; ".join(f"{place}: {text}" if place else text for place, text in told)
    return JSONResponse(body(400, message, param=params[0] if params else None), 400)


def _line(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Return where in a request something is wrong, and what."""
    where: Sequence[Any] = [part for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return "", f"the request is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
    return ".".join(map(str, where)), str(problem["msg"]).removeprefix("Value error, ")


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"no such address: {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    told = message.get(error.status_code, str(error.detail))
    return JSONResponse(body(error.status_code, told), error.status_code, headers=error.headers)
