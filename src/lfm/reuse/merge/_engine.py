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
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from lfm.checkpoint import Checkpoint, OutputFolder
from lfm.checkpoint.kinship import strangers
from lfm.errors import LfmError, RequestError, plural
from lfm.method import number_of_models
from lfm.models.ref import ModelRef
from lfm.progress import Progress
from lfm.recipe.step import Context, Outline, StepPlan, StepResult
from lfm.reuse.merge._check import changed, config_problems
from lfm.reuse.merge._contract import Elementwise, Inputs, Merge
from lfm.reuse.merge._layout import Layout, Target, codes, first_few, lay_out
from lfm.reuse.merge._settings import setting_problems
from lfm.reuse.merge._stream import CHUNK, Keys, Stream
from lfm.reuse.merge._tokens.aligned import Tokens, read_tokens, tokenizer_policy
from lfm.reuse.merge._work import Room, Work, held_by, takes

SAYS_NOTHING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}  # about the function
KEEP = 32_000_000  # bytes of a tensor that a thread keeps for the passes over it
KEEP_BITS = 16_000_000  # bytes of what the first of them found out about its elements
RESIDENT = 90_000_000  # bytes that the program itself takes, before it holds any part of a model
TORCH = 250_000_000  # bytes that torch takes, where a method needs it
FEW = 1 << 14  # elements of a tensor, on average, below which threads do not pay
SMALLEST = 1 << 14  # elements of a chunk, below which nothing is won
WHOLE = 400_000_000  # bytes of whole tensors that are held at a time, where one does not need more
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
    if checkpoints and not problems:
        warnings = _warnings(inputs, checkpoints)
        notes += warnings
        _PLANNED[context] = _Planned(method, inputs, checkpoints, layout, warnings)
    reads = sum(outline.nbytes for outline in outlines.values())
    seconds = _seconds(method, reads, output.nbytes, context.settings.threads)
    return StepPlan(output, reads, output.nbytes, held, seconds, tuple(problems), tuple(notes))


@dataclass(frozen=True)
class _Planned:
    """What planning found out and running would find out again, which takes a while where there are many tensors."""

    method: Merge
    inputs: Inputs
    checkpoints: Mapping[ModelRef, Checkpoint]
    layout: Layout
    warnings: list[str]

    def is_of(self, method: Merge, inputs: Inputs, checkpoints: Mapping[ModelRef, Checkpoint]) -> bool:
        """Whether it is about this step, with the very models that are open now."""
        same = all(self.checkpoints.get(ref) is model for ref, model in checkpoints.items())
        return method is self.method and inputs is self.inputs and same


_PLANNED: WeakKeyDictionary[Context, _Planned] = WeakKeyDictionary()


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
    resident = _resident(method)
    largest = _largest(method, layout, CHUNK)
    if budget is None and takes(method) == "tensors":
        return resident + max(largest, min(threads * largest, WHOLE)), []
    if budget is None:
        return resident + threads * (largest + (KEEP + KEEP_BITS if _measures_tensors(method) else 0)), []
    smallest = resident + _largest(method, layout, SMALLEST)
    if smallest > budget:
        need = f"{math.ceil(smallest / 1e6)}MB"
        return smallest, [f"--memory: {type(method).__name__} needs {need} at least for the largest tensor"]
    return min(budget, resident + threads * largest), []


def _resident(method: Merge) -> int:
    return RESIDENT + (TORCH if hasattr(sys.modules[type(method).__module__], "torch") else 0)


def _largest(method: Merge, layout: Layout, chunk: int) -> int:
    return max((held_by(method, target, chunk) for target in layout.targets.values()), default=0)


def _seconds(method: Merge, reads: int, writes: int, threads: int) -> float | None:
    """Return about how long a merge takes, hashing included; of whole tensors nobody can tell by their bytes."""
    if not isinstance(method, Elementwise):
        return None
    passes = 1.0 if method.measures == "nothing" else 1.8
    return 0.5 + (reads * passes + writes) / (threads * RATE)


