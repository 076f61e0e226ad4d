"""How answers look: OpenAI's completions and chat completions, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lfm.models.text import Completion, Token

Kind = Literal["chat", "completions"]
BROKEN = "\ufffd"
LEAST = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True)
class Form:
    """The form of the answers to one request."""

    kind: Kind
    model: str
    prompts: int  # texts to answer, each of them `n` times
    n: int
    logprobs: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, made: Sequence[Completion]) -> dict[str, Any]:
        """Return the body that holds all answers."""
        choices = [self._choice(index, completion) for index, completion in enumerate(made)]
        return self._head("chat.completion") | {"choices": choices, "usage": self.usage(made)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the piece that opens an answer, where there is one: it says who speaks."""
        return self._piece(index, {"role": "assistant", "content": ""}) if self.kind == "chat" else None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return a piece of an answer."""
        return self._piece(index, {"content": text} if self.kind == "chat" else text)

    def last(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return the piece that ends an answer: why, and the log-probabilities of all its tokens."""
        found = self._piece(index, {} if self.kind == "chat" else "")
        found["choices"][0] |= {"finish_reason": completion.finish, "logprobs": self._logprobs(completion)}
        return found

    def counted(self, made: Sequence[Completion]) -> dict[str, Any]:
        """Return the piece that says how many tokens it took."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage(made)}

    def usage(self, made: Sequence[Completion]) -> dict[str, int]:
        read = sum(completion.prompt_tokens for completion in made[:: self.n])
        written = sum(completion.completion_tokens for completion in made)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _head(self, chat: str) -> dict[str, Any]:
        name, prefix = (chat, "chatcmpl") if self.kind == "chat" else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _choice(self, index: int, made: Completion) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": made.text}} if self.kind == "chat" else {"text": made.text}
        return {"index": index, **said, "logprobs": self._logprobs(made), "finish_reason": made.finish}

    def _piece(self, index: int, what: Any) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.kind == "chat" else "text": what}
        return self._head("chat.completion.chunk") | {"choices": [choice | {"logprobs": None, "finish_reason": None}]}

    def _logprobs(self, made: Completion) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return _of_chat(made.tokens) if self.kind == "chat" else _of_completions(made.tokens)


def _of_chat(tokens: Sequence[Token]) -> dict[str, Any]:
    content = [
        _told(token.text, token.logprob) | {"top_logprobs": [_told(*item) for item in token.top.items()]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _told(text: str, logprob: float) -> dict[str, Any]:
    whole = BROKEN not in text  # the bytes of half a character cannot be told from its text
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode()) if whole else None}


def _of_completions(tokens: Sequence[Token]) -> dict[str, Any]:
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token.text))
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": [{text: max(value, LEAST) for text, value in token.top.items()} for token in tokens],
        "text_offset": starts[:-1],
    }


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
