"""Opening any model that a reference names: in memory, behind an endpoint, or made of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm.checkpoint import MANIFEST, read_json
from lfm.errors import AccessError, RequestError
from lfm.method import Access, verbs
from lfm.models.handle import Model
from lfm.models.ledger import Budget
from lfm.models.ref import ModelRef, Task
from lfm.recipe.step import Around, Settings


@dataclass(frozen=True)
class Alone:
    """The surroundings of a model that is opened outside of any recipe."""

    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    run: str = ""


def open_model(
    ref: ModelRef,
    *,
    access: Access | None = None,
    task: Task | None = None,
    classes: Mapping[str, int] | None = None,
    new_head: bool = False,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    budget: Budget | None = None,
) -> Model:
    """Return a handle on a model that offers `access`, or all that the reference allows.

    `task`, `classes` and `new_head` are those of `lfm.models.local.load_model`. Raises AccessError where the reference
    offers less, RequestError where the model cannot be opened.
    """
    told = budget or Budget()
    settings = Settings(
        device=device,
        allow_pickle=allow_pickle,
        max_queries=told.max_queries,
        max_cost=told.max_cost,
        ledger=told.ledger,
    )
    around = Alone(seed, settings, told.run)
    return open_in(around, ref, access=access, task=task, classes=classes, new_head=new_head)


def open_in(
    around: Around,
    ref: ModelRef,
    *,
    access: Access | None = None,
    task: Task | None = None,
    classes: Mapping[str, int] | None = None,
    new_head: bool = False,
) -> Model:
    """Return a handle as `open_model` does, with seed, settings and budget of what is around it."""
    if access is not None and access > ref.offers:
        raise AccessError(f"{ref.label}: offers {ref.offers.name.lower()}, cannot be opened as {access.name.lower()}")
    if ref.defence is not None:
        from lfm.models.defence import defended

        plain = ref.model_copy(update={"defence": None})
        model = open_in(around, plain, access=None, task=task, classes=classes, new_head=new_head)
        return defended(model, ref.defence).restrict(ref.offers if access is None else access)
    level = ref.offers if access is None else access
    settings = around.settings
    if ref.is_endpoint:
        from lfm.models.endpoint import open_endpoint

        return open_endpoint(ref, level, task or ref.task, settings.budget(around.run))
    folder = made_of_others(ref)
    if folder is not None:
        return _from_manifest(ref, folder, around, access)
    from lfm.models.local import load_model

    return load_model(
        ref,
        access=level,
        task=task,
        classes=classes,
        new_head=new_head,
        seed=around.seed,
        device=settings.device,
        allow_pickle=settings.allow_pickle,
    )


def made_of_others(ref: ModelRef) -> Path | None:
    """Return the folder of a model that is more than plain weights, None for every other model."""
    try:
        folder = Path(ref.ref).expanduser() if ref.ref and not ref.is_endpoint else None
        return folder if folder is not None and (folder / MANIFEST).is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, a user without a home
        return None


def _from_manifest(ref: ModelRef, folder: Path, around: Around, access: Access | None) -> Model:
    """Let the verb that wrote a folder load it."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    verb = verbs().get(str(manifest.get("verb")))
    load = None if verb is None else getattr(verb.engine(), "load", None)
    if load is None:
        raise RequestError(f"{folder / MANIFEST}: made by {manifest.get('verb')!r}, which this lfm cannot load")
    model: Model = load(manifest, folder, around)
    if access is not None and access > model.access:
        raise AccessError(f"{ref.label}: offers {model.access.name.lower()}, cannot be opened as {access.name.lower()}")
    return model.restrict(ref.offers if access is None else access)


__all__ = ["Alone", "Around", "made_of_others", "open_in", "open_model"]
