"""Runs any merge: compares headers, streams every tensor through the method, writes, checks what was written.

Memory is bounded by the chunk, not by the model; the bytes written do not depend on threads, chunks or their order.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lfm.checkpoint import RAW, OutputFolder, TensorWriter, raw_bytes
from lfm.checkpoint.kinship import strangers
from lfm.errors import LfmError, RequestError, plural
from lfm.evaluate.change import group_of
from lfm.method import number_of_models
from lfm.models.ref import ModelRef
from lfm.progress import Progress
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.reuse.merge import _kernels as kernels
from lfm.reuse.merge._aligned import Tokens, read_tokens, tokenizer_policy
from lfm.reuse.merge._array import Array, total
from lfm.reuse.merge._check import changed, config_problems
from lfm.reuse.merge._contract import Elementwise, Inputs, Merge, Site, Tensorwise, Whole
from lfm.reuse.merge._extent import TensorExtent
from lfm.reuse.merge._kernels import Output, Totals
from lfm.reuse.merge._layout import Layout, Target, codes, first_few, lay_out
from lfm.reuse.merge._program import Program, Wanted, compile_program
from lfm.reuse.merge._settings import setting_problems
from lfm.reuse.merge._stream import CHUNK, UNIT, Keys, Stream, is_wide, row_length

SAYS_NOTHING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}  # about the function
KEEP = 32_000_000  # bytes of a tensor that a thread keeps for the passes over it
RESIDENT = 90_000_000  # bytes that the program itself takes, before it holds any part of a model
RATE = 0.8e9  # bytes that a thread gets through in a second: measured, to say about how long a merge will take


# --- planning, from headers -----------------------------------------------------------------------------------------


def plan(method: Merge, inputs: Inputs, context: Context) -> StepPlan:
    """Return what merging will read, write and take, and everything that speaks against it."""
    problems = _request_problems(method, inputs)
    refs = _refs(inputs)
    try:
        outlines = dict(zip(refs, context.outlines(refs), strict=True))
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    problems += dict.fromkeys(line for outline in outlines.values() for line in first_few(list(codes(outline))))
    checkpoints = _opened(context, refs)
    if checkpoints is None:
        tokens, token_problems = Tokens(), _vocabulary_problems(inputs, outlines)
    else:
        tokens, token_problems = _tokens(inputs, checkpoints)
    outlines = {ref: tokens.outline(outline) for ref, outline in outlines.items()}
    layout = lay_out(method, inputs, outlines) if not setting_problems(method, inputs) else Layout()
    problems += dict.fromkeys([*layout.problems, *token_problems])
    reference = outlines[_reference(inputs)]
    output = replace(reference, specs=layout.specs, config=_config(reference.config, inputs, layout, tokens))
    if not tokens.alignment.trivial:
        output = replace(output, vocabulary=tokens.alignment.ids)
    held, memory_problems = _memory(method, layout, context)
    problems += [*memory_problems, *_device_problems(context.settings.device)]
    notes = [*_notes(method, inputs, outlines), *layout.notes, *tokens.notes]
    notes += _warnings(inputs, checkpoints) if checkpoints and not problems else []
    reads = sum(outline.nbytes for outline in outlines.values())
    seconds = _seconds(method, reads, output.nbytes, context.settings.threads)
    return StepPlan(output, reads, output.nbytes, held, seconds, tuple(problems), tuple(notes))


def _refs(inputs: Inputs) -> list[ModelRef]:
    """Return every model, the one that gives config and tokenizer first."""
    return list(dict.fromkeys([*([inputs.base] if inputs.base else []), *inputs.models, *filter(None, [inputs.rest])]))


def _reference(inputs: Inputs) -> ModelRef:
    return inputs.base or inputs.models[0]


def _notes(method: Merge, inputs: Inputs, outlines: Mapping[ModelRef, Outline]) -> Iterator[str]:
    """Yield what is no error and should not pass in silence."""
    reference, *others = _refs(inputs)
    kept = outlines[reference].config
    if inputs.base is not None and not (method.needs.base or method.takes_base):
        yield f"{type(method).__name__} does not use a base; it gives the config"
    for ref in others:
        config = outlines[ref].config
        if kept is not None and config is not None:
            keys = [key for key in sorted({*kept, *config} - SAYS_NOTHING) if kept.get(key) != config.get(key)]
            if keys:
                yield f"{ref.label}: config differs from that of {reference.label}, which is taken: {', '.join(keys)}"


def _request_problems(method: Merge, inputs: Inputs) -> list[str]:
    name, (low, high), got = type(method).__name__, method.needs.sources, len(inputs.models)
    problems = []
    if not inputs.slices and (got < low or (high is not None and got > high)):
        problems.append(f"{name} takes {number_of_models(low, high)}, got {got}")
    if method.needs.base and inputs.base is None:
        problems.append(f"{name} needs a base (--base), the model that the sources were tuned from")
    if inputs.slices and (inputs.only or inputs.rest):
        problems.append("slices make a whole model: they do not go with `only` and `rest`")
    if inputs.rest and not inputs.only:
        problems.append("rest: says where tensors come from that `only` leaves out; give `only` too")
    return [*problems, *_weight_problems(method, inputs), *setting_problems(method, inputs)]


def _weight_problems(method: Merge, inputs: Inputs) -> list[str]:
    name, weights, got = type(method).__name__, inputs.weights, len(inputs.models)
    if weights is None:
        return method.objections([1.0] * got)
    if not method.weighted:
        return [f"{name} takes no weights"]
    if len(weights) != got:
        return [f"{plural(got, 'model')} and {plural(len(weights), 'weight')}: give one weight for each model"]
    plain = [float(weight) for weight in weights if isinstance(weight, (int, float))]
    return method.objections(plain) if len(plain) == got else []


def _opened(context: Context, refs: Sequence[ModelRef]) -> dict[ModelRef, Checkpoint] | None:
    """Return the models; None while one of them still has to be made by an earlier step."""
    try:
        return {ref: context.open(ref) for ref in refs}
    except RequestError:
        return None


def _tokens(inputs: Inputs, checkpoints: dict[ModelRef, Checkpoint]) -> tuple[Tokens, list[str]]:
    """Return how the models' tokens go together, and what keeps them from it."""
    try:
        return read_tokens(inputs, checkpoints), []
    except RequestError as error:
        return Tokens(), list(error.problems)


