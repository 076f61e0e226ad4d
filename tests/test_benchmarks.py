"""The speed benchmark: its checkpoints, its ruler, its comparison, and that lfm has what it asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm import cards

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_checkpoints_have_the_shapes_that_the_page_tells(tmp_path):
    from _checkpoints import SOURCE_STD, make, mixture
    from merge import SIZES

    assert SIZES["334M"].parameters == 334_005_248
    assert len(mixture().tensors) == 18_867
    made = make(tmp_path, SIZES["tiny"])
    base, source = ({} for _ in range(2))
    for found, name in ((base, "base"), (source, "a")):
        for shard in sorted(made[name].glob("*.safetensors")):
            assert shard.stat().st_size < 500_000
            found |= load_file(shard)
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == SIZES["tiny"].tensors
    change = source["lm_head.weight"].double() - base["lm_head.weight"].double()
    assert change.std() == pytest.approx(SOURCE_STD, rel=0.01)
    assert abs(change.mean()) < SOURCE_STD / 100


def test_checkpoints_are_made_once_and_always_the_same(tmp_path):
    from _checkpoints import make, plain

    shape = plain(3)
    first = make(tmp_path / "one", shape)["b"] / "model.safetensors"
    again = make(tmp_path / "two", shape)["b"] / "model.safetensors"
    assert first.read_bytes() == again.read_bytes()
    written = first.stat().st_mtime_ns
    make(tmp_path / "one", shape)
    assert first.stat().st_mtime_ns == written
    make(tmp_path / "one", plain(4))
    assert first.read_bytes() != again.read_bytes()


def test_rounding_to_bfloat16_is_torchs():
    from _checkpoints import from_bfloat16, to_bfloat16

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:2] = from_bfloat16(np.array([0x3F80, 0x3F81], np.uint16)) + np.float32(2**-8)  # halfway: to even
    rounded = torch.from_numpy(values).bfloat16()
    assert (to_bfloat16(values) == rounded.view(torch.uint16).numpy()).all()
    assert (from_bfloat16(to_bfloat16(values)) == rounded.float().numpy()).all()


def test_outputs_are_compared_in_bfloat16_steps(tmp_path):
    from _compare import compare

    base = torch.tensor([1.0, 1.0, -2.0, 0.0]).bfloat16()
    peer = torch.tensor([1.5, 1.5, -2.0, 0.0]).bfloat16()
    ours = torch.tensor([1.5, 1.5 + 2**-7, -2.0 - 3 * 2**-6, 0.0]).bfloat16()
    for name, values in (("base", base), ("peer", peer), ("ours", ours)):
        (tmp_path / name).mkdir()
        save_file({"w": values}, tmp_path / name / "model.safetensors")
    found = compare(tmp_path / "ours", tmp_path / "peer", tmp_path / "base")
    assert found["differing"] == 0.5
    assert found["beyond_one_ulp"] == 0.25
    assert found["largest_ulps"] == 3.0
    assert found["relative_rms"] == pytest.approx((2**-14 + 9 * 2**-12) ** 0.5 / 0.5**0.5)
    save_file({"v": peer}, tmp_path / "peer" / "model.safetensors")
    with pytest.raises(ValueError, match="different tensors"):
        compare(tmp_path / "ours", tmp_path / "peer", tmp_path / "base")


MEASURED = """
import sys
from _processes import measure
used = measure([sys.executable, "-c", sys.argv[1]])
print(used.anonymous, used.rss, used.wall, used.cpu)
"""


def measured(script):
    """Measure a script from a small process: until a child runs its program, it counts what its parent holds."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, "-c", MEASURED, script], capture_output=True, text=True, env=environment)
    return map(float, done.stdout.split())


def test_a_run_is_measured_with_its_children(tmp_path):
    held = "import time; held = b'x' * 200_000_000; time.sleep(0.5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}], check=True)"
    for script in (held, child):
        anonymous, rss, wall, cpu = measured(script)
        assert 190 < anonymous < 260
        assert 190 < rss < 280
        assert wall > 0.5
        assert cpu > 0
    mapped = tmp_path / "mapped"
    mapped.write_bytes(bytes(100_000_000))
    script = (
        f"import mmap, time; file = open({str(mapped)!r}, 'rb'); "
        "pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); sum(pages[::4096]); time.sleep(0.3)"
    )
    anonymous, rss, *_ = measured(script)
    assert anonymous < 50
    assert rss > 95


def test_a_failed_run_says_why():
    from _processes import RunFailed, measure

    with pytest.raises(RunFailed, match="ended with 3: error: no such model"):
        measure(["/bin/sh", "-c", "echo 'error: no such model'; echo 'try --help'; exit 3"])


def test_lfm_has_every_method_and_option_that_is_measured():
    from _merges import CASES

    for case in CASES.values():
        card = cards()["merge", case.method]
        least, most = card.needs.sources
        assert least <= len(case.sources) <= (most or len(case.sources)), case.name
        assert card.needs.base == case.base, case.name
        for options in case.ours.values():
            names = {option.removeprefix("--").replace("-", "_") for option in options if option.startswith("--")}
            assert names <= set(card.parameters.model_fields), case.name


def test_the_command_measures_and_keeps_what_it_measured(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, FOLDER / "merge.py", "--sizes", "tiny", "--only", "ours", "--repeats", "1"]
    command += ["--tensors", "20", "--work", tmp_path, "--lfm", _lfm(tmp_path), "--json", results, "--methods"]
    page = subprocess.run([*command, "linear2,ties,tiny_tensors"], check=True, capture_output=True, text=True).stdout
    rows = ["linear2", "ties (as mergekit)", "ties (as the paper)", "tiny_tensors"]
    assert all(f"| {row} |" in page for row in rows)
    assert "Not measured" not in page
    found = json.loads(results.read_text())
    for row in found["rows"]:
        row["runs"]["peer"] = row["runs"]["new"]
    results.write_text(json.dumps(found))
    page = subprocess.run([*command, "linear2"], check=True, capture_output=True, text=True).stdout
    assert "| linear2 † |" in page
    assert all(f"| {row} |" in page for row in rows[1:])


def _lfm(folder: Path) -> Path:
    """Return a command that is this lfm, whether or not it is installed beside this Python."""
    script = folder / "lfm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m lfm "$@"\n')
    script.chmod(0o755)
    return script
