"""Processes that are there to be killed, forked from one that has imported what they need: Python takes seconds to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

IMPORTED = ("torch", "lfm.tune._engine", "lfm.recipe.execute", "transformers.models.llama.modeling_llama", "accelerate")
CONTEXT = multiprocessing.get_context("forkserver")  # which has no threads that a fork could leave in the middle
CONTEXT.set_forkserver_preload(list(IMPORTED))


def start(function: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Call a function of a module in a process of its own."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process
