"""Writing: what arrives is what was sent, complete or not at all, whatever goes wrong and whenever."""

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.killing import CONTEXT, start

from lfm.checkpoint import MemoryWeights, OutputFolder, check_free, open_checkpoint, read_header, remember_output
from lfm.checkpoint import _write as writing
from lfm.errors import LfmError, RequestError

ASSETS = Path(os.environ.get("LFM_ASSETS", Path(__file__).parents[2] / ".." / "shared" / "assets"))
GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {f"layer.{i}.weight": torch.randn(16, 8, generator=GENERATOR) for i in range(12)} | {
    "flags": torch.tensor([True, False, True]),
    "count": torch.tensor(2**40),
    "half": torch.randn(5, generator=GENERATOR).bfloat16(),
    "wide": torch.randn(3, generator=GENERATOR, dtype=torch.float64),
    "none": torch.zeros(0, 4),
}


def fill(folder, tensors=TENSORS, *, shard_bytes=10**9, elements=7):
    weights = MemoryWeights(tensors)
    writer = folder.tensors(weights.specs, shard_bytes=shard_bytes)
    for name in weights.specs:
        for _, part in weights.chunks(name, elements):
            writer.write(name, part)
    return writer.finish()


def make(out, *, key="k", overwrite=False, tensors=TENSORS, **options):
    with OutputFolder(out, key=key, overwrite=overwrite) as folder:
        digest = fill(folder, tensors, **options)
        folder.write_json("config.json", {})
        folder.write_json("lineage.json", {"key": key})
        folder.commit()
    return digest


def same(one, other):
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def loaded(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- what is written


@pytest.mark.parametrize(("shard_bytes", "shards"), [(10**9, 1), (1100, 6), (1, 17)])
def test_what_is_written_reads_back(shard_bytes, shards, tmp_path):
    digest = make(tmp_path / "out", shard_bytes=shard_bytes)
    assert same(loaded(tmp_path / "out"), TENSORS)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    opened = open_checkpoint(tmp_path / "out")
    assert same({name: opened.tensor(name) for name in opened.specs}, TENSORS)
    assert opened.digest == digest == MemoryWeights(TENSORS).digest
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_the_index_is_what_transformers_expects(tmp_path):
    make(tmp_path / "out", shard_bytes=1100)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": MemoryWeights(TENSORS).nbytes}
    assert set(index["weight_map"]) == set(TENSORS)
    assert "model-00001-of-00006.safetensors" in index["weight_map"].values()


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    make(tmp_path / "out")
    specs, metadata = read_header(tmp_path / "out" / "model.safetensors")
    assert metadata == {"format": "pt"}
    assert all(spec.offset % TENSORS[name].element_size() == 0 for name, spec in specs.items())


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3000), st.integers(1, 50))
def test_threads_and_chunks_do_not_show(tmp_path_factory, rng, shard_bytes, elements):
    out = tmp_path_factory.mktemp("threads") / "out"
    weights = MemoryWeights(TENSORS)
    names = list(TENSORS)
    rng.shuffle(names)
    with OutputFolder(out, key="k") as folder, ThreadPoolExecutor(6) as pool:
        writer = folder.tensors(weights.specs, shard_bytes=shard_bytes)
        list(pool.map(lambda name: [writer.write(name, p) for _, p in weights.chunks(name, elements)], names))
        assert writer.finish() == weights.digest
        folder.commit()
    assert same(loaded(out), TENSORS)


def test_no_tensors_make_an_empty_file(tmp_path):
    make(tmp_path / "out", tensors={})
    assert load_file(tmp_path / "out" / "model.safetensors") == {}


def test_text_and_copies_arrive(tmp_path):
    (tmp_path / "source").write_bytes(b"\0\xff")
    with OutputFolder(tmp_path / "deep" / "er" / "出力", key="k") as folder:
        folder.copy({"1_Pooling/config.json": tmp_path / "source"})
        folder.write_text("note.md", "né")
        folder.commit()
    assert content(tmp_path / "deep" / "er" / "出力") == {"1_Pooling/config.json": b"\0\xff", "note.md": "né".encode()}


def test_a_writer_refuses_what_was_not_declared(tmp_path):
    with OutputFolder(tmp_path / "out", key="k") as folder:
        writer = folder.tensors(MemoryWeights(TENSORS).specs)
        with pytest.raises(AssertionError, match="not written in full"):
            writer.finish()
        with pytest.raises(AssertionError, match="not go into"):
            writer.write("half", torch.zeros(5))
        writer.write("half", TENSORS["half"])
        with pytest.raises(AssertionError, match="not go into"):
            writer.write("half", TENSORS["half"][:1])


