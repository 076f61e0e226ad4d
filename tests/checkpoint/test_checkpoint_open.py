"""Opening what a reference names: folders, files, shards, hub names, adapters' refusals, pickles; and digests."""

import json
import os
import pickle
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lfm.checkpoint import MemoryWeights, open_checkpoint, read_json, remember_output
from lfm.checkpoint import _digests as digests
from lfm.errors import AccessError, RequestError, UnsafeError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}


def model(folder, tensors=TENSORS, config="{}"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def sharded(folder, weight_map=None, shards=({"a": TENSORS["a"]}, {"b": TENSORS["b"], "c": TENSORS["c"]})):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    index = {"weight_map": {t: name for name, ts in zip(names, shards, strict=True) for t in ts} | (weight_map or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(checkpoint, tensors=TENSORS):
    return set(checkpoint.specs) == set(tensors) and all(
        torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items()
    )


def refusal(ref, error=RequestError, **options):
    with pytest.raises(error) as caught:
        open_checkpoint(ref, **options)
    return str(caught.value)


# --- what opens


def test_a_folder_a_file_and_shards_hold_the_same_weights(tmp_path):
    folder = open_checkpoint(model(tmp_path / "m", config='{"model_type": "x"}'))
    assert same(folder)
    assert folder.config == {"model_type": "x"}
    assert same(open_checkpoint(tmp_path / "m" / "model.safetensors"))
    assert same(open_checkpoint(sharded(tmp_path / "s")))


@pytest.mark.parametrize("name", ["weights.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_folder_with_one_state_dict_opens_whatever_it_is_called(name, tmp_path):
    save_file(TENSORS, tmp_path / name)
    assert same(open_checkpoint(tmp_path))


def test_opening_reads_no_weights_and_no_torch(tmp_path):
    model(tmp_path / "m")
    code = (
        "import sys; from lfm.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tmp_path / 'm')!r}).specs; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["a+b", "a+b+c", "名前 é", "with space", "-dash", "x@1"])
def test_any_folder_name_opens(name, tmp_path):
    assert same(open_checkpoint(str(model(tmp_path / name))))


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model(tmp_path / "m+n")
    assert same(open_checkpoint("~/m+n"))


def test_beside_shards_the_single_file_counts_as_in_transformers(tmp_path):
    sharded(tmp_path, shards=({"old": torch.ones(1)}, {"older": torch.ones(1)}))
    assert same(open_checkpoint(model(tmp_path)))


def test_side_files_are_those_of_the_model_and_never_code(tmp_path):
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "modeling_x.py", "README.md", "optimizer.pt"):
        (model(tmp_path) / name).write_text("{}")
    names = {file.name for file in open_checkpoint(tmp_path).side_files}
    assert names == {"tokenizer.json", "merges.txt", "chat_template.jinja"}


def test_the_vocabulary_is_read_from_either_kind_of_tokenizer(tmp_path):
    model(tmp_path)
    added = [{"content": "<s>", "id": 9}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}, "added_tokens": added}))
    assert open_checkpoint(tmp_path).vocabulary == {"x": 0, "<s>": 9}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["x", -1.0]]}}))
    assert open_checkpoint(tmp_path).vocabulary == {"x": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [1]}}))
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        _ = open_checkpoint(tmp_path).vocabulary


# --- what does not


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ".", "", "a\0b"]
)
def test_an_index_that_points_elsewhere_is_refused(place, tmp_path):
    save_file({"z": torch.ones(1)}, tmp_path / "x.safetensors")
    assert "points outside" in refusal(sharded(tmp_path / "m", {"z": place}), UnsafeError)


