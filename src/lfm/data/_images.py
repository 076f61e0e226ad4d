"""Images: npz archives and folders of pictures; turned and inverted."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm.data._check import choose_split, listed, refuse, require
from lfm.data._rows import Column, Rows
from lfm.errors import RequestError, plural

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Named, because Pillow also knows formats that start other programs.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
STACKS = ("x", "images", "jpeg")
LABELS = ("y", "labels")


def read_npz(path: Path, split: str | None) -> Rows:
    """Return the images of an npz archive, with their labels if it has any.

    Images are `x_<split>`, `images_<split>`, or JPEG bytes, image i being `jpeg_<split>[offsets[i]:offsets[i + 1]]`
    with `offsets_<split>`; labels are `y_<split>` or `labels_<split>`; without splits the names end before the `_`.
    Stacks are uint8 or bool, (n, h, w), (n, h, w, 1) or (n, h, w, 3); where labels have more than one axis, as in
    (character, drawer), so do the images, and both are flattened. Nothing in the file is ever unpickled.
    Raises RequestError for damaged files, other types and shapes, and lengths that do not fit.
    """
    with path.open("rb") as file, _opened(path, file) as archive:
        ending = _ending(path, split, archive.files)
        stack = next(name + ending for name in STACKS if name + ending in archive.files)
        label = next((name + ending for name in LABELS if name + ending in archive.files), None)
        images = _array(path, archive, stack)
        labels = None if label is None else _whole(f"{path}: {label}", _array(path, archive, label))
        offsets = _array(path, archive, f"offsets{ending}") if stack.startswith("jpeg") else None
    axes = 1 if labels is None else labels.ndim
    shape = images.shape[:axes] if offsets is None else (max(offsets.size - 1, 0),)
    if labels is not None and labels.shape != shape:
        counts = f"{stack} has {_by(shape)} images, {label} has {_by(labels.shape)} labels"
        raise RequestError(f"{path}: lengths differ: {counts}; give each image one label")
    place = f"{path}: {stack}"
    column = _flat(place, images, axes) if offsets is None else _from_jpeg(place, images, offsets)
    columns = {"image": column} if labels is None else {"image": column, "label": labels.reshape(-1)}
    return Rows(columns, str(path))


def read_folder(path: Path) -> Rows:
    """Return the pictures in `<folder>/<class>/`, sorted by class and name, labelled by class.

    Grey pictures become (h, w), others (h, w, 3); all get three channels as soon as one has. Pictures of different
    sizes stay a list. Raises RequestError where there are no classes, a class is empty, or a picture is damaged.
    """
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        found = plural(len(_pictures(path)), "picture")
        raise RequestError(f"{path}: no classes: expected <folder>/<class>/<picture>, got {found} and no folders")
    pictures = {folder: _pictures(folder) for folder in folders}
    empty = [folder for folder in folders if not pictures[folder]]
    refuse(
        [f"{folder}: no pictures of this class; add {', '.join(SUFFIXES)}, or remove the folder" for folder in empty]
    )
    files = [file for folder in folders for file in pictures[folder]]
    images = _decoded_all(files, [str(file) for file in files])
    return Rows({"image": images, "label": [file.parent.name for file in files]}, str(path))


def transformed(rows: Rows, rotate: int, invert: bool) -> Rows:
    """Return rows with images turned counter-clockwise and inverted, on the same side of a split as before."""
    if not rotate and not invert:
        return rows
    if "image" not in rows.columns:
        key = f"rotate: {rotate}" if rotate else "invert: true"
        raise RequestError(f"{rows.origin}: {key} is for images, got rows of {listed(rows.columns)}; leave it out")
    images = rows.columns["image"]
    if isinstance(images, np.ndarray):
        changed: Column = _changed(images, rotate, invert, first_axis=1)
    else:
        changed = [_changed(image, rotate, invert, first_axis=0) for image in images]
    return replace(rows, columns={**rows.columns, "image": changed}, split_keys=rows.keys)


def image_array(picture: Any) -> NDArray[np.uint8]:
    """Return a Pillow image as uint8: (h, w) if it is grey, (h, w, 3) otherwise."""
    return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"), dtype=np.uint8)


def stacked(images: Sequence[NDArray[np.uint8]]) -> Column:
    """Return one array if all images have the same size, else the list of them."""
    if len({image.ndim for image in images}) > 1:
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    return np.stack(images) if len({image.shape for image in images}) == 1 else list(images)


def _changed(images: NDArray[np.uint8], rotate: int, invert: bool, first_axis: int) -> NDArray[np.uint8]:
    turned = np.ascontiguousarray(np.rot90(images, rotate // 90, axes=(first_axis, first_axis + 1)))
    return 255 - turned if invert else turned


def _pictures(folder: Path) -> list[Path]:
    shown = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry for entry in shown if entry.suffix.lower() in SUFFIXES and entry.is_file())


def _decoded_all(sources: Sequence[Path | bytes], places: Sequence[str]) -> Column:
    """Return the images in files or bytes; raise RequestError naming the places of all that are damaged."""
    pillow = require("PIL.Image", "pillow", "reading pictures")
    images, problems = [], []
    for source, place in zip(sources, places, strict=True):
        try:
            opened = io.BytesIO(source) if isinstance(source, bytes) else source
            with pillow.open(opened, formats=PILLOW_FORMATS) as picture:
                images.append(image_array(picture))
        except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, ...
            problems.append(f"{place}: not a picture that can be read: {type(error).__name__}; replace or remove it")
    refuse(problems)
    return stacked(images)


def _opened(path: Path, file: Any) -> Any:
    if not zipfile.is_zipfile(file):
        raise RequestError(f"{path}: not an npz archive, or cut off: no zip directory; write it with numpy.savez")
    file.seek(0)
    try:
        return np.load(file, allow_pickle=False)
    except Exception as error:  # see _array
        raise RequestError(f"{path}: not an npz archive: {error}; write it with numpy.savez") from error


def _array(path: Path, archive: Any, name: str) -> NDArray[Any]:
    if name not in archive.files:
        raise RequestError(f"{path}: no array {name!r}, it has {listed(archive.files)}")
    try:
        array = archive[name]
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds of errors for damaged or pickled arrays
        raise RequestError(f"{path}: {name}: cannot be read: {error}; write plain arrays with numpy.savez") from error
    if not isinstance(array, np.ndarray):
        raise RequestError(f"{path}: {name}: not an array; write it with numpy.savez")
    return array


def _ending(path: Path, split: str | None, names: Sequence[str]) -> str:
    """Return what the names of a split's arrays end in: `_train`, or nothing where there are no splits."""
    if split is None and any(name in STACKS for name in names):
        return ""
    found = [name.partition("_") for name in names]
    splits = dict.fromkeys(ending for stem, _, ending in found if stem in STACKS and ending)
    if splits:
        return f"_{choose_split(str(path), split, splits)}"
    if any(name in STACKS for name in names):
        raise RequestError(f"{path}: has no splits, got split: {split}; leave it out")
    expected = "x_train and y_train, images and labels, or jpeg_train, offsets_train and y_train"
    raise RequestError(f"{path}: no images: expected arrays such as {expected}, got {listed(names) or 'none'}")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "no"


