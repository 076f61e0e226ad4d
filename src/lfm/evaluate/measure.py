"""Measuring models on data: accuracy and calibration, perplexity, drift from a baseline.

Each measure takes a handle and needs no more of it than its interface gives: probabilities, or labels for accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lfm.data import Rows
from lfm.errors import RequestError
from lfm.evaluate.harness import estimates, keep, run_harness
from lfm.evaluate.intervals import calibration_error, exponential, mean, percent, ratio, share
from lfm.evaluate.spec import Evaluate, Harness
from lfm.method import Access
from lfm.models.encode import IGNORE, Batch, Examples, targets
from lfm.models.handle import Model
from lfm.models.open import open_in
from lfm.models.ref import ModelRef
from lfm.progress import Progress
from lfm.recipe.step import Context
from lfm.report import Estimate

Better = Literal["higher", "lower", "none"]


@dataclass
class Measurement:
    """One measure on one data set, for every model; None where a model cannot be measured on it."""

    metric: str
    data: str
    better: Better
    unit: str = ""
    estimates: dict[str, Estimate | None] = field(default_factory=dict)


@dataclass
class Measured:
    """All measurements, and remarks on what could not be measured."""

    measurements: list[Measurement] = field(default_factory=list)
    baseline: str = ""
    notes: list[str] = field(default_factory=list)

    def add(self, model: str, metric: str, data: str, better: Better, unit: str, estimate: Estimate | None) -> None:
        for known in self.measurements:
            if (known.metric, known.data, known.unit) == (metric, data, unit):
                known.estimates[model] = estimate
                return
        self.measurements.append(Measurement(metric, data, better, unit, {model: estimate}))


def measure(models: Mapping[str, ModelRef], spec: Evaluate, context: Context) -> Measured:
    """Measure every model on every data set; models are loaded one at a time (and the baseline, for drift)."""
    names = spec.compare or list(models)
    measured = Measured(baseline=spec.baseline or names[0])
    drift_from = _load(models[measured.baseline], context) if spec.drift else None
    work = len(names) * (len(spec.accuracy) + len(spec.perplexity) + len(spec.drift))
    with Progress("evaluate", work, context.settings.quiet) as progress:
        for name in names:
            try:
                model = _load(models[name], context)
            except RequestError as error:
                measured.notes.append(f"{name} was not measured: {error}")
                continue
            for data, rows, look in _looks(spec, context, drift_from):
                try:
                    examples = model.encoder.encode(rows, spec.length, labelled=look is _classify)
                    look(measured, name, data, model, examples, spec)
                except RequestError as error:
                    measured.notes.append(f"{name} on {data}: {error}")
                progress.advance(1, f"{name} {data}")
    if spec.harness is not None:
        _harness(models, names, spec.harness, context, measured)
    return measured


def _harness(
    models: Mapping[str, ModelRef], names: Sequence[str], spec: Harness, context: Context, measured: Measured
) -> None:
    """Run lm-eval's tasks on every model, and keep its answer beside those that lfm made."""
    for name in names:
        ref = context.resolve(models[name])
        if ref.ref is None or "+" in ref.ref or ref.module:
            measured.notes.append(f"{name}: lm-eval takes checkpoint folders and hub names")
            continue
        answer = run_harness(ref.ref, spec, context.settings.device)
        if (Path(ref.ref) / "lineage.json").is_file():
            keep(answer, Path(ref.ref))
        for task, metric, higher, estimate in estimates(answer):
            measured.add(name, metric, task, "higher" if higher else "lower", "lm-eval", estimate)


def _load(ref: ModelRef, context: Context) -> Model:
    return open_in(context, context.resolve(ref)).restrict(Access.PROBS)


Look = Callable[[Measured, str, str, Model, Examples, Evaluate], None]


def _looks(spec: Evaluate, context: Context, baseline: Model | None) -> Iterator[tuple[str, Rows, Look]]:
    """Yield what to look at, and how."""
    for data, source in spec.accuracy.items():
        yield data, context.rows(source), _classify
    for data, source in spec.perplexity.items():
        yield data, context.rows(source), _predict_text
    for data, source in spec.drift.items():
        if baseline is not None:
            yield data, context.rows(source), _drift_from(baseline)


def batches(examples: Examples, size: int) -> Iterator[Batch]:
    """Yield all examples, in order."""
    for start in range(0, len(examples), size):
        yield examples.batch(range(start, min(start + size, len(examples))))


def _log_probs(model: Model, batch: Batch) -> torch.Tensor:
    log_probs = model.log_probs(batch).cpu()
    if log_probs.isnan().any():
        raise RequestError("its probabilities are not numbers (NaN); its weights are broken")
    return log_probs


