"""Rows of data: what to read (`DataSpec`), how to read it (`read`), what comes out (`Rows`).

    rows = read("reviews.csv")
    rows = read(DataSpec(path="mnist.npz", split="train", part="held_out", rotate=90))

What a row is for follows from its columns, whatever file it came from:

    text                         a document or a paragraph
    prompt, completion           an instruction and its answer; also made from Alpaca's instruction, input, output
    text, label                  a text and its class
    image, label                 a uint8 image, (height, width) or (height, width, 3), and its class

| module        | what it does                                                               |
|---------------|----------------------------------------------------------------------------|
| `_spec.py`    | `DataSpec`, what a recipe or a command line says about data                |
| `_rows.py`    | `Rows`: columns, places for messages, splits by content, digest            |
| `_read.py`    | `read`: find the format, read, name the columns, select, transform         |
| `_text.py`    | jsonl, json, csv, tsv, text, label-text                                    |
| `_images.py`  | npz, image folders; rotate and invert                                      |
| `_library.py` | data that comes with a Python package, and Hugging Face data sets          |
| `_columns.py` | the column conventions above                                               |
| `_check.py`   | how problems are worded and counted                                        |

Importing this package imports pydantic only: recipes and commands name data long before anybody reads it.
"""

from typing import TYPE_CHECKING, Any

from lfm.data._spec import DataSpec, Format, Part

if TYPE_CHECKING:
    from lfm.data._read import read
    from lfm.data._rows import Column, Kind, Rows

__all__ = ["Column", "DataSpec", "Format", "Kind", "Part", "Rows", "read"]

_READING = {"read": "lfm.data._read", **dict.fromkeys(("Column", "Kind", "Rows"), "lfm.data._rows")}


def __getattr__(name: str) -> Any:
    """Import what reads data when it is asked for: it needs numpy, which takes longer to import than a help page."""
    if name not in _READING:
        raise AttributeError(f"module 'lfm.data' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_READING[name]), name)