def test_gradients_and_views_are_written_as_values(tmp_path):
    tensors = {"a": torch.ones(3, 2, requires_grad=True), "b": torch.arange(6.0).reshape(2, 3).T}
    with OutputFolder(tmp_path / "out", key="k") as folder:
        writer = folder.tensors(MemoryWeights(tensors).specs)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
        folder.commit()
    assert same(loaded(tmp_path / "out"), {"a": torch.ones(3, 2), "b": tensors["b"]})


def test_remembered_output_is_not_hashed_again(tmp_path, monkeypatch):
    with OutputFolder(tmp_path / "out", key="k") as folder:
        weights = MemoryWeights(TENSORS)
        writer = folder.tensors(weights.specs, shard_bytes=1000)
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        digest = writer.finish()
        folder.commit()
    remember_output(tmp_path / "out", writer.digests())
    opened = open_checkpoint(tmp_path / "out")
    monkeypatch.setattr(type(opened.weights), "read", None)
    assert opened.digest == digest


# --- where it may go


def test_a_name_that_is_taken_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    make(tmp_path / "out")
    before = content(tmp_path)
    for name, why in [
        *(("file", "is a file"), ("link", "symbolic link"), ("file/sub", "is a file"), ("out", "exists already")),
        *(
            ("", "cannot be the name"),
            ("x.partial", "cannot be the name"),
            ("x" * 300, "too long"),
            ("a\0b", "cannot be the name"),
        ),
    ]:
        for overwrite in (False, True) if name != "out" else (False,):
            assert why in " ".join(check_free(tmp_path / name / "" if name else Path(), overwrite=overwrite))
            with pytest.raises(RequestError, match=why):
                make(tmp_path / name if name else Path(), overwrite=overwrite)
    assert content(tmp_path) == before


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    assert check_free(tmp_path / "out") == []
    make(tmp_path / "out")
    assert same(loaded(tmp_path / "out"), TENSORS)


def test_overwrite_replaces_what_lfm_made_and_nothing_else(tmp_path):
    make(tmp_path / "out", tensors={"old": torch.ones(1)})
    make(tmp_path / "out", overwrite=True)
    assert same(loaded(tmp_path / "out"), TENSORS)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="not made by lfm"):
        make(tmp_path / "own", overwrite=True)
    assert content(tmp_path / "own") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_neighbours_of_somebody_else_are_left_alone(suffix, kind, tmp_path):
    stranger = tmp_path / f"out{suffix}"
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("years of work")
    if kind == "folder":
        (tmp_path / "else").rename(stranger)
    elif kind == "file":
        stranger.write_text("years of work")
    else:
        stranger.symlink_to(tmp_path / "else")
    before = content(tmp_path)
    with pytest.raises(RequestError, match="in the way"):
        make(tmp_path / "out")
    assert content(tmp_path) == before


def test_a_parent_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o555)
    if os.access(parent, os.W_OK):  # root may write anywhere: let the system say no another way
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != parent)
    with pytest.raises(RequestError, match="read-only; choose another place"):
        make(parent / "out")


