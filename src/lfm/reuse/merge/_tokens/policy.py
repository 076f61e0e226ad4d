"""What a merge is told about tokens: the `tokenizer:` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SOURCES = ("same", "base", "union")


class Zero(BaseModel):
    """A row of zeros."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["zero"]


class Mean(BaseModel):
    """The mean of the rows of all other tokens, in each model its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean"]


class ModelToken(BaseModel):
    """The row that a model has for another token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["model_token"]
    model: str = Field(description="One of the models, as it is written in the step.")
    token: str | None = Field(None, description="Text of the token.")
    token_id: int | None = Field(None, ge=0, description="Or its id in that model.")

    @model_validator(mode="after")
    def _names_one_token(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("name the token by `token` or by `token_id`")
        return self


Row = Annotated[Zero | Mean | ModelToken, Field(discriminator="kind")]


class TokenRule(BaseModel):
    """Where the row of one token comes from; a token that the output does not have is added to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | Row | None = Field(
        None, description="For models that lack the token: one of the models, or a `kind`: zero, mean, model_token."
    )
    force: bool = Field(False, description="Take that row for models that have the token, too.")

    @model_validator(mode="after")
    def _forces_something(self) -> TokenRule:
        if self.force and self.source is None:
            raise ValueError("`force` needs a `source`")
        return self


class Tokenizer(BaseModel):
    """Which tokens the output has, and what stands in their rows.

    A string is short for `{source: ...}` where it is `same`, `base` or `union`, and for `{model: ...}` otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["same", "base", "union"] = Field(
        "same",
        description="`same`: all models must have one tokenizer. `base`: that of the base, or of the first model. "
        "`union`: the tokens of that one, then those that each further model adds.",
    )
    model: str | None = Field(None, description="The tokenizer of this one of the models.")
    tokens: dict[str, TokenRule] = Field({}, description="Rules for single tokens, by their text.")
    pad_to_multiple_of: int | None = Field(
        None, ge=1, description="Number of rows: the least such multiple. Left out: padding stays as it is."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"source": value}
        if isinstance(value, dict) and isinstance(source := value.get("source"), str) and source not in SOURCES:
            if "model" in value:
                raise ValueError("give `source` or `model`, not both")
            value = {**{key: item for key, item in value.items() if key != "source"}, "model": source}
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Tokenizer:
        if self.model is not None and "source" in self.model_fields_set:
            raise ValueError("give `source` or `model`, not both")
        return self