def _whole(place: str, labels: NDArray[Any]) -> NDArray[Any]:
    """Return labels as int64, or as they are if they are text."""
    fits = labels.dtype.kind in "bi" or (labels.dtype.kind == "u" and not (labels > np.iinfo(np.int64).max).any())
    if labels.ndim == 0 or not (fits or labels.dtype.kind == "U"):
        raise RequestError(f"{place}: expected an array of whole numbers or text, got {labels.dtype} {labels.shape}")
    return labels.astype(np.int64) if fits else labels


def _flat(place: str, images: NDArray[Any], axes: int) -> NDArray[np.uint8]:
    """Return images as uint8 with their first `axes` axes made one."""
    if images.dtype not in (np.uint8, np.bool_):
        raise RequestError(f"{place}: expected uint8 images, 0 to 255, got {images.dtype}; convert and save them again")
    size = images.shape[axes:]
    if len(size) not in (2, 3) or (len(size) == 3 and size[2] not in (1, 3)) or 0 in size:
        expected = "(n, height, width) or (n, height, width, 3)"
        raise RequestError(f"{place}: expected images of shape {expected}, got {images.shape}")
    flat = images.reshape(int(np.prod(images.shape[:axes])), *(size[:2] if size[2:] == (1,) else size))
    return flat.astype(np.uint8) * 255 if images.dtype == np.bool_ else flat


def _from_jpeg(place: str, raw: NDArray[Any], offsets: NDArray[Any]) -> Column:
    if raw.dtype != np.uint8 or raw.ndim != 1:
        raise RequestError(f"{place}: expected the bytes of all images, uint8 (bytes,), got {raw.dtype} {raw.shape}")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        got = f"{offsets.dtype} {offsets.shape}"
        raise RequestError(f"{place}: expected whole-number offsets, one more than there are images, got {got}")
    if offsets.min() < 0 or offsets.max() > len(raw):
        reach = f"{offsets.min():,} to {offsets.max():,}"
        raise RequestError(f"{place}: offsets must lie in 0 to {len(raw):,}, the bytes there are, got {reach}")
    bounds = offsets.tolist()
    falling = next((index for index in range(len(bounds) - 1) if bounds[index] > bounds[index + 1]), None)
    if falling is not None:
        got = f"{bounds[falling]:,} then {bounds[falling + 1]:,} at image {falling:,}"
        raise RequestError(f"{place}: offsets must never fall, got {got}")
    pieces = [raw[start:stop].tobytes() for start, stop in pairwise(bounds)]
    return _decoded_all(pieces, [f"{place}[{index}]" for index in range(len(pieces))])
