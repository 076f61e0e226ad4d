"""Headers: what the safetensors library writes we read alike; what we accept it accepts; hostile ones are refused."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lfm.checkpoint import FileWeights, dtype_name, read_header, torch_dtype
from lfm.checkpoint._header import ITEM_BITS, Spec, write_header
from lfm.errors import RequestError, UnsafeError

ASSETS = Path(os.environ.get("LFM_ASSETS", Path(__file__).parents[2] / ".." / "shared" / "assets"))
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [name for name in ITEM_BITS if name not in ("F4", "F6_E2M3", "F6_E3M2")]


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def patterned(dtype, shape):
    count = torch.Size(shape).numel() * torch_dtype(dtype).itemsize
    values = torch.arange(count, dtype=torch.int64) % (2 if dtype == "BOOL" else 251)
    return values.to(torch.uint8).view(torch_dtype(dtype)).reshape(shape)


def same_bytes(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def agrees_with_the_library(path):
    specs, metadata = read_header(path)
    ours, theirs = FileWeights(specs), load_file(path)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    assert set(specs) == set(theirs)
    assert all(same_bytes(ours.tensor(name), theirs[name]) for name in specs)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("header") / "file.safetensors"


@pytest.mark.skipif(not ASSETS.is_dir(), reason="no LFM_ASSETS folder")
def test_real_checkpoints_read_as_the_library_reads_them():
    files = sorted(ASSETS.glob("checkpoints/*/*.safetensors"))
    assert files
    for file in files:
        agrees_with_the_library(file)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_as_the_library_reads_it(dtype, tmp_path):
    tensors = {"scalar": patterned(dtype, ()), "none": patterned(dtype, (3, 0)), "some": patterned(dtype, (3, 5))}
    save_file(tensors, tmp_path / "x.safetensors")
    assert dtype_name(tensors["some"].dtype) == dtype
    agrees_with_the_library(tmp_path / "x.safetensors")


def test_names_and_metadata_in_any_language_read_as_the_library_reads_them(tmp_path):
    names = ["", "重み.0", "a\0b", 'quo"te', "line\nbreak", "😀", "x" * 5000]
    tensors = {name: torch.full((index,), float(index)) for index, name in enumerate(names)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "ключ": "значение"})
    agrees_with_the_library(tmp_path / "x.safetensors")


def test_a_file_without_tensors_is_a_file(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == ({}, {})


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"b": entry(offsets=(4, 8)), "a": entry(offsets=(0, 4)), "empty": entry(shape=(0,), offsets=(4, 4))}
    assert list(read_header(raw_file(tmp_path / "x", header, bytes(8)))[0]) == ["a", "empty", "b"]


def test_what_we_write_the_library_reads(tmp_path):
    specs = {f"{dtype}:{i}": Spec(dtype, (i, 3)) for dtype in DTYPES for i in (0, 1)}
    header, offsets = write_header(specs, specs)
    size = max(offsets[name] + spec.nbytes for name, spec in specs.items())
    (tmp_path / "x.safetensors").write_bytes(header.ljust(size, b"\1"))
    agrees_with_the_library(tmp_path / "x.safetensors")


def test_a_tensor_cannot_take_the_name_of_the_metadata():
    with pytest.raises(RequestError, match="__metadata__"):
        write_header({"__metadata__": Spec("F32", (1,))}, ["__metadata__"])


HOSTILE = {
    "overlap": {"a": entry(offsets=(0, 4)), "b": entry(offsets=(2, 6))},
    "same bytes twice": {"a": entry(), "b": entry()},
    "hole": {"a": entry(), "b": entry(offsets=(6, 10))},
    "hole in front": {"a": entry(offsets=(4, 8))},
    "trailing bytes": {"a": entry()},
    "cut off": {"a": entry(shape=(1000,), offsets=(0, 4000))},
    "shape that does not match": {"a": entry(shape=(2,), offsets=(0, 4))},
    "shape that overflows": {"a": entry(shape=(2**59, 2**59), offsets=(0, 4))},
    "shape that overflows to nothing": {"a": entry(shape=(2**32, 2**32), offsets=(0, 0))},
    "empty shape that overflows": {"a": entry(shape=(2**59, 2**59, 0), offsets=(0, 0))},
    "empty shape whose strides overflow": {"a": entry(shape=(0, 2**59, 2**59), offsets=(0, 0))},
    "backwards": {"a": entry(shape=(0,), offsets=(8, 0))},
    "negative offset": {"a": entry(offsets=(-4, 0))},
    "negative extents": {"a": entry(shape=(-1, -1), offsets=(0, 4))},
    "huge number": {"a": entry(offsets=(0, 10**300))},
    "float offset": {"a": entry(offsets=(0, 4.0))},
    "bool offset": {"a": entry(shape=(), dtype="U8", offsets=(False, True))},
    "bool extent": {"a": entry(shape=(True,))},
    "text offset": {"a": entry(offsets=("0", "4"))},
    "nested offset": {"a": entry(offsets=([0], [4]))},
    "three offsets": {"a": entry(offsets=(0, 4, 4))},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "one key too many": {"a": {**entry(), "extra": 1}},
    "unknown dtype": {"a": entry(dtype="F31")},
    "dtype that is a list": {"a": entry(dtype=["F32"])},
    "half a byte": {"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))},
    "tensor that is a list": {"a": [1]},
    "metadata that is a list": {"__metadata__": ["x"]},
    "metadata that is null": {"__metadata__": None},
    "metadata with a number": {"__metadata__": {"x": 1}},
    "metadata that nests": {"__metadata__": {"x": {"y": "z"}}},
    "a list": b"[]",
    "a string": b'"a"',
    "nothing": b"",
    "spaces first": b"  {}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "two objects": b"{}{}",
    "not UTF-8": b'{"\xff": 1}',
    "half a surrogate pair": b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "half a surrogate pair in metadata": b'{"__metadata__":{"a":"\\udfff"}}',
    "minus zero": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}',
    "exponent": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0e0,0]}}',
    "not a number": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}',
    "a name twice": b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "a key twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "deep lists": b'{"a":' + b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a very long number": b'{"a":' + b"9" * 100_000 + b"}",
    "very many axes": json.dumps({"a": entry(shape=[2**59] * 100_000)}).encode(),
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(header, tmp_path):
    path = raw_file(tmp_path / "x.safetensors", header, b"\0" * (8 if header == HOSTILE["trailing bytes"] else 4))
    with pytest.raises(UnsafeError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [3, 2**31, 2**62, 2**63, 2**64 - 1])
def test_a_wrong_length_is_refused_without_reserving_memory(length, tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {"a": entry()}, bytes(4), length)
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_the_library_allows_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 200_000_000)  # sparse: takes no space
    with pytest.raises(UnsafeError, match="100,000,001"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8])
def test_files_that_are_too_short_are_refused(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnsafeError):
        read_header(tmp_path / "x")


def test_a_file_that_cannot_be_opened_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match="No such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(RequestError, match="Is a directory"):
        read_header(tmp_path)


def refused_or_agrees(path):
    try:
        read_header(path)
    except UnsafeError:
        return
    agrees_with_the_library(path)


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_right(scratch, content):
    scratch.write_bytes(content)
    refused_or_agrees(scratch)


def valid_bytes():
    specs = {"a.weight": Spec("F32", (2, 3)), "b": Spec("I8", (3,)), "c": Spec("BF16", ()), "d": Spec("U8", (0,))}
    header, _ = write_header(specs, specs)
    return header + bytes(range(sum(spec.nbytes for spec in specs.values())))


VALID = valid_bytes()
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "truncate"]),
        st.integers(0, len(VALID)),
        st.binary(min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def mutate(content, edits):
    content = bytearray(content)
    for how, place, data in edits:
        if how == "truncate" and place > 8:
            del content[place:]
        elif how == "delete":
            del content[place : place + len(data)]
        elif how == "insert":
            content[place:place] = data
        else:
            content[place : place + len(data)] = data
    return bytes(content)


@FUZZ
@given(EDITS, st.booleans())
def test_damaged_files_are_refused_or_right(scratch, edits, mend_length):
    content = mutate(VALID, edits)
    if mend_length:  # so that damage reaches the parser behind the length
        content = struct.pack("<Q", max(len(content) - 8 - 29, 0)) + content[8:]
    scratch.write_bytes(content)
    refused_or_agrees(scratch)


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**32, 2**59, 2**63, -1]), st.floats(), st.booleans(), st.none()
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BITS, "F31", 1]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)
TIDY = st.builds(
    lambda dtype, shape, start: entry(dtype, shape, (start, start + Spec(dtype, tuple(shape)).nbytes)),
    st.sampled_from(["F32", "I8", "BOOL"]),
    st.lists(st.integers(0, 2), max_size=2),
    st.sampled_from([0, 0, 4, 8]),
)


@FUZZ
@given(st.dictionaries(st.text(max_size=3), ENTRIES | TIDY, max_size=3), st.integers(0, 16))
def test_invented_headers_are_refused_or_right(scratch, header, size):
    raw_file(scratch, header, bytes(size))
    refused_or_agrees(scratch)