def test_a_parent_that_refuses_in_the_act_is_a_clear_error(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(LfmError, match="could not be written: Permission denied"):
        make(tmp_path / "out")


# --- one at a time


def test_a_second_run_of_the_same_output_is_refused(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lfm.checkpoint import OutputFolder\n"
        "with OutputFolder(Path(sys.argv[1]), key='k'): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(RequestError, match="another run is writing"):
            make(tmp_path / "out")
        other.stdin.close()
        assert other.wait() == 0
    make(tmp_path / "out")


def test_a_run_that_waited_while_another_finished_is_refused(tmp_path, monkeypatch):
    lock = fcntl.flock

    def finish_first(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        make(tmp_path / "out", key="other")
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(RequestError, match="just written"):
        make(tmp_path / "out")
    assert same(loaded(tmp_path / "out"), TENSORS)


# --- left-overs


def leave(out, key, stop=KeyboardInterrupt):
    with contextlib.suppress(stop), OutputFolder(out, key=key) as folder:
        folder.resume.mkdir(exist_ok=True)
        (folder.resume / "step").write_text(key)
        folder.write_text("stale.txt", "stale")
        fill(folder)
        raise stop


def test_left_overs_of_the_same_key_are_kept_for_resuming(tmp_path):
    key = "k" * 300 + "é"
    leave(tmp_path / "out", key)
    with OutputFolder(tmp_path / "out", key=key) as folder:
        assert (folder.resume / "step").read_text() == key
        assert sorted(item.name for item in folder.partial.iterdir()) == [writing.PARTIAL_MARK, "resume"]
        fill(folder)
        folder.commit()
    assert sorted(content(tmp_path / "out")) == ["model.safetensors"]


@pytest.mark.parametrize("key", ["other", "k", "kkk", ""])
def test_left_overs_of_another_key_are_wiped(key, tmp_path):
    leave(tmp_path / "out", "kk")
    with OutputFolder(tmp_path / "out", key=key) as folder:
        assert not folder.resume.exists()


def test_left_overs_that_were_half_wiped_belong_to_no_key(tmp_path, monkeypatch):
    def killed(item):
        raise KeyboardInterrupt

    leave(tmp_path / "out", "first")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out", key="second")
    with OutputFolder(tmp_path / "out", key="first") as folder:
        assert not folder.resume.exists()


def test_an_exception_leaves_nothing_that_loads(tmp_path):
    leave(tmp_path / "out", "k", RuntimeError)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="unfinished"):
        open_checkpoint(tmp_path / "out.partial")
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_commit_killed_at_any_step_is_finished_by_a_rerun(overwrite, tmp_path, monkeypatch):
    make(tmp_path / "expected")
    steps = 0
    for stop_at in range(100):
        out = tmp_path / f"out{stop_at}"
        if overwrite:
            make(out, key="old", tensors={"old": torch.ones(1)})
        with monkeypatch.context() as patch:
            killed = die_at_step(patch, stop_at)
            with contextlib.suppress(KeyboardInterrupt):
                make(out, overwrite=overwrite, shard_bytes=1000)
        if out.exists():
            assert set(loaded(out)) in ({"old"}, set(TENSORS))
        if not killed:
            break
        steps += 1
        with contextlib.suppress(RequestError):  # "exists already", where it was complete
            make(out, overwrite=overwrite)
        assert same(loaded(out), TENSORS)
        make(out, overwrite=True)
        left = [item.name for item in tmp_path.iterdir() if item.name.startswith(f"{out.name}.")]
        assert left == []
        assert content(out) == content(tmp_path / "expected")
    assert steps > 10


def die_at_step(patch, stop_at):
    """Raise at the given rename or removal, before it happens. Returns a list that is filled when it has happened."""
    count, killed = iter(range(1000)), []

    def guarded(act):
        def step(*arguments, **options):
            if not killed and next(count) == stop_at:
                killed.append(True)
            if killed:
                raise KeyboardInterrupt
            return act(*arguments, **options)

        return step

    for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
        patch.setattr(owner, name, guarded(getattr(owner, name)))
    return killed


def test_a_failed_swap_brings_the_old_output_back(tmp_path, monkeypatch):
    make(tmp_path / "out", key="old", tensors={"old": torch.ones(1)})
    rename = Path.rename

    def stubborn(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stubborn)
        with pytest.raises(LfmError, match="Input/output error"):
            make(tmp_path / "out", overwrite=True)
    assert set(loaded(tmp_path / "out")) == {"old"}
    make(tmp_path / "out", overwrite=True)
    assert same(loaded(tmp_path / "out"), TENSORS)


# --- disks that fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPERM, errno.EFBIG])
@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync", "truncate"])
def test_a_failing_disk_is_a_clear_error_and_a_rerun_works(code, call, tmp_path, monkeypatch):
    allowed = random.Random(f"{code}{call}").randrange(1, 4) if call != "truncate" else 0
    act, count = getattr(os, call), iter(range(1000))

    def failing(*arguments):
        if next(count) >= allowed:
            raise OSError(code, os.strerror(code))
        return act(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(LfmError) as caught:
            make(tmp_path / "out", shard_bytes=500)
    assert caught.value.exit_code == 1
    assert f"could not be written: {os.strerror(code)}" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert make(tmp_path / "out") == MemoryWeights(TENSORS).digest


def test_writes_that_are_cut_short_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))
        make(tmp_path / "out")
    assert same(loaded(tmp_path / "out"), TENSORS)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(code, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(code, os.strerror(code)) if code else AttributeError("posix_fallocate")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    make(tmp_path / "out")
    assert same(loaded(tmp_path / "out"), TENSORS)


def test_other_peoples_errors_are_not_ours(tmp_path):
    with pytest.raises(ConnectionRefusedError), OutputFolder(tmp_path / "out", key="k"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(FileNotFoundError), OutputFolder(tmp_path / "out", key="k"):
        (tmp_path / "absent").read_text()


def test_errors_of_others_that_write_into_the_folder_are_told(tmp_path):
    with pytest.raises(LfmError, match="could not be written"), OutputFolder(tmp_path / "out", key="k") as folder:
        (folder.partial / "absent" / "file").write_text("x")
    with pytest.raises(LfmError, match="No space left"), OutputFolder(tmp_path / "out", key="k"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_known_before_the_work_and_a_rerun_works(small_disk):
    big = {"big": torch.ones(400_000)}
    with pytest.raises(LfmError, match="No space left on device"):
        make(small_disk / "out", tensors=big)
    assert not (small_disk / "out").exists()
    assert make(small_disk / "out", key="smaller") == MemoryWeights(TENSORS).digest


# --- runs that are killed


def slow_run(out, pause, told):
    """Write a checkpoint at leisure; tells when it begins, and the digest of what it has written."""
    weights = MemoryWeights({f"t{i}": torch.full((64,), float(i)) for i in range(40)})
    told.send("go")
    with OutputFolder(out, key="k", overwrite=True) as folder:
        writer = folder.tensors(weights.specs, shard_bytes=2000)
        for name in weights.specs:
            for _, part in weights.chunks(name, 16):
                writer.write(name, part)
                time.sleep(pause)
        digest = writer.finish()
        folder.write_json("config.json", {})
        folder.write_json("lineage.json", {})
        folder.commit()
    told.send(digest)


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_run_leaves_nothing_half_and_a_rerun_gives_the_same(existing, tmp_path):
    out, rng = tmp_path / "out", random.Random(7)
    heard, telling = CONTEXT.Pipe(duplex=False)
    if existing:
        make(out, key="old", tensors={"old": torch.ones(1)})
    for _ in range(3):
        process = start(slow_run, out, 0.002, telling)
        assert heard.recv() == "go"
        end = time.monotonic() + rng.uniform(0, 0.3)
        while time.monotonic() < end:
            assert not out.exists() or set(loaded(out)) == {"old"}
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert out.exists() == existing
    start(slow_run, out, 0, telling).join()
    assert heard.recv() == "go"
    digest = heard.recv()
    heard.close()
    telling.close()
    assert digest == open_checkpoint(out).digest
    assert digest == MemoryWeights({f"t{i}": torch.full((64,), float(i)) for i in range(40)}).digest
    assert list(tmp_path.iterdir()) == [out]


def test_no_descriptor_is_left_open(tmp_path):
    make(tmp_path / "warm")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(25):
        make(tmp_path / f"out{index}", shard_bytes=500)
        leave(tmp_path / f"left{index}", "k")
        with pytest.raises(RequestError):
            make(tmp_path / f"out{index}")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --- transformers reads it


@pytest.fixture(scope="module")
def stories():
    folder = ASSETS / "checkpoints" / "stories260k"
    if not folder.is_dir():
        pytest.skip("no LFM_ASSETS folder")
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 300_000])
def test_transformers_loads_what_was_written_and_nothing_before(shard_bytes, stories, tmp_path):
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(stories)
    with OutputFolder(tmp_path / "out", key="k") as folder:
        folder.copy({"config.json": stories / "config.json"} | {file.name: file for file in source.side_files})
        writer = folder.tensors(source.specs, shard_bytes=shard_bytes)
        for name in source.specs:
            writer.write(name, source.tensor(name))
        assert writer.finish() == source.digest
        with pytest.raises(OSError, match=r"model.*\.safetensors"):
            AutoModelForCausalLM.from_pretrained(folder.partial)
        folder.commit()
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", stories))
    assert same(ours.state_dict(), theirs.state_dict())


def test_we_read_what_transformers_writes(stories, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(stories).save_pretrained(tmp_path, max_shard_size="300KB")
    assert open_checkpoint(tmp_path).digest == open_checkpoint(stories).digest


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).digest == MemoryWeights(TENSORS).digest
