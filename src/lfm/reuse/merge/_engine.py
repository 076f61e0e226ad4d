"""Runs any merge: compares headers, streams every tensor through the method in chunks, on worker threads.

Memory is bounded by the chunk, not by the model; the bytes written do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from lfm.checkpoint import Checkpoint, OutputFolder, Spec, TensorWriter, torch_dtype
from lfm.errors import LfmError, plural
from lfm.progress import Progress
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.reuse.merge._contract import Chunk, Inputs, Merge

CHUNK = (
    1 << 18
)  # elements; a chunk of each of four models in float32 fits a core's cache. A multiple of 8 (see _Random)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Item = TypeVar("Item")
Answer = TypeVar("Answer")


# --- planning, from headers -----------------------------------------------------------------------------------------


def plan(method: Merge, inputs: Inputs, context: Context) -> StepPlan:
    """Return what merging will read, write and take, and everything that speaks against it."""
    problems = _request_problems(method, inputs)
    *sources, last = context.outlines([*inputs.models, *([inputs.base] if inputs.base else [])])
    base = last if inputs.base else None
    sources += [] if base else [last]
    reference = base or sources[0]
    for other in sources if base else sources[1:]:
        problems += _differences(reference, other)
    output = replace(reference, specs=_output_specs(reference.specs, inputs.dtype))
    reads = sum(outline.nbytes for outline in (*sources, *([base] if base else [])))
    held = context.settings.threads * CHUNK * 4 * (2 * len(sources) + 3)
    notes = (
        []
        if base is None or method.needs.base
        else [f"{type(method).__name__} does not use a base; it gives the config"]
    )
    return StepPlan(output, reads, output.nbytes, held, tuple(problems), tuple(notes))


def _request_problems(method: Merge, inputs: Inputs) -> list[str]:
    name, (low, high), got = type(method).__name__, method.needs.sources, len(inputs.models)
    problems = []
    if got < low or (high is not None and got > high):
        wanted = plural(low, "model") if low == high else f"{low} or more models"
        problems.append(f"{name} takes {wanted}, got {got}")
    if method.needs.base and inputs.base is None:
        problems.append(f"{name} needs a base (--base), the model that the sources were tuned from")
    if inputs.weights is not None and not method.weighted:
        problems.append(f"{name} takes no weights")
    elif inputs.weights is not None and len(inputs.weights) != got:
        problems.append(
            f"{plural(got, 'model')} and {plural(len(inputs.weights), 'weight')}: give one weight for each model"
        )
    elif inputs.weights is not None and not np.isfinite(inputs.weights).all():
        problems.append(f"weights must be finite numbers, got {inputs.weights}")
    elif getattr(method, "normalize", False) and inputs.weights is not None and sum(inputs.weights) == 0:
        problems.append("weights that sum to 0 cannot be normalised")
    return problems


def _differences(reference: Outline, other: Outline) -> list[str]:
    """Return what keeps two models from being combined tensor by tensor, the first few of each kind."""
    one, two = reference.ref.label, other.ref.label
    absent = [f"{two}: tensor {name!r} is missing; {one} has it" for name in reference.specs if name not in other.specs]
    extra = [f"{two}: tensor {name!r} is not in {one}" for name in other.specs if name not in reference.specs]
    shapes = [
        f"{two}: tensor {name!r} is {other.specs[name]}, in {one} it is {spec}"
        for name, spec in reference.specs.items()
        if name in other.specs and not spec.same_as(other.specs[name])
    ]
    problems = [line for lines in (absent, extra, shapes) for line in _first(lines)]
    if reference.vocabulary and other.vocabulary and reference.vocabulary != other.vocabulary:
        moved = sum(other.vocabulary.get(token) != index for token, index in reference.vocabulary.items())
        problems.append(
            f"{two}: its tokenizer differs from that of {one} ({plural(moved, 'token')} elsewhere or missing), "
            "so equal rows do not mean equal tokens"
        )
    return problems


def _first(lines: Sequence[str], limit: int = 3) -> list[str]:
    return [*lines[:limit], *([f"... and {len(lines) - limit} more like it"] if len(lines) > limit else [])]


def _output_specs(specs: Any, dtype: str | None) -> dict[str, Spec]:
    return {
        name: Spec(DTYPES[dtype] if dtype and spec.floating else spec.dtype, spec.shape) for name, spec in specs.items()
    }


# --- running --------------------------------------------------------------------------------------------------------


def run(method: Merge, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Merge into `folder`."""
    sources = [context.open(ref) for ref in inputs.models]
    base = context.open(inputs.base) if inputs.base else None
    reference = base or sources[0]
    writer = folder.tensors(_output_specs(reference.specs, inputs.dtype))
    models = _Models(method, sources, base, tuple(inputs.weights or [1.0] * len(sources)), context.seed)
    with _one_torch_thread(), ThreadPoolExecutor(context.settings.threads) as pool:
        measured = models.measure_model(pool) if method.measures == "model" else None
        names = list(writer.specs)
        with Progress("merge", sum(spec.size for spec in writer.specs.values()), context.settings.quiet) as progress:
            merge_one = partial(models.merge_tensor, writer=writer, reference=reference, measured=measured)
            for name, note in zip(names, in_order(pool, merge_one, names, context.settings.threads * 4), strict=True):
                progress.advance(writer.specs[name].size)
                models.notes += note
    digest = writer.finish()
    _copy_side_files(reference, folder, inputs.dtype)
    return StepResult(digest, writer.digests(), notes=tuple(models.notes))