def _measures_tensors(method: Merge) -> bool:
    return isinstance(method, Elementwise) and method.measures == "tensor"


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
    tokens = read_tokens(inputs, checkpoints)
    planned = _PLANNED.pop(context, None)
    if planned is None or not planned.is_of(method, inputs, checkpoints):
        planned = None
    outlines = {  # of what is there now: what a step was going to make may have got other names
        ref: Outline(ref, model.specs, model.config, model.vocabulary) for ref, model in checkpoints.items()
    }
    layout = planned.layout if planned else _laid_out(method, inputs, outlines, tokens)
    reference = checkpoints[_reference(inputs)]
    writer = folder.tensors(layout.specs)
    threads, chunk = _shares(method, layout, context)
    stream = Stream(checkpoints, Keys(context.seed, checkpoints), tokens, chunk)
    if _measures_tensors(method) and context.settings.memory is None:
        stream.keep, stream.keep_bits = KEEP, KEEP_BITS
    if context.settings.device != "cpu":
        from lfm.reuse.merge._machine.devices import runner

        stream.run = runner(context.settings.device)
    room = Room(max((context.settings.memory or 0) - RESIDENT, WHOLE))
    work = Work(method, inputs, stream, writer, context.settings.device, room)
    with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        work.measure(layout, pool)
        # The large ones first, so that no thread is left alone with one at the end.
        order = sorted(layout.targets.values(), key=lambda target: -target.spec.nbytes)
        with Progress("merge", sum(spec.size for spec in layout.specs.values()), context.settings.quiet) as progress:
            for target in _finished(pool, work, order):
                progress.advance(target.spec.size)
    digest = writer.finish()
    config = _config(reference.config, inputs, layout, tokens)
    notes = [*_notes(method, inputs, outlines), *layout.notes, *tokens.notes, *sorted(work.notes)]
    notes += planned.warnings if planned else _warnings(inputs, checkpoints)
    if config is not None and changed(layout.specs, reference.specs):
        problems, remarks = config_problems(layout.specs, config)
        notes += remarks
        if problems:
            raise LfmError("the merged model would not load: " + "; ".join(problems))
    tokens.write(folder, {str(file.relative_to(reference.folder)): file for file in reference.side_files})
    if config is not None:
        folder.write_json("config.json", config)
    return StepResult(digest, writer.digests(), notes=tuple(notes), change=work.change())


def _laid_out(method: Merge, inputs: Inputs, outlines: Mapping[ModelRef, Outline], tokens: Tokens) -> Layout:
    layout = lay_out(method, inputs, {ref: tokens.outline(outline) for ref, outline in outlines.items()})
    if layout.problems:
        raise RequestError(*layout.problems)
    return layout


def _finished(pool: ThreadPoolExecutor, work: Work, targets: Sequence[Target]) -> Iterator[Target]:
    """Yield targets as they are done; the first failure stops the rest."""

    def do(batch: Sequence[Target]) -> None:
        for target in batch:
            work.do(target)

    batches = _batches(targets)
    futures = [pool.submit(do, batch) for batch in batches]
    try:
        for future, batch in zip(futures, batches, strict=True):
            future.result()
            yield from batch
    finally:
        for future in futures:
            future.cancel()


def _batches(targets: Sequence[Target]) -> list[list[Target]]:
    """Put small tensors together: handing over a task costs more than merging one of them."""
    found: list[list[Target]] = []
    left = 0
    for target in targets:
        if left < target.spec.size or not found:
            found.append([])
            left = CHUNK // 4
        found[-1].append(target)
        left -= target.spec.size
    return found


def _shares(method: Merge, layout: Layout, context: Context) -> tuple[int, int]:
    """Return how many threads and how large a chunk the memory allows."""
    threads, chunk, budget = context.settings.threads, CHUNK, context.settings.memory
    if sum(target.spec.size for target in layout.targets.values()) < FEW * len(layout.targets):
        threads = 1  # small tensors are all Python, and threads of it would wait for each other
    if budget is None:
        return threads, chunk

    resident = _resident(method)
    while chunk > SMALLEST and resident + threads * _largest(method, layout, chunk) > budget:
        chunk //= 2
    while threads > 1 and resident + threads * _largest(method, layout, chunk) > budget:
        threads -= 1
    return threads, chunk


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
