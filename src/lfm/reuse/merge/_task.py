"""Models made for one of the tasks, out of what is merged from all."""

from __future__ import annotations

from lfm.errors import plural


def task_objections(task: int | None, models: int) -> list[str]:
    """Return what speaks against `task` as the place of one of the models in their list."""
    if task is None or task < models:
        return []
    return [
        f"task: got {task}, with {plural(models, 'model')} to merge: they count from 0, so {models - 1} is the last"
    ]
