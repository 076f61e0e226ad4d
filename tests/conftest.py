"""What all tests share: real checkpoints and data, a cache of their own, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

LONG = ("tune/test_full.py", "recipe/test_shipped.py", "test_readme.py", "evaluate/test_measure.py", "test_done.py")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: processes share tests file by file, and none is to end long after all."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


@pytest.fixture(scope="session")
def assets():
    """The folder of real checkpoints and data; tests that need it are skipped where it is not."""
    root = Path(__file__).parents[1]
    folder = (root / os.environ.get("LFM_ASSETS", "../shared/assets")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; name their folder in LFM_ASSETS")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache_for_all(tmp_path_factory):
    """Keep digests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in one order, so that results are the same bits on every machine with as many cores as it likes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
