"""`DataSpec`: what a recipe or a command line says about data."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

Part = Literal["all", "train", "held_out"]
Format = Literal["auto", "jsonl", "json", "csv", "tsv", "text", "label-text", "npz", "images", "datasets", "builtin"]


class DataSpec(BaseModel):
    """Which rows to read from where; a plain string is short for `{path: <string>}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        description="A file, a folder of images, `hf:org/name` or `hf:org/name:config` (Hugging Face datasets), "
        "`sklearn:digits` (handwritten digits), or `pydoc:topics` (Python's own help)."
    )
    format: Format = Field("auto", description="How the file is written; `auto` goes by its suffix, .txt being text.")
    split: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Which split: `train` reads x_train and y_train of an npz, or that split of a data set."
    )
    part: Part = Field(
        "all", description="Rows to keep: all, or one side of a split by content that never moves a row."
    )
    held_out: float = Field(0.1, gt=0, lt=1, description="Share of the rows that `part: held_out` keeps.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our name for a column: its name in the file, such as {text: review}."
    )
    limit: int | None = Field(None, ge=1, description="Keep the first so many rows, after everything else.")
    classes: Annotated[list[StrictInt | StrictStr], Field(min_length=1)] | None = Field(
        None, description="Keep the rows with these labels."
    )
    rotate: Literal[0, 90, 180, 270] = Field(0, description="Turn images counter-clockwise by so many degrees.")
    invert: bool = Field(False, description="Replace every value of an image by 255 minus it.")
    separator: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Where a text file is cut into rows; blank lines unless given."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": os.fspath(value)} if isinstance(value, (str, os.PathLike)) else value
