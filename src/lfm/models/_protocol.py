"""What is said to endpoints and what they say: the OpenAI protocol, and `/predict` of `lfm serve`."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from lfm.models._http import NEWER, Json, NotUsable
from lfm.models.ledger import Sent
from lfm.models.ref import EndpointSpec, ImageSpec
from lfm.models.text import Completion, Prompt, Sampling, Token

COMPLETIONS, CHAT, PREDICT = "/completions", "/chat/completions", "/predict"
OVERHEAD = 16  # tokens around a message, at most, for the reserve of money


@dataclass(frozen=True)
class Prediction:
    """What `/predict` says of one example: its most probable class, and the probabilities where it tells them."""

    label: str
    probabilities: Mapping[str, float] | None


def text_body(model: str, prompt: Prompt, how: Sampling, seed: int | None) -> tuple[str, Json]:
    """Return path and body that ask for a continuation, or for an answer to a conversation."""
    body: Json = {"model": model, "max_tokens": how.max_new_tokens, "temperature": how.temperature, "stream": False}
    body |= {"top_p": how.top_p} if how.top_p != 1 else {}
    body |= {"top_k": how.top_k} if how.top_k else {}
    body |= {"stop": list(how.stop)} if how.stop else {}
    body |= {"seed": seed} if seed is not None else {}
    if isinstance(prompt, str):
        body |= {"logprobs": how.top_logprobs} if how.top_logprobs is not None else {}
        return COMPLETIONS, {**body, "prompt": prompt}
    body |= {"logprobs": True, "top_logprobs": how.top_logprobs} if how.top_logprobs is not None else {}
    return CHAT, {**body, "messages": [message.model_dump() for message in prompt]}


def renamed(body: Json) -> Json:
    """Return a body in which the limit of the answer has its newer name."""
    return {NEWER if name == "max_tokens" else name: value for name, value in body.items()}


def text_reserve(prompt: Prompt, how: Sampling, spec: EndpointSpec) -> float:
    """Return the most that a request can cost: a token is a byte or more, and so many may come back."""
    parts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    sent = sum(len(part.encode("utf-8", "surrogatepass")) + OVERHEAD for part in parts)
    return price(spec, sent, how.max_new_tokens)


def price(spec: EndpointSpec, tokens_in: int, tokens_out: int) -> float:
    """Return the price of so many tokens."""
    return (tokens_in * (spec.price_in or 0.0) + tokens_out * (spec.price_out or 0.0)) / 1e6


def completion(path: str, answer: Json) -> Completion:
    """Return what an answer says, of either kind. Raises KeyError and its like where it says nothing."""
    choice = answer["choices"][0]
    chat = path == CHAT
    text = (choice["message"].get("content") or "") if chat else choice["text"]
    if not isinstance(text, str):
        raise NotUsable("a text that is no text")
    told = choice.get("logprobs")
    tokens = () if told is None else tuple(_chat_tokens(told) if chat else _tokens(told))
    tokens_in, tokens_out = usage(answer)
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Completion(text, "length" if finish == "length" else "stop", tokens, tokens_in or 0, tokens_out or 0)


def usage(answer: Json) -> tuple[int | None, int | None]:
    """Return the tokens that went in and came out, where the answer tells."""
    told = answer.get("usage")
    if not isinstance(told, dict):
        return None, None
    counts = [told.get(name) for name in ("prompt_tokens", "completion_tokens")]
    one, two = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return one, two


def paid(answer: Json, text: str, spec: EndpointSpec) -> Sent:
    """Return what the ledger keeps of an answer; where no usage is told, it has cost the reserve."""
    tokens_in, tokens_out = usage(answer)
    known = tokens_in is not None and tokens_out is not None
    cost = price(spec, tokens_in or 0, tokens_out or 0) if known else None
    return Sent(text, tokens_in, tokens_out, cost)


def _tokens(told: Json) -> list[Token]:
    tops = told.get("top_logprobs") or [{}] * len(told["tokens"])
    rows = zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    return [
        Token(str(text), float(value), {name: float(p) for name, p in (top or {}).items()}) for text, value, top in rows
    ]


def _chat_tokens(told: Json) -> list[Token]:
    return [
        Token(
            item["token"],
            float(item["logprob"]),
            {top["token"]: float(top["logprob"]) for top in item.get("top_logprobs") or ()},
        )
        for item in told.get("content") or ()
    ]


# --- classifiers ----------------------------------------------------------------------------------------------------


def predict_body(model: str, example: str | np.ndarray[Any, Any]) -> tuple[Json, Json]:
    """Return the body to send for one text or image, and the one to keep, in which an image is its digest."""
    if isinstance(example, str):
        body: Json = {"model": model, "texts": [example]}
        return body, body
    pixels = np.ascontiguousarray(example, dtype=np.uint8)
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    encoded = base64.b64encode(png(pixels)).decode("ascii")
    return {"model": model, "images": [encoded]}, {"model": model, "images": [f"sha256:{digest}"]}


def prediction(answer: Json) -> Prediction:
    """Return what an answer of `/predict` says of its one example."""
    names = [str(name) for name in answer["classes"]]
    if answer.get("probabilities") is None:
        label = str(answer["labels"][0])
        if label not in names:
            raise NotUsable(f"a label that is none of its classes: {label[:50]!r}")
        return Prediction(label, None)
    row = [float(value) for value in answer["probabilities"][0]]
    if len(row) != len(names) or not all(math.isfinite(p) and p >= 0 for p in row) or abs(sum(row) - 1) > 1e-3:
        raise NotUsable("probabilities that are none")
    return Prediction(names[row.index(max(row))], dict(zip(names, row, strict=True)))


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Return a uint8 image, (height, width) or (height, width, 3), as a PNG file."""
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    rows = pixels.reshape(height, -1)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()  # no filter before each row
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def classes_of(told: Any) -> dict[str, int] | None:
    """Return class indices by name from what an endpoint says of itself: a list, or a mapping to indices."""
    if isinstance(told, Sequence) and not isinstance(told, str):
        return {str(name): index for index, name in enumerate(told)}
    if isinstance(told, dict) and all(isinstance(index, int) for index in told.values()):
        return {str(name): index for name, index in sorted(told.items(), key=lambda item: item[1])}
    return None


def image_of(told: Any) -> ImageSpec | None:
    """Return what an endpoint says that its images are like, where it does."""
    try:
        return None if told is None else ImageSpec.model_validate(told)
    except ValidationError:
        return None