def _warnings(inputs: Inputs, checkpoints: Mapping[ModelRef, Checkpoint]) -> list[str]:
    """Return a line for each two models that no merge will make a good one of: looks at samples of their weights."""
    base = checkpoints[inputs.base] if inputs.base else None
    return strangers([checkpoints[ref] for ref in dict.fromkeys(inputs.models)], base)


def _vocabulary_problems(inputs: Inputs, outlines: Mapping[ModelRef, Outline]) -> list[str]:
    """Compare the tokens of models that are not all there yet; a rule for them has to wait until they are."""
    if tokenizer_policy(inputs).source != "same":
        return []
    reference, *others = outlines.values()
    return [
        f"{other.ref.label}: its tokenizer differs from that of {reference.ref.label}, so equal rows do not mean equal "
        "tokens; say whose tokens the result should have (tokenizer: base, or union)"
        for other in others
        if reference.vocabulary and other.vocabulary and reference.vocabulary != other.vocabulary
    ]


def _device_problems(device: str) -> list[str]:
    if device == "cpu":
        return []
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return [f"--device {device}: {str(error).splitlines()[0]}"]
    return []


def _memory(method: Merge, layout: Layout, context: Context) -> tuple[int, list[str]]:
    """Return the bytes that a merge holds at most, and whether that is more than it may."""
    threads, budget = context.settings.threads, context.settings.memory
    largest = max((_held_by(method, target, CHUNK) for target in layout.targets.values()), default=0)
    largest += KEEP if _measures_tensors(method) and budget is None else 0
    if budget is None:
        return RESIDENT + threads * largest, []
    smallest = max((_held_by(method, target, 1 << 14) for target in layout.targets.values()), default=0)
    if RESIDENT + smallest > budget:
        need = f"{math.ceil((RESIDENT + smallest) / 1e6)}MB"
        return RESIDENT + smallest, [f"--memory: {type(method).__name__} needs {need} at least for the largest tensor"]
    return min(budget, RESIDENT + threads * largest), []


def _seconds(method: Merge, reads: int, writes: int, threads: int) -> float | None:
    """Return about how long a merge takes, hashing included; of whole tensors nobody can tell by their bytes."""
    if not isinstance(method, Elementwise):
        return None
    passes = 1.0 if method.measures == "nothing" else 1.8
    return 0.5 + (reads * passes + writes) / (threads * RATE)


def _measures_tensors(method: Merge) -> bool:
    return isinstance(method, Elementwise) and method.measures == "tensor"


def _takes(method: Merge) -> str:
    if isinstance(method, Tensorwise):
        return "tensors"
    return method.takes if isinstance(method, Elementwise) else "elements"


