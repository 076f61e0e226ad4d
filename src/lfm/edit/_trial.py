"""Measuring models on edit requests, and foreseeing edits: nothing is changed."""

from __future__ import annotations

from typing import Any

from lfm.checkpoint import Checkpoint, Delta, open_checkpoint
from lfm.data import DataSpec, read
from lfm.data.requests import Request, requests_of
from lfm.edit._guard import COMPARED, conflicts
from lfm.edit._least_squares import Editor, contexts_of, layers_of
from lfm.edit._score import listen, metrics, records
from lfm.edit._statistics import statistics
from lfm.edit.memit import Memit
from lfm.errors import RequestError
from lfm.models.handle import Model
from lfm.models.local import load_model
from lfm.models.ref import ModelRef
from lfm.recipe.patches import edited_of, find_base
from lfm.recipe.step import Settings

TOKENS = 5_000  # of text for the statistics that overlaps are foreseen by


def test(model: str, data: Any, baseline: str | None, settings: Settings) -> dict[str, Any]:
    """Return how a model does on edit requests, against the model before: `baseline`, or an edited folder's base."""
    requests = requests_of(read(DataSpec.model_validate(data)))
    now = listen(_load(model, settings), requests)
    before = _before(model, baseline, settings)
    was = now if before is None else listen(_load(before, settings), requests)
    found = metrics(was, now)
    if before is None:  # what compares with a model before says nothing here
        found = {name: value for name, value in found.items() if not name.endswith(("_before", "_kept", "_drift"))}
    return {"model": model, "baseline": before, "metrics": found, "edits": records(requests, was, now)}


def _before(model: str, baseline: str | None, settings: Settings) -> str | None:
    if baseline is not None:
        return baseline
    edited = edited_of(open_checkpoint(model, allow_pickle=settings.allow_pickle))
    try:
        return None if edited is None else find_base(edited).ref
    except RequestError:
        return None


def foresee(model: str, data: Any, settings: Settings, seed: int) -> dict[str, Any]:
    """Return what a model says to requests now, and what will get in the way of what."""
    requests = requests_of(read(DataSpec.model_validate(data)))
    checkpoint = open_checkpoint(model, allow_pickle=settings.allow_pickle)
    loaded = _load(model, settings)
    edited = edited_of(checkpoint)
    patches: tuple[Delta, ...] = () if edited is None else edited.patches
    said = listen(loaded, requests)
    edits = [
        {
            "id": request.id,
            "prompt": request.prompt,
            "target": request.target,
            "subject": request.subject,
            "before": one.answer,
            "said": one.target.exact,
        }
        for request, one in zip(requests, said, strict=True)
    ]
    overlap = _overlap(loaded, requests, checkpoint, seed) if len(requests) <= COMPARED else None
    return {"model": model, "edits": edits, "notes": list(conflicts(requests, patches, overlap))}


def _overlap(model: Model, requests: list[Request], checkpoint: Checkpoint, seed: int) -> Any:
    method = Memit(contexts=0)
    layers = layers_of(method, model)[-1:]
    names = [layer.out.name for layer in layers]
    known = statistics(model, names, TOKENS, digest=checkpoint.digest, seed=seed, texts=None)
    return Editor(method, model, layers, known, contexts_of(model, 0, seed)).overlap(requests)


def _load(model: str, settings: Settings) -> Model:
    loaded = load_model(ModelRef(ref=model), device=settings.device, allow_pickle=settings.allow_pickle)
    if loaded.task != "causal-lm":
        raise RequestError(f"{model}: is made for {loaded.task}; edits are made to language models")
    return loaded
