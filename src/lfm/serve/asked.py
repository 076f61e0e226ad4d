"""What a request may say: OpenAI's names and defaults. What is not done is refused, never passed over."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lfm.models.text import Message, Prompt, Role, Sampling

MOST = 128  # answers to one request
# Who asks and what for: nothing that an answer depends on.
NOTED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# What is not done, and the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
OF_A_TURN: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
}


def _only_what_is_done(given: Any, not_done: dict[str, tuple[Any, ...]]) -> Any:
    """Take out what asks for nothing; raise for what asks for something that is not done."""
    if not isinstance(given, dict):
        return given
    left = {name: value for name, value in given.items() if value is not None and name not in NOTED}
    wrong = [name for name, neutral in not_done.items() if name in left and left[name] not in neutral]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not done by this server; leave it out")
    return {name: value for name, value in left.items() if name not in not_done}


class StreamOptions(BaseModel):
    """How an answer comes in pieces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(BaseModel):
    """What requests for text have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=MOST)
    stop: str | list[str] = Field([], max_length=16)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        return _only_what_is_done(given, NOT_DONE)

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, value: str | list[str]) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if not all(stops):
            raise ValueError("an empty text ends every answer before it begins; leave it out")
        return stops

    def sampling(self, most: int, top_logprobs: int | None) -> Sampling:
        """Return how the answers are to be written."""
        return Sampling(
            max_new_tokens=most,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop),
            seed=self.seed,
            top_logprobs=top_logprobs,
        )


class AskedCompletion(Asked):
    """`POST /v1/completions`."""

    prompt: str | list[str] = Field(min_length=0)
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt_is_text(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        if not items or len(items) > MOST:
            raise ValueError(f"takes 1 to {MOST} prompts, got {len(items)}")
        if not all(isinstance(item, str) for item in items):
            raise ValueError("takes a text or a list of texts; lists of token ids are not done by this server")
        return value

    @property
    def prompts(self) -> list[Prompt]:
        """Each prompt as often as it is to be answered."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [text for text in texts for _ in range(self.n)]

    @property
    def top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def most(self) -> int | None:
        return self.max_tokens


class TextPart(BaseModel):
    """A piece of a turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role | Literal["developer"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        return _only_what_is_done(given, OF_A_TURN)

    @property
    def message(self) -> Message:
        """The turn as models take it; `developer` is the newer name of `system`."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class AskedChat(Asked):
    """`POST /v1/chat/completions`."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    number_of_top: int | None = Field(None, ge=0, le=20, alias="top_logprobs")

    @model_validator(mode="after")
    def _fits_together(self) -> AskedChat:
        if self.number_of_top is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens are two names of one thing; give one")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation as often as it is to be answered."""
        return [[turn.message for turn in self.messages]] * self.n

    @property
    def top_logprobs(self) -> int | None:
        return (self.number_of_top or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
