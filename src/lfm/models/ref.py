"""How a recipe, a command or a call names a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class ModelRef(BaseModel):
    """A model: one that exists (`ref`), one that is made from a config (`config`), or a plain module's weights.

    A string is short for `{ref: <string>}`: a name of the recipe, a folder, `org/name[@revision]`, `base+adapter`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ref: str | None = Field(None, description="Name in the recipe, folder, org/name[@revision], base+adapter.")
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

    def __hash__(self) -> int:
        return hash(self.ref or self.module)  # `arguments` and `config` may hold dictionaries

    @property
    def label(self) -> str:
        """The model's short name for tables and messages."""
        return self.ref or self.module or "new model"
