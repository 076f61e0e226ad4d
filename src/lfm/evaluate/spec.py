"""What a recipe or command asks to be measured. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lfm.data import DataSpec


def _by_name(value: Any) -> Any:
    """Accept one data set, a list of them, or a mapping from name to data set."""
    if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
        value = [value]
    if isinstance(value, list):
        return {_stem(item): item for item in value}
    return value


def _stem(item: Any) -> str:
    path = item.get("path", "data") if isinstance(item, dict) else str(item)
    return Path(path).stem or str(path)


class Harness(BaseModel):
    """Tasks of the evaluation harness (lm-eval), an optional package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: list[str] = Field(description="Names of lm-eval tasks.", min_length=1)
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples in the prompt; the task's own number if left out."
    )
    limit: int | None = Field(None, ge=1, description="Examples of each task, for a quick look.")
    batch_size: int = Field(8, ge=1, description="Requests at a time.")
    include_path: str | None = Field(None, description="Folder with task files of your own.")


DataSets = Annotated[
    dict[str, DataSpec],
    BeforeValidator(_by_name, json_schema_input_type=DataSpec | list[DataSpec] | dict[str, DataSpec]),
]


class Evaluate(BaseModel):
    """Which measures on which data, of which models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: DataSets = Field({}, description="Classifiers: accuracy, NLL and calibration error on labelled data.")
    perplexity: DataSets = Field({}, description="Language models: perplexity per token and per character on text.")
    drift: DataSets = Field({}, description="KL divergence from the baseline, and agreement with it, on any data.")
    harness: Harness | None = Field(None, description="lm-eval tasks, for language models.")
    compare: list[str] | None = Field(None, description="Models and steps to measure; all of them if left out.")
    baseline: str | None = Field(None, description="The row that others are compared with; the first if left out.")
    length: int = Field(256, ge=8, description="Tokens per window of text.")
    batch_size: int = Field(64, ge=1, description="Examples (or windows) at a time.")