def test_an_index_that_lists_a_pickle_among_safetensors_is_refused(tmp_path):
    torch.save({"z": torch.ones(1)}, sharded(tmp_path, {"z": "evil.bin"}) / "evil.bin")
    assert "another kind" in refusal(tmp_path, UnsafeError, allow_pickle=True)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map_is_refused(weight_map, tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(tmp_path, UnsafeError)


def test_all_missing_and_damaged_shards_are_named_at_once(tmp_path):
    message = refusal(sharded(tmp_path / "m", {"z": "gone.safetensors", "y": "lost.safetensors"}), UnsafeError)
    assert "gone.safetensors is missing" in message
    assert "lost.safetensors is missing" in message
    folder = sharded(tmp_path / "n")
    for shard in folder.glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size - 1)
    message = refusal(folder, UnsafeError)
    assert message.count("cut off") == 2


def test_an_index_that_lists_too_much_or_too_little_is_refused(tmp_path):
    first = "model-00001-of-00002.safetensors"
    assert "'z' is listed in model-00001" in refusal(sharded(tmp_path / "m", {"z": first}), UnsafeError)
    assert "'b' is listed in model-00001" in refusal(sharded(tmp_path / "n", {"b": first}), UnsafeError)
    index = json.loads((sharded(tmp_path / "o") / "model.safetensors.index.json").read_text())
    del index["weight_map"]["c"]
    (tmp_path / "o" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'c' is listed in nowhere" in refusal(tmp_path / "o", UnsafeError)


def test_an_index_of_one_shard_is_checked_too(tmp_path):
    name = "model-00001-of-00001.safetensors"
    assert "'z'" in refusal(sharded(tmp_path, {"z": name}, shards=(TENSORS,)), UnsafeError)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    assert "stands in" in refusal(sharded(tmp_path, shards=(TENSORS, {"a": TENSORS["a"]})), UnsafeError)


def test_the_left_overs_of_a_killed_run_are_refused(tmp_path):
    model(tmp_path / "m.partial")
    assert "unfinished" in refusal(tmp_path / "m.partial")
    assert "unfinished" in refusal(tmp_path / "m.partial" / "model.safetensors")


def test_left_overs_are_refused_from_inside_too(tmp_path, monkeypatch):
    monkeypatch.chdir(model(tmp_path / "m.partial"))
    assert "unfinished" in refusal(".")


def test_an_adapter_alone_is_refused_with_what_to_write(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert f"base+{tmp_path}" in refusal(tmp_path)


def test_a_folder_without_weights_or_with_too_many_says_what_it_holds(tmp_path):
    assert "nothing in it" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "config.json" in refusal(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        save_file(TENSORS, tmp_path / name)
    assert "one.safetensors, two.safetensors" in refusal(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    model(tmp_path, config='{"quantization_config": {"quant_method": "gptq"}}')
    assert "gptq" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a": ' * 100_000, "null", '{"a": ' + "9" * 5000 + "}"])
def test_a_malformed_config_is_refused(text, tmp_path):
    assert "config.json" in refusal(model(tmp_path, config=text))


def test_json_that_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "x.json", tmp_path / "y.json", tmp_path):
        with pytest.raises(RequestError):
            read_json(path)


@pytest.mark.parametrize("ref", ["http://localhost:8000/v1#model", "https://host/v1#a+b"])
def test_an_endpoint_has_no_weights(ref):
    assert "endpoint" in refusal(ref, AccessError)


@pytest.mark.parametrize("ref", ["", "+", "base+", "+adapter", "x" * 5000, "a\0b", "~nobody-of-that-name/x"])
def test_impossible_references_are_refused(ref):
    refusal(ref)


def test_a_missing_path_is_answered_with_the_nearest_name(tmp_path):
    model(tmp_path / "stories")
    assert "did you mean 'stories'" in refusal(tmp_path / "storeis")
    assert "did you mean 'stories'" in refusal(f"{tmp_path / 'storeis'}+{tmp_path}")


def test_weights_that_may_not_be_read_are_a_request_error(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    model(tmp_path)
    opened = open_checkpoint(tmp_path)
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(RequestError, match="Permission denied"):
        opened.tensor("a")


@pytest.mark.parametrize("change", ["truncate", "remove"])
def test_a_file_that_goes_away_while_it_is_read_is_a_request_error(change, tmp_path):
    opened = open_checkpoint(model(tmp_path, {"a": torch.zeros(100_000)}))
    opened.weights.read("a", 0, 10)
    os.truncate(tmp_path / "model.safetensors", 1000)
    if change == "remove":
        (tmp_path / "model.safetensors").unlink()
        opened = open_checkpoint(model(tmp_path / "other"))
        (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"cut off|No such file"):
        opened.tensor("a")


def test_a_dtype_without_arithmetic_is_refused_when_it_is_read(tmp_path):
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    opened = open_checkpoint(tmp_path)
    with pytest.raises(RequestError, match="F6_E2M3"):
        opened.tensor("a")
    with pytest.raises(RequestError, match="complex128"):
        MemoryWeights({"a": torch.zeros(1, dtype=torch.complex128)})


# --- pickles


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_state_dict_opens_only_when_allowed(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert "--allow-pickle" in refusal(tmp_path, UnsafeError)
    assert same(open_checkpoint(tmp_path, allow_pickle=True))
    torch.save({"epoch": 3, "state_dict": TENSORS}, tmp_path / "pytorch_model.bin")
    assert same(open_checkpoint(tmp_path, allow_pickle=True))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("allow", [True, False])
def test_code_in_a_pickle_never_runs(save, allow, tmp_path):
    save({"a": TENSORS["a"], "b": Bomb(tmp_path / "exploded")}, tmp_path / "x.pt")
    refusal(tmp_path / "x.pt", UnsafeError, allow_pickle=allow)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [[], {"a": 1}, {1: torch.ones(1)}, {"a": torch.ones(2, 2).to_sparse()}, None, 3])
def test_a_pickle_that_is_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.bin")
    refusal(tmp_path, UnsafeError, allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04garbage", bytes(range(100))])
def test_a_broken_pickle_is_refused(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    refusal(tmp_path, UnsafeError, allow_pickle=True)


def test_pickled_shards_are_checked_against_their_index(tmp_path):
    index = {"weight_map": {"a": "one.bin", "b": "two.bin", "c": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"a": TENSORS["a"]}, tmp_path / "one.bin")
    torch.save({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.bin")
    assert same(open_checkpoint(tmp_path, allow_pickle=True))
    torch.save(TENSORS, tmp_path / "two.bin")
    assert "stands in" in refusal(tmp_path, UnsafeError, allow_pickle=True)
    torch.save({"b": TENSORS["b"]}, tmp_path / "two.bin")
    assert "'c' is listed in two.bin and found in nowhere" in refusal(tmp_path, UnsafeError, allow_pickle=True)


# --- the hub's cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hand-made hub cache with one repository, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--name"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    for file in sharded(tmp_path / "source").iterdir():
        (repository / "blobs" / f"{hash(file.name):x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{hash(file.name):x}")
    (repository / "refs" / "main").write_text(commit)
    return repository


def test_a_hub_name_opens_from_the_cache(hub):
    assert same(open_checkpoint("org/name"))
    assert same(open_checkpoint(f"org/name@{'0' * 40}"))


def test_a_folder_of_the_same_name_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(Path("org/name"), {"here": torch.ones(1)})
    assert set(open_checkpoint("org/name").specs) == {"here"}


@pytest.mark.parametrize("ref", ["org/absent", "org/name@other"])
def test_what_the_cache_lacks_is_a_request_error(ref, hub):
    assert "cannot be reached" in refusal(ref)


def test_a_mistyped_folder_gets_a_hint_even_if_it_looks_like_a_hub_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(Path("runs/stories"))
    assert "did you mean 'stories'" in refusal("runs/storeis")


def test_a_snapshot_that_lacks_a_shard_is_refused(hub):
    (hub / "snapshots" / ("0" * 40) / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal("org/name", UnsafeError)


def test_hub_environment_variables_are_honoured(hub, tmp_path):
    code = "from lfm.checkpoint import open_checkpoint; print(sorted(open_checkpoint('org/name').specs))"
    for setting in ({"HF_HUB_CACHE": str(tmp_path / "hub")}, {"HF_HOME": str(tmp_path)}):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HUB_OFFLINE": "1", **setting}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['a', 'b', 'c']"


# --- digests

WEIGHTS = st.dictionaries(
    st.text(max_size=4),
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), st.integers(0, 5)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.data())
def test_a_digest_does_not_depend_on_order_and_does_on_everything_else(shapes, data):
    tensors = {name: torch.arange(count).to(dtype) for name, (dtype, count) in shapes.items()}
    digest = MemoryWeights(tensors).digest
    assert MemoryWeights(dict(reversed(tensors.items()))).digest == digest
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    others = [
        {**tensors, name: tensor[None]},
        {**tensors, name: tensor.view(torch.uint8)},
        {**tensors, name + "x": tensor},
    ]
    if len(tensor):
        bits = tensor.clone().view(torch.uint8)
        bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        others.append({**tensors, name: bits.view(tensor.dtype)})
    assert all(MemoryWeights(other).digest != digest for other in others)


def test_a_name_cannot_imitate_another_tensor():
    two = MemoryWeights({"a": torch.ones(1), "b": torch.ones(1)})
    held = two.tensor_digests()["a"]
    for fake in (f"a\0F32\0[1]\0{held}\nb", f'a", "F32", [1], "{held}"]\n["b'):
        assert MemoryWeights({fake: torch.ones(1)}).digest != two.digest


def test_a_digest_does_not_depend_on_the_files(tmp_path):
    digest = MemoryWeights(TENSORS).digest
    assert open_checkpoint(model(tmp_path / "m")).digest == digest
    assert open_checkpoint(sharded(tmp_path / "s")).digest == digest


def test_remembered_digests_are_used_and_a_changed_file_is_noticed(tmp_path, own_cache):
    digest = open_checkpoint(model(tmp_path)).digest
    [entry] = (own_cache / "lfm" / "digests").iterdir()
    assert open_checkpoint(tmp_path).digest == digest
    entry.write_text(json.dumps(dict.fromkeys(TENSORS, "known")))
    assert open_checkpoint(tmp_path).weights.tensor_digests()["a"] == "known"
    file = tmp_path / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x55")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tools do that keep times
    assert open_checkpoint(tmp_path).digest not in (digest, "known")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "b": 2, "c": 3}', '{"a": "x"}'])
def test_a_damaged_digest_cache_is_ignored(content, tmp_path, own_cache):
    digest = open_checkpoint(model(tmp_path)).digest
    [entry] = (own_cache / "lfm" / "digests").iterdir()
    entry.write_text(content)
    assert open_checkpoint(tmp_path).digest == digest


def test_a_digest_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # works for root, too
    assert open_checkpoint(model(tmp_path / "m")).digest == MemoryWeights(TENSORS).digest
    locked = tmp_path / "locked"
    locked.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked))
    assert open_checkpoint(tmp_path / "m").digest == MemoryWeights(TENSORS).digest


def test_a_user_without_a_home_has_no_digest_cache(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert digests.recall("x", {}) is None
    digests.remember("x", {})


def test_weights_that_change_while_they_are_hashed_have_no_digest(tmp_path, monkeypatch):
    opened = open_checkpoint(model(tmp_path))
    states = iter(["before", "after"])
    monkeypatch.setattr(digests, "state", lambda specs: next(states))
    with pytest.raises(RequestError, match="changed while"):
        _ = opened.digest


def test_what_a_writer_knows_need_not_be_hashed_again(tmp_path):
    sharded(tmp_path)
    remember_output(tmp_path, dict.fromkeys(TENSORS, "known"))
    assert open_checkpoint(tmp_path).weights.tensor_digests() == dict.fromkeys(TENSORS, "known")


# --- descriptors


def test_no_descriptor_is_left_open(tmp_path):
    sharded(tmp_path)
    open_checkpoint(tmp_path).tensor("a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        opened = open_checkpoint(tmp_path)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(opened.tensor, ["a", "b", "c", "a", "b", "c"]))
    del opened
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_importing_the_package_imports_no_torch():
    code = "import sys, lfm.checkpoint; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
