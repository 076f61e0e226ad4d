"""Tasks of the evaluation harness (lm-eval), run through it and never re-implemented; an optional package.

Its answer is kept as it is, under `eval/` of the model's folder where there is one, with its version, task versions,
few-shot count and limit. `lm_eval run --model hf --model_args pretrained=FOLDER` gives the same numbers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfm.errors import RequestError
from lfm.evaluate.intervals import Z
from lfm.evaluate.spec import Harness
from lfm.report import Estimate


def require() -> None:
    """Raise RequestError when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError("harness tasks need lm-eval, which is not installed; pip install 'learn-from-model[eval]'")


def run_harness(ref: str, spec: Harness, device: str) -> dict[str, Any]:
    """Return what lm-eval says of a model folder (or hub name), unchanged but for its samples, which are left out."""
    require()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        answer = simple_evaluate(
            model="hf",
            model_args={"pretrained": ref},
            tasks=list(spec.tasks),
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
            batch_size=spec.batch_size,
            device=device,
            log_samples=False,
            task_manager=TaskManager(include_path=spec.include_path),
        )
    except (KeyError, ValueError, OSError) as error:
        raise RequestError(f"lm-eval cannot run {', '.join(spec.tasks)} on {ref}: {error}") from error
    return dict(answer or {})


def keep(answer: dict[str, Any], folder: Path) -> None:
    """Write an answer of the harness under `eval/` of a model's folder."""
    (folder / "eval").mkdir(exist_ok=True)
    text = json.dumps(answer, indent=2, default=str, ensure_ascii=False)
    (folder / "eval" / "lm_eval.json").write_text(text + "\n", encoding="utf-8")


def estimates(answer: dict[str, Any]) -> Iterator[tuple[str, str, bool, Estimate]]:
    """Yield (task, metric, whether higher is better, estimate) for every number in an answer."""
    better = answer.get("higher_is_better", {})
    for task, values in answer.get("results", {}).items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            half = Z * error if isinstance(error, (int, float)) else None
            count = answer.get("n-samples", {}).get(task, {}).get("effective")
            low, high = (None, None) if half is None else (value - half, value + half)
            yield task, metric, bool(better.get(task, {}).get(metric, True)), Estimate(value, low, high, count)