@dataclass
class _Models:
    """The models of one merge, read side by side."""

    method: Merge
    sources: list[Checkpoint]
    base: Checkpoint | None
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    @cached_property
    def _content(self) -> list[dict[str, str]]:
        return [source.weights.tensor_digests() for source in self.sources]

    def chunk(self, name: str, start: int) -> Chunk:
        stop = min(start + CHUNK, self.sources[0].specs[name].size)
        return Chunk(
            tensor=name,
            sources=[source.weights.read(name, start, stop).float() for source in self.sources],
            base=self.base.weights.read(name, start, stop).float() if self.base else None,
            weights=self.weights,
            random_bits=lambda source: self._random_bits(name, source, start, stop - start),
        )

    def _random_bits(self, name: str, source: int, start: int, count: int) -> np.ndarray[Any, Any]:
        """Return uint32 numbers that are a function of seed, tensor, source's content, and position alone."""
        text = f"{self.seed}\0{name}\0{self._content[source][name]}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        generator = np.random.Philox(key=key, counter=start // 8)  # one count is 4 words of 64 bits
        return generator.random_raw(-(-count // 2)).view(np.uint32)[:count]

    def places(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        for name in names:
            for start in range(0, self.sources[0].specs[name].size, CHUNK):
                yield name, start

    def floating(self) -> list[str]:
        return [name for name, spec in self.sources[0].specs.items() if spec.floating]

    def measure_model(self, pool: ThreadPoolExecutor) -> Any:
        names = self.floating()

        def scan(look: Callable[[Chunk], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
            return _total(in_order(pool, lambda place: look(self.chunk(*place)), self.places(names)))

        return self.method.measure(scan, len(self.sources), sum(self.sources[0].specs[name].size for name in names))

    def measure_tensor(self, name: str) -> Any:
        def scan(look: Callable[[Chunk], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
            return _total(look(self.chunk(*place)) for place in self.places([name]))

        return self.method.measure(scan, len(self.sources), self.sources[0].specs[name].size)

    def merge_tensor(self, name: str, writer: TensorWriter, reference: Checkpoint, measured: Any) -> list[str]:
        """Merge one tensor into the writer; returns notes."""
        spec = writer.specs[name]
        if not spec.floating:
            return self._copy(name, writer, reference)
        if self.method.measures == "tensor" and spec.size:
            measured = self.measure_tensor(name)
        for _, start in self.places([name]):
            merged = self.method.merge(self.chunk(name, start), measured).to(torch_dtype(spec.dtype))
            if not torch.isfinite(merged).all():
                raise LfmError(self._not_finite(name, start))
            writer.write(name, merged)
        return []

    def _copy(self, name: str, writer: TensorWriter, reference: Checkpoint) -> list[str]:
        """Take counters and flags as they are: there is no arithmetic on them."""
        for _, part in reference.weights.chunks(name, CHUNK):
            writer.write(name, part)
        kept = reference.weights.read(name)
        if all(torch.equal(source.weights.read(name), kept) for source in self.sources):
            return []
        return [f"tensor {name!r} ({reference.specs[name]}) differs between the models; taken from {reference.ref}"]

    def _not_finite(self, name: str, start: int) -> str:
        chunk = self.chunk(name, start)
        labelled = [(source.ref, part) for source, part in zip(self.sources, chunk.sources, strict=True)]
        if self.base is not None and chunk.base is not None:
            labelled.append((self.base.ref, chunk.base))
        guilty = [ref for ref, part in labelled if not torch.isfinite(part).all()]
        if guilty:
            return f"tensor {name!r} holds NaN or Inf in {', '.join(guilty)}: that checkpoint is broken"
        return f"tensor {name!r}: the merge overflows the range of its dtype; use --dtype float32, or a smaller scale"


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Answer], items: Iterable[Item], ahead: int = 8
) -> Iterator[Answer]:
    """Yield work(item) in the order of the items, done by the pool, at most `ahead` of them waiting."""
    waiting: deque[Future[Answer]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _total(parts: Iterator[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the sum in order, so that threads cannot change it."""
    total = next(parts).copy()
    for part in parts:
        total += part
    return total


_thread_setting = threading.Lock()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leave parallelism to our own threads: tensors are many and chunks are small."""
    with _thread_setting:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _copy_side_files(reference: Checkpoint, folder: OutputFolder, dtype: str | None) -> None:
    folder.copy({str(file.relative_to(reference.folder)): file for file in reference.side_files})
    if reference.config is not None:
        changed = {"dtype": dtype} if dtype else {}
        folder.write_json("config.json", {**_without(reference.config, "torch_dtype" if dtype else ""), **changed})


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}
