"""Runs any merge: compares headers, streams every tensor through the method in chunks, on worker threads.

Memory is bounded by the chunk, not by the model; the bytes written do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from lfm.checkpoint import Checkpoint, OutputFolder, Spec, TensorWriter, torch_dtype
from lfm.errors import LfmError, RequestError, plural
from lfm.method import number_of_models
from lfm.progress import Progress
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.reuse.merge._contract import Chunk, Inputs, Merge

CHUNK = 1 << 18  # elements, a multiple of 8 (see _random_bits); a few float32 chunks fit a core's cache
SAYS_NOTHING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}  # about the function
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Item = TypeVar("Item")
Answer = TypeVar("Answer")


# --- planning, from headers -----------------------------------------------------------------------------------------


def plan(method: Merge, inputs: Inputs, context: Context) -> StepPlan:
    """Return what merging will read, write and take, and everything that speaks against it."""
    problems = _request_problems(method, inputs)
    refs = [*([inputs.base] if inputs.base else []), *inputs.models]
    try:
        reference, *others = outlines = context.outlines(refs)
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    problems += dict.fromkeys(problem for outline in outlines for problem in _codes(outline))
    for other in others:
        problems += _differences(reference, other)
    output = replace(reference, specs=_output_specs(reference.specs, inputs.dtype))
    reads = sum(outline.nbytes for outline in outlines)
    held = context.settings.threads * CHUNK * 4 * (2 * len(inputs.models) + 3)
    notes = _notes(method, inputs, [outline.config for outline in outlines])
    return StepPlan(output, reads, output.nbytes, held, tuple(problems), tuple(notes))


def _notes(method: Merge, inputs: Inputs, configs: Sequence[Mapping[str, Any] | None]) -> Iterator[str]:
    """Yield what is no error and should not pass in silence; `configs` are those of the base (if any) and models."""
    refs = [*([inputs.base] if inputs.base else []), *inputs.models]
    reference, kept = refs[0].label, configs[0]
    if inputs.base is not None and not method.needs.base:
        yield f"{type(method).__name__} does not use a base; it gives the config"
    for ref, config in zip(refs[1:], configs[1:], strict=True):
        if kept is not None and config is not None:
            keys = [key for key in sorted({*kept, *config} - SAYS_NOTHING) if kept.get(key) != config.get(key)]
            if keys:
                yield f"{ref.label}: config differs from that of {reference}, which is taken: {', '.join(keys)}"


def _request_problems(method: Merge, inputs: Inputs) -> list[str]:
    name, (low, high), got = type(method).__name__, method.needs.sources, len(inputs.models)
    problems = []
    if got < low or (high is not None and got > high):
        problems.append(f"{name} takes {number_of_models(low, high)}, got {got}")
    if method.needs.base and inputs.base is None:
        problems.append(f"{name} needs a base (--base), the model that the sources were tuned from")
    if inputs.weights is not None and not method.weighted:
        problems.append(f"{name} takes no weights")
    elif inputs.weights is not None and len(inputs.weights) != got:
        problems.append(
            f"{plural(got, 'model')} and {plural(len(inputs.weights), 'weight')}: give one weight for each model"
        )
    elif inputs.weights is not None:
        problems += method.objections(inputs.weights)
    return problems


def _codes(outline: Outline) -> list[str]:
    """Return a line for each tensor that is neither a plain number nor a counter or flag, and so cannot be merged."""
    found = [
        f"{outline.ref.label}: tensor {name!r} is {spec}: codes or complex numbers, which cannot be merged; "
        "convert the checkpoint to float32, bfloat16 or float16 first"
        for name, spec in outline.specs.items()
        if not spec.floating and spec.dtype.startswith(("F", "C"))
    ]
    return _first(found)


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
        tokens = {*reference.vocabulary, *other.vocabulary}
        moved = sum(reference.vocabulary.get(token) != other.vocabulary.get(token) for token in tokens)
        problems.append(
            f"{two}: its tokenizer differs from that of {one} ({plural(moved, 'token')} elsewhere or missing), "
            "so equal rows do not mean equal tokens"
        )
    return problems


def _first(lines: Sequence[str], limit: int = 3) -> list[str]:
    return [*lines[:limit], *([f"... and {len(lines) - limit} more like it"] if len(lines) > limit else [])]


def _output_specs(specs: Mapping[str, Spec], dtype: str | None) -> dict[str, Spec]:
    """Return what is written, by name: the bytes do not depend on how the inputs are laid out or split into files."""
    return {
        name: Spec(DTYPES[dtype] if dtype and spec.floating else spec.dtype, spec.shape)
        for name, spec in sorted(specs.items())
    }


# --- running --------------------------------------------------------------------------------------------------------


def run(method: Merge, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Merge into `folder`."""
    sources = [context.open(ref) for ref in inputs.models]
    base = context.open(inputs.base) if inputs.base else None
    reference = base or sources[0]
    writer = folder.tensors(_output_specs(reference.specs, inputs.dtype))
    weights = tuple(inputs.weights or [1.0] * len(sources))
    models = _Models(method, sources, base if method.needs.base else None, weights, context.seed)
    models.notes += _notes(method, inputs, [model.config for model in (*([base] if base else []), *sources)])
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
        self._content = [source.weights.tensor_digests() for source in self.sources] if self.method.random else []

    def chunk(self, name: str, start: int) -> Chunk:
        """Read a part of a tensor from every model, in the widest type stored, float32 at least."""
        stop = min(start + CHUNK, self.sources[0].specs[name].size)
        models = [*self.sources, *([self.base] if self.base else [])]
        parts = [model.weights.read(name, start, stop) for model in models]
        guilty = [model.ref for model, part in zip(models, parts, strict=True) if not _finite(part)]
        if guilty:
            raise LfmError(f"tensor {name!r} holds NaN or Inf in {', '.join(guilty)}: that checkpoint is broken")
        wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        parts = [part.to(wide) for part in parts]
        return Chunk(
            tensor=name,
            base=parts.pop() if self.base else None,
            sources=parts,
            weights=self.weights,
            random_bits=lambda source: self._random_bits(name, source, start, stop - start),
        )

    def _random_bits(self, name: str, source: int, start: int, count: int) -> np.ndarray[Any, Any]:
        """Return uint32 numbers that are a function of seed, tensor, source's content, and position alone."""
        if not self._content:
            raise AssertionError(f"{type(self.method).__name__} has to say `random = True` to draw random numbers")
        text = f"{self.seed}\0{name}\0{self._content[source][name]}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        generator = np.random.Philox(key=key, counter=start // 8)  # one count is 4 words of 64 bits
        return generator.random_raw(-(-count // 2)).view(np.uint32)[:count]

    def places(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        for name in names:
            for start in range(0, self.sources[0].specs[name].size, CHUNK):
                yield name, start

    def measure_model(self, pool: ThreadPoolExecutor) -> Any:
        names = [name for name, spec in sorted(self.sources[0].specs.items()) if spec.floating and spec.size]
        if not names:
            return None

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
            if not _finite(merged):
                raise LfmError(
                    f"tensor {name!r}: the merge overflows the range of {spec.dtype}; "
                    "use --dtype float32, a smaller scale, or smaller weights"
                )
            writer.write(name, merged)
        return []

    def _copy(self, name: str, writer: TensorWriter, reference: Checkpoint) -> list[str]:
        """Take counters and flags as they are: there is no arithmetic on them."""
        differs = False
        for start, part in reference.weights.chunks(name, CHUNK):
            others = [source.weights.read(name, start, start + len(part)) for source in self.sources]
            differs |= any(other.dtype != part.dtype or not torch.equal(other, part) for other in others)
            writer.write(name, part)
        if not differs:
            return []
        return [f"tensor {name!r} ({reference.specs[name]}) differs between the models; taken from {reference.ref}"]


def _finite(part: torch.Tensor) -> bool:
    """Whether all elements are numbers; many times as fast as `isfinite(part).all()`."""
    low, high = part.aminmax()
    return math.isfinite(low) and math.isfinite(high)


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
