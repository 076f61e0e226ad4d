"""How a recipe, a command or a call names a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lfm.method import Access
from lfm.models.defence import Defence

DEFAULT_KEY = "OPENAI_API_KEY"
Task = Literal["causal-lm", "masked-lm", "text-classification", "image-classification"]


class ImageSpec(BaseModel):
    """What an image model takes: the size and channels of its input, and how pixels are normalised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(description="Height and width in pixels; images of another size are resized (bilinear).", ge=1)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour; grey images are repeated three times.")
    mean: tuple[float, ...] = Field((0.5,), description="Per channel, subtracted from pixels in [0, 1].")
    std: tuple[float, ...] = Field((0.5,), description="Per channel, by which the difference is divided.")

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> ImageSpec:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values; give 1 or {self.channels}, one for each channel")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {min(self.std)}")
        return self


class EndpointSpec(BaseModel):
    """How an endpoint is spoken to. Its key is named, never given: it stays in the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    api: Literal["auto", "chat", "completions"] = Field(
        "auto", description="`auto` sends texts to /completions, where there is one, and conversations to chat."
    )
    key: str = Field(
        DEFAULT_KEY,
        description="Environment variable that holds the key; none is sent where it is empty, or the default not set.",
    )
    price_in: float | None = Field(None, ge=0, description="Price of a million tokens that are sent.")
    price_out: float | None = Field(None, ge=0, description="Price of a million tokens that come back.")
    timeout: float = Field(120.0, gt=0, description="Seconds that one request may take.")
    concurrency: int = Field(8, ge=1, le=256, description="Requests under way at a time.")
    retries: int = Field(5, ge=0, le=100, description="How often a request that failed is sent again.")
    backoff: float = Field(0.5, gt=0, description="Seconds before it is sent again, doubled each time, with chance.")

    @field_validator("key")
    @classmethod
    def _names_a_variable(cls, value: str) -> str:
        if value and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "must be the name of an environment variable, in capitals (such as OPENAI_API_KEY); "
                "the key itself has no place here"
            )
        return value


AccessName = Literal["labels", "probs", "logits", "gradients", "weights"]


class ModelRef(BaseModel):
    """A model: one that exists (`ref`), one that is made from a config (`config`), or a plain module's weights.

    A string is short for `{ref: <string>}`: a name of the recipe, a folder, `org/name[@revision]`, `base+adapter`,
    `http://host/v1#model`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    ref: str | None = Field(
        None, description="Name in the recipe, folder, org/name[@revision], base+adapter, http://host/v1#model."
    )
    config: str | dict[str, Any] | None = Field(
        None, description="Make a new model from this transformers config (a file, or its content)."
    )
    tokenizer: str | None = Field(
        None,
        description="Folder or hub name of the tokenizer, where the model brings none; `bytes` for plain UTF-8 bytes.",
    )
    module: str | None = Field(
        None, description="Code that builds a plain torch module: `path/file.py:function` or `package.module:function`."
    )
    arguments: dict[str, Any] = Field({}, description="Arguments of that function.")
    task: Task | None = Field(None, description="What the model is for, where its config does not say.")
    image: ImageSpec | None = Field(None, description="What a plain image module takes as input.")
    access: AccessName | None = Field(
        None, description="Use no more of the model than this; endpoints offer labels, or probs where this says so."
    )
    endpoint: EndpointSpec | None = Field(None, description="How an endpoint is spoken to.")
    defence: Defence | None = Field(
        None, description="Use no more than this leaves of its probabilities: what `lfm serve` would tell with it."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"ref": str(value)} if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _names_something(self) -> ModelRef:
        if not (self.ref or self.config or self.module):
            raise ValueError("name a model: `ref` (existing), `config` (new), or `module` (plain torch code)")
        if self.config and (self.ref or self.module):
            raise ValueError("`config` makes a new model; it does not go with `ref` or `module`")
        return self

    @model_validator(mode="after")
    def _endpoint_is_whole(self) -> ModelRef:
        if not self.is_endpoint:
            if self.endpoint is not None:
                raise ValueError("`endpoint` goes with a `ref` such as http://host/v1#model")
            return self
        parts = urlsplit(str(self.ref))
        if "@" in parts.netloc:
            raise ValueError("an endpoint's address holds no password; name a variable: `endpoint: {key: VARIABLE}`")
        if not parts.hostname or not parts.fragment or parts.query:
            raise ValueError("an endpoint is written http://host/v1#model, with nothing in between")
        if self.access not in (None, "labels", "probs"):
            raise ValueError(f"an endpoint offers labels or probs, not {self.access}")
        if self.module or self.image:
            raise ValueError("an endpoint brings its own code; leave out `module` and `image`")
        return self

    @property
    def is_endpoint(self) -> bool:
        """Whether the model is behind an HTTP endpoint."""
        return self.ref is not None and self.ref.startswith(("http://", "https://"))

    @property
    def offers(self) -> Access:
        """The most that may be asked of the model."""
        found = Access.LABELS if self.is_endpoint else Access.WEIGHTS
        if self.access is not None:
            found = Access[self.access.upper()]
        return found if self.defence is None else min(found, Access.PROBS)

    def __hash__(self) -> int:
        return hash(self.ref or self.module)  # `arguments` and `config` may hold dictionaries

    @property
    def label(self) -> str:
        """The model's short name for tables and messages."""
        return self.ref or self.module or "new model"