def _held_by(method: Merge, target: Target, chunk: int) -> int:
    """Return the bytes that one thread holds for a tensor."""
    width = 8 if is_wide(target) else 4
    method = target.resolved.method if target.resolved else method
    if target.kind == "merge" and _takes(method) != "elements":
        copies = method.copies if isinstance(method, Tensorwise) else 1.5
        size = target.spec.size
        if _takes(method) == "rows":
            size = min(size, max(chunk, math.lcm(row_length(target), UNIT)))
        return int(size * width * copies * (len(target.inputs) + 1))
    items = sum(int(np.dtype(RAW[origin.spec.dtype]).itemsize) for origin in target.inputs)
    return min(target.spec.size, chunk) * (items + width + 4 * len(target.sources)) + (1 << 20)


def _config(config: Mapping[str, Any] | None, inputs: Inputs, layout: Layout, tokens: Tokens) -> dict[str, Any] | None:
    if config is None:
        return None
    changed = {**layout.config, **tokens.alignment.config, **({"dtype": inputs.dtype} if inputs.dtype else {})}
    return {key: value for key, value in config.items() if key != "torch_dtype" or not inputs.dtype} | changed


# --- running --------------------------------------------------------------------------------------------------------

STREAMS = True  # what this engine reads is hashed on the way, so the executor need not read it before


