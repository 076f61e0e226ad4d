"""Models made for one of the tasks, out of what is merged from all."""

from __future__ import annotations

from lfm.errors import RequestError, plural


def place_of(task: int, models: int) -> int:
    """Return `task` as the place of one of the models in their list, or raise RequestError where there is none."""
    if task >= models:
        raise RequestError(
            f"task: got {task}, with {plural(models, 'model')} to merge: they count from 0, so {models - 1} is the last"
        )
    return task
