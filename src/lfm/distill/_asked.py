"""A teacher that is asked, counted and remembered: every input is paid once, also by a run that is killed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm.distill._contract import Space
from lfm.errors import BudgetError
from lfm.method import Access
from lfm.models.encode import Batch
from lfm.models.endpoint import RawEncoder
from lfm.models.handle import Model

LEVELS = 255  # of an image of 8 bits


class Asked:
    """A teacher behind a counter that holds it to a limit.

    Answers are written down as they come. A run that is taken up says how many it had in its saved state (`go_on`), and
    is then told from the record what was answered after that, as long as it asks the same; nothing is asked again.
    """

    def __init__(self, teacher: Model, limit: int, folder: Path, space: Space) -> None:
        self.soft = teacher.access >= Access.PROBS
        self.classes = len(teacher.encoder.classes or ())
        self.count = 0
        self.limit = limit
        self._teacher = teacher
        self._space = space
        self._record = Record(folder)

    @property
    def left(self) -> int:
        """Inputs that may still be asked about."""
        return self.limit - self.count

    def go_on(self, count: int) -> None:
        """Go on from a state in which so many inputs had been asked about."""
        self.count = count
        self._record.open(count)

    def saved(self) -> None:
        """Note that a state is being saved: what was recorded before the last one is needed no more."""
        self._record.turn(self.count)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (n, classes) of normalised images; of a teacher of labels 0 and minus infinity.

        Raises BudgetError, and asks nothing, where that would be more than the limit.
        """
        if len(images) > self.left:
            raise BudgetError(
                f"{self._teacher.label}: {len(images):,} inputs more than the {self.count:,} that were asked about "
                f"would exceed the {self.limit:,} allowed (queries)"
            )
        if not len(images):
            return torch.zeros(0, self.classes, device=images.device)
        digest = hashlib.sha256(images.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        answer = self._record.known(self.count, digest)
        if answer is None:
            answer = self._answers(images.detach())
            self._record.write(self.count, digest, answer)
        self.count += len(images)
        return self._log_probs(answer).to(images.device)

    def _answers(self, images: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (n, classes) or labels (n, 1), as numbers."""
        batch: Batch = {"pixel_values": images}
        if isinstance(self._teacher.encoder, RawEncoder):
            batch = {"images": pictures(to_bytes(images, self._space))}
        if self.soft:
            return self._teacher.log_probs(batch).float().cpu()
        return self._teacher.labels(batch)[:, None].float().cpu()

    def _log_probs(self, answer: torch.Tensor) -> torch.Tensor:
        if self.soft:
            return answer
        return torch.full((len(answer), self.classes), -torch.inf).scatter_(1, answer.long(), 0.0)


class Record:
    """Answers on disk, in the order in which they were asked for. A new file is begun whenever a state is saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.open(0)

    def open(self, count: int) -> None:
        """Read what was answered after the first `count` inputs, at which a state is saved, and go on from there."""
        files = self._files()
        found = {place: (digest, answer) for file in files for place, digest, answer in _lines(file)}
        self._known = {place: answer for place, answer in found.items() if place >= count}
        self._saved = count
        self._file = files[-1] if files else self._named(count)

    def known(self, count: int, digest: str) -> torch.Tensor | None:
        """Return what was answered to these inputs at this place, if they were asked about."""
        found, answer = self._known.get(count, ("", None))
        return answer if found == digest else None

    def write(self, count: int, digest: str, answer: torch.Tensor) -> None:
        content = base64.b64encode(np.ascontiguousarray(answer.numpy(), dtype="<f4").tobytes()).decode("ascii")
        line = json.dumps({"after": count, "inputs": digest, "shape": list(answer.shape), "answer": content})
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # the line before may have been cut off

    def turn(self, count: int) -> None:
        """Begin a new file; drop those that end before the last saved state, which is whole by now."""
        files = self._files()
        for file, after in pairwise(files):
            if _start(after) <= self._saved:
                file.unlink()
        self._saved = count
        self._file = self._named(count)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("answers-*.jsonl"))

    def _named(self, count: int) -> Path:
        return self._folder / f"answers-{count:012d}.jsonl"


def _start(file: Path) -> int:
    return int(file.stem.partition("-")[2])


def _lines(file: Path) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield place, digest of the inputs, and answer of every line that is whole."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            told: dict[str, Any] = json.loads(line)
            values = np.frombuffer(base64.b64decode(told["answer"]), dtype="<f4").reshape(told["shape"])
        except (ValueError, KeyError):  # cut off when the run was killed
            continue
        yield told["after"], told["inputs"], torch.from_numpy(values.copy())


# --- images of 8 bits -----------------------------------------------------------------------------------------------


def to_bytes(images: torch.Tensor, space: Space) -> torch.Tensor:
    """Return normalised images as uint8, which is what files and endpoints hold."""
    low, high = space.low.to(images.device), space.high.to(images.device)
    return ((images - low) / (high - low) * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)


def of_bytes(images: torch.Tensor, space: Space, device: torch.device) -> torch.Tensor:
    """Return normalised images from uint8."""
    low, high = space.low.to(device), space.high.to(device)
    return low + images.to(device).float() / LEVELS * (high - low)


def pictures(images: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    """Return (height, width) or (height, width, 3) arrays from uint8 (n, channels, height, width)."""
    arrays = images.cpu().numpy()
    return [array[0] if len(array) == 1 else np.moveaxis(array, 0, -1) for array in arrays]