def run(method: Merge, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Merge into `folder`."""
    refs = _refs(inputs)
    checkpoints = {ref: context.open(ref) for ref in refs}
    outlines = {  # of what is there now: what a step was going to make may have got other names
        ref: Outline(ref, model.specs, model.config, model.vocabulary) for ref, model in checkpoints.items()
    }
    tokens = read_tokens(inputs, checkpoints)
    layout = lay_out(method, inputs, {ref: tokens.outline(outline) for ref, outline in outlines.items()})
    if layout.problems:
        raise RequestError(*layout.problems)
    reference = checkpoints[_reference(inputs)]
    writer = folder.tensors(layout.specs)
    threads, chunk = _shares(method, layout, context)
    stream = Stream(checkpoints, Keys(context.seed, checkpoints), tokens, chunk)
    if _measures_tensors(method) and context.settings.memory is None:
        stream.keep = KEEP
    if context.settings.device != "cpu":
        from lfm.reuse.merge._torch import runner

        stream.run = runner(context.settings.device)
    work = _Work(method, inputs, stream, writer, context.settings.device)
    with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        work.measure(layout, pool)
        # The large ones first, so that no thread is left alone with one at the end.
        order = sorted(layout.targets.values(), key=lambda target: -target.spec.nbytes)
        with Progress("merge", sum(spec.size for spec in layout.specs.values()), context.settings.quiet) as progress:
            for target in _finished(pool, work, order, threads):
                progress.advance(target.spec.size)
    digest = writer.finish()
    config = _config(reference.config, inputs, layout, tokens)
    notes = [*_notes(method, inputs, outlines), *layout.notes, *tokens.notes, *sorted(work.notes)]
    notes += _warnings(inputs, checkpoints)
    if config is not None and changed(layout.specs, reference.specs):
        problems, remarks = config_problems(layout.specs, config)
        notes += remarks
        if problems:
            raise LfmError("the merged model would not load: " + "; ".join(problems))
    tokens.write(folder, {str(file.relative_to(reference.folder)): file for file in reference.side_files})
    if config is not None:
        folder.write_json("config.json", config)
    return StepResult(digest, writer.digests(), notes=tuple(notes), change=work.change())


def _finished(pool: ThreadPoolExecutor, work: _Work, targets: Sequence[Target], threads: int) -> Iterator[Target]:
    """Yield targets as they are done; the first failure stops the rest."""
    futures = [pool.submit(work.do, target) for target in targets]
    try:
        for future, target in zip(futures, targets, strict=True):
            future.result()
            yield target
    finally:
        for future in futures:
            future.cancel()


def _shares(method: Merge, layout: Layout, context: Context) -> tuple[int, int]:
    """Return how many threads and how large a chunk the memory allows."""
    threads, chunk, budget = context.settings.threads, CHUNK, context.settings.memory
    if budget is None:
        return threads, chunk

    def held(chunk: int) -> int:
        return max((_held_by(method, target, chunk) for target in layout.targets.values()), default=0)

    while chunk > 1 << 14 and RESIDENT + threads * held(chunk) > budget:
        chunk //= 2
    while threads > 1 and RESIDENT + threads * held(chunk) > budget:
        threads -= 1
    return threads, chunk


@dataclass
class _Work:
    """Merges one tensor at a time, from any thread."""

    method: Merge
    inputs: Inputs
    stream: Stream
    writer: TensorWriter
    device: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._measured: dict[str, Any] = {}
        self._moved: dict[str, tuple[float, float]] = {}

    # --- what is found out first

    def measure(self, layout: Layout, pool: ThreadPoolExecutor) -> None:
        """Measure all layers, or the whole model, where the method wants that."""
        groups: dict[Any, list[Target]] = {}
        for target in layout.targets.values():
            if target.kind == "merge" and target.spec.size and (scope := self._scope(target)) in ("layer", "global"):
                place = target.name.split(".", 1)[0] if target.layer is None else target.layer
                groups.setdefault(place if scope == "layer" else "", []).append(target)
        for targets in groups.values():
            extent = TensorExtent(self.stream, targets, pool)
            found = self._elementwise(targets[0]).measure(extent)
            self._measured |= {target.name: found for target in targets}

    def _scope(self, target: Target) -> str:
        method = target.resolved.method if target.resolved else None
        return method.measures if isinstance(method, Elementwise) else "nothing"

    def _elementwise(self, target: Target) -> Elementwise:
        method = target.resolved.method if target.resolved else None
        if not isinstance(method, Elementwise):
            raise AssertionError(f"{target.name} is not merged element by element")
        return method

    # --- one tensor

    def do(self, target: Target) -> None:
        """Merge one tensor into the writer."""
        if target.kind == "copy" or not target.spec.size:
            self._copy(target)
        elif target.kind == "merge" and target.resolved and _takes(target.resolved.method) != "elements":
            self._merge_whole(target)
        else:
            self._merge(target)

    def _merge(self, target: Target) -> None:
        program = self._program(target)
        totals = Totals.of(program)
        wide = is_wide(target)
        for part in self.stream.parts(target, program):
            output = Output(self.stream.buffer("output", target.spec.dtype, part.size), target.spec.dtype)
            broken = self.stream.run(program, part, totals, output, wide=wide)
            self.stream.check(target, broken.inputs)
            self._write(target, output.values, broken.output)
        if program.products:
            moved, before = totals.products
            self._moved[target.name] = (float(moved), float(before))

    def _program(self, target: Target) -> Program:
        site = self.stream.site(target)
        rounding = self.inputs.rounding == "stochastic" and target.spec.dtype in ("BF16", "F16")
        if target.kind == "average":
            return self.stream.program(
                (site, "average", rounding), lambda: self._wanted(_average(site), site, rounding)
            )
        method = self._elementwise(target)
        if method.measures == "tensor":
            measured, key = method.measure(TensorExtent(self.stream, [target])), None
        else:
            measured = self._measured.get(target.name)
            key = (site, measured, rounding)
        return self.stream.program(key, lambda: self._wanted(method.merge(site, measured), site, rounding))

    @staticmethod
    def _wanted(merged: Array, site: Site, stochastic: bool) -> Wanted:
        noise = site.random(len(site.sources)) if stochastic else None
        if site.base is None:
            return Wanted(merged, noise)
        change = merged - site.base
        return Wanted(merged, noise, products=[(change, change), (site.base, site.base)])

    def _merge_whole(self, target: Target) -> None:
        method = target.resolved.method if target.resolved else None
        if target.resolved is None or not isinstance(method, (Elementwise, Tensorwise)):
            raise AssertionError(f"{target.name} is not merged as a whole")
        merge = method.merge if isinstance(method, Tensorwise) else method.merge_whole
        rows = _takes(method) == "rows"
        moved = np.zeros(2)  # squares of what changes, and of what was there
        for place, models in self._rows(target) if rows else [(0, self._whole(target))]:
            shape = (-1, *target.spec.shape[1:]) if rows and len(target.spec.shape) > 1 else target.spec.shape
            shaped = [model.reshape(shape) for model in models]
            base = shaped.pop() if target.base else None
            before = models[-1].copy() if target.base else None
            given = target.resolved
            whole = Whole(shaped, base, given.weights, given.values, target.layer, target.is_table, self.device)
            flat = np.ascontiguousarray(merge(whole), dtype=models[0].dtype).reshape(-1)
            moved += self._write_values(target, flat, before, place)
        if target.base:
            self._moved[target.name] = (float(moved[0]), float(moved[1]))

    def _whole(self, target: Target) -> list[np.ndarray[Any, Any]]:
        kind = np.float64 if is_wide(target) else np.float32
        models = [np.empty(target.spec.size, kind) for _ in target.inputs]
        for part in self.stream.parts(target):
            for model, values in zip(models, self._widened(target, part), strict=True):
                model[part.place : part.place + part.size] = values
        return models

    def _rows(self, target: Target) -> Iterator[tuple[int, list[np.ndarray[Any, Any]]]]:
        kind = np.float64 if is_wide(target) else np.float32
        for part in self.stream.parts(target, by_rows=True):
            yield part.place, [values.astype(kind, copy=False) for values in self._widened(target, part)]

    def _widened(self, target: Target, part: kernels.Part) -> Iterator[np.ndarray[Any, Any]]:
        for index, (raw, dtype) in enumerate(zip(part.inputs, part.dtypes, strict=True)):
            values = kernels.widened(raw, dtype)
            self.stream.check(target, [] if np.isfinite(values).all() else [index])
            yield values.copy() if values is raw else values

    def _write_values(
        self, target: Target, values: np.ndarray[Any, Any], before: np.ndarray[Any, Any] | None, place: int
    ) -> np.ndarray[Any, Any]:
        """Round and write numbers, in the way of a program that gives its input back."""
        one = Array("INPUT")
        noise = Array("RANDOM") if self.inputs.rounding == "stochastic" and target.spec.dtype != "F32" else None
        base = Array("INPUT", index=1)
        products = [] if before is None else [(one - base, one - base), (base, base)]
        program = compile_program(Wanted(one, noise, products=products))
        totals = Totals.of(program)
        dtype = "F64" if values.dtype == np.float64 else "F32"
        for start in range(0, len(values), CHUNK):
            pieces = [one[start : start + CHUNK] for one in (values, before) if one is not None]
            output = Output(self.stream.buffer("output", target.spec.dtype, len(pieces[0])), target.spec.dtype)
            part = kernels.Part(pieces, [dtype] * len(pieces), place + start, self.stream.rounding_key(target))
            broken = kernels.run(program, part, totals, output, wide=is_wide(target))
            self._write(target, output.values, broken.output or bool(broken.inputs))
        return totals.products if before is not None else np.zeros(2)

    def _write(self, target: Target, values: np.ndarray[Any, Any], overflow: bool) -> None:
        if overflow:
            raise LfmError(
                f"tensor {target.name!r}: the merge overflows the range of {target.spec.dtype}; "
                "use --dtype float32, a smaller scale, or smaller weights"
            )
        self.writer.append(target.name, raw_bytes(values))

    def _copy(self, target: Target) -> None:
        """Take a tensor as it is: counters and flags, on which there is no arithmetic, and what is not merged."""
        origin, *others = [*([target.base] if target.base else []), *target.sources]
        plain = replace(target, sources=(origin,), base=None)
        if origin.spec.dtype != target.spec.dtype or self.stream.tokens.moves(plain):
            one = Array("INPUT")
            program = compile_program(Wanted(one))
            for part in self.stream.parts(plain):
                output = Output(self.stream.buffer("output", target.spec.dtype, part.size), target.spec.dtype)
                broken = self.stream.run(program, part, Totals.of(program), output, wide=is_wide(plain))
                self.stream.check(plain, broken.inputs)
                self._write(target, output.values, broken.output)
            return
        differs = any(other.spec.dtype != origin.spec.dtype for other in others)
        for part in self.stream.parts(replace(target, sources=(origin, *others), base=None)):
            first, *rest = part.inputs
            differs |= any(not np.array_equal(first, values) for values in rest)
            self.writer.append(target.name, raw_bytes(first))
        if differs and not origin.spec.floating:
            self.notes.append(
                f"tensor {target.name!r} ({origin.spec}) differs between the models; "
                f"taken from {self.stream.ref_of(origin.model)}"
            )

    def change(self) -> dict[str, float]:
        """Return |merged - base| / |base| for each part of the model, and for all of it; empty without a base."""
        sums: dict[str, list[float]] = {}
        for name, (moved, before) in sorted(self._moved.items()):
            for group in (group_of(name), "all"):
                found = sums.setdefault(group, [0.0, 0.0])
                found[0] += moved
                found[1] += before
        return {group: math.sqrt(moved / before) if before else 0.0 for group, (moved, before) in sums.items()}


def _average(site: Site) -> Array:
    """Return the mean of the sources by their weights, or their plain mean where those are no shares."""
    weights = site.weights if min(site.weights) >= 0 and sum(site.weights) > 0 else (1.0,) * len(site.sources)
    return total([source * (weight / sum(weights)) for source, weight in zip(site.sources, weights, strict=True)])


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leave parallelism to our own threads: tensors are many. Does nothing while nobody needs torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with _thread_setting:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


_thread_setting = threading.Lock()
