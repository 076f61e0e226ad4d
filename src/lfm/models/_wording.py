"""From prompts to tokens and from tokens to text, piece by piece, with stop texts cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lfm.errors import RequestError
from lfm.models._surroundings import first_line
from lfm.models.text import Prompt

BROKEN = "\ufffd"  # what decoding gives for bytes that are no character (yet)
TAIL = 8  # tokens of the prompt that new ones are decoded behind: some tokenizers drop a text's first space


class Reader(Protocol):
    """Gives the text of tokens one by one; a character of several tokens comes out with the last of them."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Wording(Protocol):
    """How prompts become tokens, and tokens become text."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together that are taken at most, where there is a limit."""
        ...

    def encode(self, prompt: Prompt) -> list[int]: ...

    def reader(self, prompt: Sequence[int]) -> Reader: ...

    def text_of(self, token: int) -> str: ...


class TokenizerWording:
    """The wording of a transformers tokenizer."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], context: int | None) -> None:
        self._tokenizer = tokenizer
        self.ends = ends
        self.context = context
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        self._texts: dict[int, str] = {}

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens; a conversation goes through the tokenizer's chat template."""
        ids = self._plain(prompt) if isinstance(prompt, str) else self._conversation(prompt)
        if not ids:
            raise RequestError("an empty prompt is nothing to go on from: the tokenizer marks no beginning")
        return ids

    def _plain(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
        return ids

    def _conversation(self, messages: Sequence[Any]) -> list[int]:
        if not messages:
            raise RequestError("a conversation without a message is nothing to answer")
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("the model's tokenizer has no chat template, so it answers no conversation; ask by text")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program, which raises what it likes
            raise RequestError(f"the chat template does not take this conversation: {first_line(error)}") from error
        return ids

    def reader(self, prompt: Sequence[int]) -> Reader:
        return TokenReader(self._decode, prompt)

    def text_of(self, token: int) -> str:
        """Return one token's text as it stands inside a text; tokens that are no text show as they are called."""
        if token not in self._texts:
            before = self._decode(self._anchor, skip=False)
            self._texts[token] = self._decode([*self._anchor, token], skip=False)[len(before) :]
        return self._texts[token]

    def _decode(self, ids: Sequence[int], skip: bool = True) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text


class TokenReader:
    """Decodes new tokens behind those just before them, so that a long text costs no more than its length."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-TAIL:])
        self._start, self._read = 0, len(self._ids)

    def push(self, token: int) -> str:
        self._ids.append(token)
        before, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(whole) <= len(before) or whole.endswith(BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def flush(self) -> str:
        """Return what is left at the end, such as the first bytes of a character that was never finished."""
        before, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._start, self._read = self._read, len(self._ids)
        return whole[len(before) :]


class Tellable:
    """Text on its way out: what may be the beginning of a stop text waits until it is clear that it is none."""

    def __init__(self, stops: Sequence[str], tell: Callable[[str], None]) -> None:
        self._stops = stops
        self._tell = tell
        self._waiting = ""
        self._told: list[str] = []
        self._length = 0  # characters told

    @property
    def text(self) -> str:
        """What has been told, whole."""
        return "".join(self._told)

    @property
    def length(self) -> int:
        """Characters told or waiting."""
        return self._length + len(self._waiting)

    def push(self, piece: str) -> bool:
        """Take more text; returns whether a stop text ended it, which is cut off with all that follows."""
        self._waiting += piece
        ends = [at for stop in self._stops if (at := self._waiting.find(stop)) >= 0]
        if ends:
            self._out(min(ends))
            self._waiting = ""
            return True
        self._out(len(self._waiting) - max(map(self._begun, self._stops), default=0))
        return False

    def finish(self) -> None:
        """Tell what still waits."""
        self._out(len(self._waiting))

    def _begun(self, stop: str) -> int:
        """Return how many of the last characters are the first ones of `stop`."""
        longest = min(len(stop) - 1, len(self._waiting))
        return next((count for count in range(longest, 0, -1) if self._waiting.endswith(stop[:count])), 0)

    def _out(self, count: int) -> None:
        piece, self._waiting = self._waiting[:count], self._waiting[count:]
        if piece:
            self._told.append(piece)
            self._length += len(piece)
            self._tell(piece)
