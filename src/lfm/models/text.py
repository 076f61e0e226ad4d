"""What models of text are asked, and what they answer: the same for one in memory and one behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["system", "user", "assistant", "tool"]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role = Field(description="Who speaks.")
    content: str = Field(description="What is said.")


Prompt = str | Sequence[Message]  # a text to go on from, or a conversation to answer


class Sampling(BaseModel):
    """How text is continued."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(64, ge=1, description="Tokens to write at most.")
    temperature: float = Field(0.0, ge=0, description="0 takes the most probable token; 1 samples as the model says.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the most probable tokens that hold this share.")
    top_k: int = Field(0, ge=0, description="Sample from this many most probable tokens; 0 for all.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that end the answer; they are not part of it."
    )
    seed: int | None = Field(None, description="Seed of the sampling.")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Return the log-probability of each token, and of this many most probable ones."
    )


@dataclass(frozen=True)
class Token:
    """One token of an answer: its text, its log-probability, and those of the most probable tokens at its place."""

    text: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True)
class Completion:
    """What a model wrote, without the prompt; `finish` is `length` where it was cut off."""

    text: str
    finish: Literal["stop", "length"]
    tokens: tuple[Token, ...] = ()  # where `top_logprobs` were asked for
    prompt_tokens: int = 0
    completion_tokens: int = 0