def _classify(measured: Measured, name: str, data: str, model: Model, examples: Examples, spec: Evaluate) -> None:
    """Accuracy, negative log-likelihood, calibration error; of a model that gives labels alone, accuracy."""
    if not model.task.endswith("classification"):
        raise RequestError(f"accuracy takes a classifier, and this is a {model.task} model")
    if model.access < Access.PROBS:
        chosen = ((model.labels(batch).cpu(), batch["labels"]) for batch in batches(examples, spec.batch_size))
        right = torch.cat([found == wanted for found, wanted in chosen])
        measured.add(name, "accuracy", data, "higher", "%", percent(share(int(right.sum()), len(right))))
        return
    correct, confidence, nll = [], [], []
    for batch in batches(examples, spec.batch_size):
        log_probs = _log_probs(model, batch)
        top = log_probs.max(-1)
        correct.append(top.indices == batch["labels"])
        confidence.append(top.values.exp())
        nll.append(-log_probs.gather(-1, batch["labels"][:, None])[:, 0])
    hits, sure, losses = (torch.cat(parts).double().numpy() for parts in (correct, confidence, nll))
    measured.add(name, "accuracy", data, "higher", "%", percent(share(int(hits.sum()), len(hits))))
    measured.add(name, "NLL", data, "lower", "nats", mean(losses))
    measured.add(name, "ECE", data, "lower", "%", percent(Estimate(calibration_error(sure, hits), n=len(hits))))


def _predict_text(measured: Measured, name: str, data: str, model: Model, examples: Examples, spec: Evaluate) -> None:
    """Perplexity per token and per character. The former compares models with one tokenizer, the latter any models."""
    if model.task != "causal-lm":
        raise RequestError(f"perplexity takes a causal-lm model, and this is a {model.task} model")
    sums, counts = [], []
    for batch in batches(examples, max(1, spec.batch_size // 4)):
        log_probs, labels = _log_probs(model, batch)[:, :-1], batch["labels"][:, 1:]
        picked = -log_probs.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != IGNORE)
        sums.append(picked.double().sum(-1))
        counts.append((labels != IGNORE).double().sum(-1))
    nats, tokens = torch.cat(sums).numpy(), torch.cat(counts).numpy()
    per_token = ratio(nats, tokens)
    measured.add(name, "perplexity", data, "lower", "per token", exponential(per_token))
    if examples.characters:
        scale = float(tokens.sum()) / examples.characters
        low, high = (None if bound is None else bound * scale for bound in (per_token.low, per_token.high))
        per_character = Estimate(per_token.value * scale, low, high, per_token.n)
        measured.add(name, "perplexity", data, "lower", "per character", exponential(per_character))


def _check_comparable(baseline: Model, model: Model) -> None:
    """Refuse models whose outputs do not stand for the same things, whatever their shapes."""
    if model.task != baseline.task:
        raise RequestError(f"is a {model.task} model, the baseline {baseline.label} is a {baseline.task} model")
    ours, theirs = model.encoder, baseline.encoder
    if ours.image != theirs.image:
        raise RequestError(f"its images are not prepared as those of the baseline {baseline.label}")
    if (ours.classes or {}) != (theirs.classes or {}):
        raise RequestError(f"its classes are not those of the baseline {baseline.label}")
    if (ours.tokenizer and ours.tokenizer.get_vocab()) != (theirs.tokenizer and theirs.tokenizer.get_vocab()):
        raise RequestError(f"its tokenizer is not that of the baseline {baseline.label}")


def _drift_from(baseline: Model) -> Look:
    """KL divergence from the baseline's distribution to the model's, and how often both choose the same."""

    def look(measured: Measured, name: str, data: str, model: Model, examples: Examples, spec: Evaluate) -> None:
        _check_comparable(baseline, model)
        divergences: list[torch.Tensor] = []
        agreed: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []
        for batch in batches(examples, max(1, spec.batch_size // 4)):
            before, labels = targets(_log_probs(baseline, batch), batch["labels"], model.task)
            after, _ = targets(_log_probs(model, batch), batch["labels"], model.task)
            if before.shape != after.shape:
                raise RequestError(f"its {after.shape[-1]} classes are not the baseline's {before.shape[-1]}")
            # What the baseline gives no probability adds nothing, though its logarithm is infinite.
            terms = (before.exp() * (before - after)).masked_fill(before == -math.inf, 0.0)
            same, predicted = before.argmax(-1) == after.argmax(-1), labels != IGNORE
            for sums, values in ((divergences, terms.sum(-1).double()), (agreed, same.double()), (counts, predicted)):
                # The tokens of a window depend on each other: intervals are those of independent windows.
                sums.append(values.masked_fill(~predicted, 0).reshape(len(batch["labels"]), -1).double().sum(-1))
        kl, hits, tokens = (torch.cat(sums).numpy() for sums in (divergences, agreed, counts))
        single = model.task.endswith("classification")
        agreement = share(int(hits.sum()), len(hits)) if single else ratio(hits, tokens)
        measured.add(name, "KL from baseline", data, "none", "nats", ratio(kl, tokens))
        measured.add(name, "agreement", data, "none", "%", percent(agreement))

    return look
