"""Reading data: every format, every message, splits that never move a row, and files made of noise."""

import io
import json
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lfm.data import DataSpec, Rows, read
from lfm.errors import RequestError

REPOSITORY = Path(__file__).resolve().parents[1]
FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def assets():
    folder = (REPOSITORY / os.environ.get("LFM_ASSETS", "../shared/assets") / "data").resolve()
    if not folder.is_dir():
        pytest.skip("real data is not here; set LFM_ASSETS")
    return folder


@pytest.fixture
def write(tmp_path):
    """Write a file (text as UTF-8, bytes as they are) and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(path, **keys):
    with pytest.raises(RequestError) as caught:
        read(DataSpec(path=str(path), **keys))
    return str(caught.value)


def attempt(action):
    """Return what `action` returns, or the message with which it refuses; any other error is a failure."""
    try:
        return action()
    except RequestError as error:
        return str(error)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def picture(array, kind="PNG"):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def jpegs(*arrays):
    pieces = [picture(array, "JPEG") for array in arrays]
    offsets = np.cumsum([0, *(len(piece) for piece in pieces)])
    return np.frombuffer(b"".join(pieces), dtype=np.uint8), offsets


def grey(count=6, height=2, width=3):
    return np.arange(count * height * width, dtype=np.uint8).reshape(count, height, width)


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("café", 10), ("ナット", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for place in range(2):
            file = tmp_path / "pictures" / name / f"{place}.png"
            file.write_bytes(picture(np.full((2, 3), shade + place)))
    return tmp_path / "pictures"


# The spec


def test_importing_loads_no_optional_library():
    code = "import sys, lfm.data; print({'torch', 'PIL', 'datasets', 'sklearn', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_string_or_path_is_short_for_a_spec():
    assert DataSpec.model_validate("a.txt") == DataSpec.model_validate(Path("a.txt")) == DataSpec(path="a.txt")


@pytest.mark.parametrize(
    "keys",
    [
        {"colums": {}},
        {"held_out": 0},
        {"held_out": 1},
        {"limit": 0},
        {"rotate": 45},
        {"format": "xml"},
        {"separator": ""},
        {"classes": []},
        {"classes": [True]},
        {"part": "test"},
    ],
)
def test_a_spec_refuses_what_it_does_not_know(keys):
    with pytest.raises(ValidationError):
        DataSpec(path="a.txt", **keys)


def test_every_key_of_a_spec_is_described_and_frozen():
    assert all(field.description for field in DataSpec.model_fields.values())
    with pytest.raises(ValidationError):
        DataSpec(path="a").path = "b"


# Formats


def test_jsonl(write):
    rows = read(write("a.jsonl", '{"text": "un café", "n": [1, null]}\r\n\n  {"n": 2.5, "text": "né\u2028en"}\n'))
    assert rows.columns == {"text": ["un café", "né\u2028en"], "n": [[1, None], 2.5]}
    assert (rows.kind, rows.joined, rows.lines) == ("text", None, [1, 3])
    assert rows.where(1).endswith("a.jsonl:3")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '"one"\n"two"\n'),
        ("a.ndjson", '{"text": "one"}\n"two"'),
        ("a.json", '["one", "two"]'),
        ("a.json", '[{"text": "one"}, "two"]'),
        ("a.json", '{"version": 1, "data": ["one", "two"]}'),
        ("a.csv", "text\none\ntwo\n"),
        ("a.txt", "one\n\ntwo\n"),
        ("A.TXT", "\ufeff\none\n \t\n\ntwo"),
    ],
)
def test_texts_are_rows_whatever_the_file(write, name, content):
    rows = read(write(name, content))
    assert rows.columns["text"] == ["one", "two"]
    assert rows.kind == "text"


def test_json_rows_are_named_by_their_place(write):
    rows = read(write("a.json", '[{"text": "a", "label": "x"}, {"label": "y", "text": "b"}]'))
    assert rows.kind == "text-label"
    assert rows.classes == ["x", "y"]
    assert rows.take([1]).where(0).endswith("a.json[1]")


def test_csv(write):
    content = 'text,label,note\n"a, ""b""\nc",1,\n\nsecond,0,x\n'
    rows = read(write("a.csv", content))
    assert rows.columns["text"] == ['a, "b"\nc', "second"]
    assert rows.columns["label"].dtype == np.int64
    assert rows.columns["label"].tolist() == [1, 0]
    assert rows.columns["note"] == ["", "x"]
    assert rows.lines == [2, 5]


def test_csv_takes_long_fields_and_leaves_the_module_as_it_was(write):
    import csv

    before = csv.field_size_limit()
    assert len(read(write("a.csv", f"text\n{'x' * 200_000}\n")).columns["text"][0]) == 200_000
    assert csv.field_size_limit() == before


def test_tsv(write):
    rows = read(write("a.tsv", "text\tlabel\nun, deux\t007\ntrois\t1\n"))
    assert rows.columns == {"text": ["un, deux", "trois"], "label": ["007", "1"]}


def test_paragraphs(write):
    rows = read(write("a.txt", "\n \n  First line\r\nsecond line\r\n \t \r\n\r\nlast\x0bone"))
    assert rows.columns["text"] == ["  First line\nsecond line", "last\x0bone"]
    assert (rows.lines, rows.joined) == ([3, 7], "\n\n")


def test_a_separator_keeps_every_character(write):
    content = "one\n<|end|>\ntwo\nlines<|end|> \n<|end|>\n\nthree"
    rows = read(DataSpec(path=write("a.txt", content), separator="<|end|>"))
    assert rows.columns["text"] == ["one\n", "\ntwo\nlines", "\n\nthree"]
    assert (rows.lines, rows.joined) == ([1, 3, 7], "<|end|>")


def test_label_text(write):
    path = write("a.txt", "1 good film \n\n0\tvery bad\n")
    rows = read(DataSpec(path=path, format="label-text"))
    assert rows.columns["text"] == ["good film", "very bad"]
    assert rows.classes == [0, 1]
    assert rows.lines == [1, 3]


@pytest.mark.parametrize("labels", ["y", "labels"])
@pytest.mark.parametrize("images", ["x", "images"])
def test_npz(write, images, labels):
    stack = np.stack([grey()] * 3, axis=-1)
    path = write("a.npz", npz(**{images: stack, labels: np.arange(6, dtype=np.uint8)}))
    rows = read(path)
    assert rows.kind == "image-label"
    assert rows.columns["image"].dtype == np.uint8
    assert np.array_equal(rows.columns["image"], stack)
    assert rows.columns["label"].dtype == np.int64
    assert rows.where(5).endswith("a.npz[5]")


def test_npz_splits(write):
    train, test = grey(4), grey(2)
    path = write("a.npz", npz(x_train=train, y_train=np.arange(4), x_test=test, y_test=np.arange(2)))
    assert len(read(DataSpec(path=path, split="train"))) == 4
    assert len(read(DataSpec(path=path, split="test"))) == 2
    assert "has splits train, test; choose one, such as split: train" in refusal(path)
    assert "no split 'tran', it has train, test; did you mean 'train'?" in refusal(path, split="tran")
    assert len(read(write("b.npz", npz(x_train=train)))) == 4


def test_npz_shapes(write):
    flags = np.zeros((2, 3, 4, 5), dtype=bool)
    flags[1, 2] = True
    rows = read(write("a.npz", npz(images=flags, labels=np.arange(6).reshape(2, 3))))
    assert rows.columns["image"].shape == (6, 4, 5)
    assert rows.columns["image"].max(axis=(1, 2)).tolist() == [0] * 5 + [255]
    assert rows.columns["label"].tolist() == list(range(6))
    assert read(write("b.npz", npz(x=grey()[..., None]))).columns["image"].shape == (6, 2, 3)
    assert read(write("b.npz", npz(x=grey()))).kind == "image"
    assert read(write("c.npz", npz(x=grey(2), y=np.array(["a", "é"])))).columns["label"] == ["a", "é"]


def test_jpeg_npz(write):
    raw, offsets = jpegs(np.full((4, 5, 3), 100), np.full((4, 5, 3), 200))
    path = write("a.npz", npz(jpeg_train=raw, offsets_train=offsets, y_train=np.array([3, 1])))
    rows = read(DataSpec(path=path, split="train"))
    assert rows.columns["image"].shape == (2, 4, 5, 3)
    assert rows.columns["image"].mean(axis=(1, 2, 3)).round().tolist() == [100, 200]
    assert rows.columns["label"].tolist() == [3, 1]


def test_image_folder(folder):
    (folder / ".hidden").mkdir()
    (folder / "café" / "notes.txt").write_text("not a picture")
    (folder / "café" / "._0.png").write_text("what some systems leave behind")
    rows = read(str(folder))
    assert rows.columns["image"].shape == (4, 2, 3)
    assert rows.columns["image"][:, 0, 0].tolist() == [10, 11, 200, 201]
    assert rows.columns["label"] == ["café", "café", "ナット", "ナット"]


def test_pictures_of_different_kinds(folder):
    before = read(str(folder))
    (folder / "café" / "2.PNG").write_bytes(picture(np.full((2, 3, 3), [1, 2, 3])))
    mixed = read(str(folder))
    assert mixed.columns["image"].shape == (5, 2, 3, 3)
    assert set(before.keys.tolist()) < set(mixed.keys.tolist())  # a colour picture moves no grey one
    assert before.digest != read(DataSpec(path=str(folder), limit=4)).digest

    (folder / "café" / "3.png").write_bytes(picture(np.zeros((7, 9))))
    rows = read(DataSpec(path=str(folder), rotate=90, invert=True))
    assert [image.shape for image in rows.columns["image"]] == [(3, 2, 3)] * 3 + [(9, 7, 3)] + [(3, 2, 3)] * 2
    assert rows.take([3]).columns["image"][0].min() == 255
    assert set(before.keys.tolist()) < set(rows.keys.tolist())


def test_folders_named_by_numbers_are_whole_number_labels(folder):
    (folder / "café").rename(folder / "7")
    (folder / "ナット").rename(folder / "3")
    assert read(str(folder)).classes == [3, 7]


def test_digits():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    rows = read("sklearn:digits")
    assert rows.columns["image"].shape == (1797, 8, 8)
    assert (rows.columns["image"].min(), rows.columns["image"].max()) == (0, 255)
    assert rows.classes == list(range(10))


def test_topics():
    rows = read("pydoc:topics")
    assert (rows.kind, rows.joined) == ("text", None)
    assert "lambda" in rows.columns["topic"]


class FakeDataset:
    """A data set as the library gives it: two pictures and their labels."""

    column_names = ("img", "label")

    def __getitem__(self, name):
        from PIL import Image

        return {"img": [Image.fromarray(grey(1)[0])] * 2, "label": [1, 0]}[name]


@pytest.fixture
def fake_datasets(monkeypatch):
    asked = []
    module = types.ModuleType("datasets")
    train = FakeDataset()

    def load_dataset(name, config):
        asked.append((name, config))
        if name == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist")
        return {"train": train, "test": train}

    module.load_dataset = load_dataset
    module.load_from_disk = lambda path: train
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_datasets(fake_datasets, tmp_path):
    rows = read(DataSpec(path="hf:org/name:fine", split="train", columns={"image": "img"}))
    assert fake_datasets == [("org/name", "fine")]
    assert (rows.kind, rows.columns["image"].shape, rows.classes) == ("image-label", (2, 2, 3), [0, 1])
    assert "has splits train, test" in refusal("hf:org/name")
    assert "no split 'tests'" in refusal("hf:org/name", split="tests")
    assert "FileNotFoundError: Dataset 'org/none' doesn't exist" in refusal("hf:org/none")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert len(read(str(tmp_path))) == 2
    assert "has no splits, got split: train" in refusal(tmp_path, split="train")


@pytest.mark.parametrize(
    ("module", "path", "command"),
    [
        ("datasets", "hf:org/name", "pip install datasets"),
        ("sklearn.datasets", "sklearn:digits", "pip install scikit-learn"),
        ("pydoc_data.topics", "pydoc:topics", "a complete Python"),
    ],
)
def test_a_missing_library_is_named_with_its_command(monkeypatch, module, path, command):
    monkeypatch.setitem(sys.modules, module, None)
    assert command in refusal(path)


def test_pictures_need_pillow(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "reading pictures needs pillow" in refusal(folder)


# Columns


def test_columns_are_renamed(write):
    path = write("a.csv", "text,review,stars\nold,new,5\n")
    rows = read(DataSpec(path=path, columns={"text": "review", "label": "stars"}))
    assert rows.columns["text"] == ["new"]
    assert rows.columns["label"].tolist() == [5]
    assert rows.columns.keys() == {"text", "label"}


def test_alpaca_becomes_prompt_and_completion(write):
    entries = [
        {"instruction": "Add.", "input": "1 {2}", "output": "3", "rejected": "4"},
        {"instruction": "Greet.", "input": "", "output": "Hé", "rejected": ""},
    ]
    rows = read(write("a.json", json.dumps(entries)))
    assert rows.kind == "instruction"
    assert rows.columns.keys() == {"prompt", "completion", "rejected"}
    assert rows.columns["completion"] == ["3", "Hé"]
    first, second = rows.columns["prompt"]
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n")
    assert second.endswith("### Instruction:\nGreet.\n\n### Response:\n")
    assert "Input" not in second


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("text", "text"),
        ("text label", "text-label"),
        ("prompt completion text", "instruction"),
        ("image label", "image-label"),
        ("image", "image"),
        ("prompt subject", "other"),
        ("", "other"),
    ],
)
def test_kind_follows_from_the_columns(names, kind):
    assert Rows({name: ["x"] for name in names.split()}, "here").kind == kind


def test_rows_without_labels_have_no_classes(write):
    assert "no label column" in refusal(write("a.txt", "x"), classes=[1])


def test_rows_refuse_columns_of_different_length():
    with pytest.raises(RequestError, match="text has 2, label has 1"):
        Rows({"text": ["a", "b"], "label": [1]}, "here")


# Messages: (name, content, keys, what the message holds)

DEEP = '{"a": ' + "[" * 70 + "]" * 70 + "}"
MESSAGES = {
    "empty file": ("a.jsonl", "", {}, ["a.jsonl: the file is empty"]),
    "blank file": ("a.txt", "\ufeff \n\n", {}, ["a.txt: the file is empty"]),
    "malformed line": ("a.jsonl", '"a"\n{"text": }\n', {}, ["a.jsonl:2: not JSON: Expecting value, at column 10"]),
    "list in jsonl": ("a.jsonl", '[\n{"text": "a"}\n]', {}, ["looks like one JSON list", "try format: json"]),
    "malformed json": ("a.json", '[\n{"text": "a"},\n}', {}, ["a.json:3: not JSON"]),
    "deep line": ("a.jsonl", "[" * 100_000, {}, ["a.jsonl:1: nested too deeply"]),
    "deep file": ("a.json", "[" * 100_000, {}, ["a.json: nested too deeply"]),
    "deep row": ("a.jsonl", f'"a"\n{DEEP}', {}, ["a.jsonl:2: nested too deeply; a row may hold 64 levels"]),
    "endless number": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", {}, ["a.jsonl:1: a number has too many digits"]),
    "missing column": ("a.jsonl", '{"text": "a", "n": 1}\n{"text": "b"}', {}, ["a.jsonl:2: columns differ", "lacks n"]),
    "other column": (
        "a.json",
        '[{"text": "a", "label": 1}, {"text": "b", "lable": 1}]',
        {},
        ["a.json[1]: columns differ", "lacks label and has lable in addition; did you mean 'label'?"],
    ),
    "text among objects": ("a.jsonl", '{"prompt": "a"}\n"b"', {}, ["a.jsonl:2: columns differ"]),
    "list as row": ("a.jsonl", '"a"\n[1]', {}, ["a.jsonl:2: expected an object or a text, got a list"]),
    "empty object": ("a.jsonl", "{}", {}, ["a.jsonl:1: an object without columns"]),
    "object as json": ("a.json", '{"rows": []}', {}, ["expected a list of rows", "got an object with rows"]),
    "number as json": ("a.json", "3", {}, ["got the number 3"]),
    "empty list": ("a.json", "[]", {}, ["a.json: no rows"]),
    "null text": ("a.jsonl", '{"text": null}', {}, ["a.jsonl:1: text: expected text, got null"]),
    "NaN text": ("a.jsonl", '{"text": NaN}', {}, ["text: expected text, got the number nan"]),
    "infinite text": ("a.json", '[{"text": 1e999}]', {}, ["a.json[0]: text: expected text, got the number inf"]),
    "huge text": ("a.jsonl", '{"text": ' + "9" * 4000 + "}", {}, ["got the number 9999", "..."]),
    "list text": ("a.jsonl", '{"prompt": [], "completion": "a"}', {}, ["prompt: expected text, got a list"]),
    "true output": ("a.jsonl", '{"instruction": "a", "output": true}', {}, ["output: expected text, got true"]),
    "half character": ("a.jsonl", r'{"text": "ab\ud800"}', {}, ["half of a surrogate pair (U+D800) at character 2"]),
    "half label": ("a.jsonl", r'{"text": "a", "label": "\ud800"}', {}, ["label: half of a surrogate pair"]),
    "float label": ("a.jsonl", '{"text": "a", "label": 0.5}', {}, ["expected a whole number or text, got the number"]),
    "true label": ("a.jsonl", '{"text": "a", "label": true}', {}, ["label: expected a whole number or text, got true"]),
    "huge label": ("a.jsonl", '{"text": "a", "label": 9223372036854775808}', {}, ["does not fit into 64 bits"]),
    "mixed labels": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}',
        {},
        ["a.jsonl:2: label: got the text '1', but the number 1 in", "a.jsonl:1"],
    ),
    "image that is none": ("a.jsonl", '{"image": "a.png"}', {}, ["image: expected a picture, got the text 'a.png'"]),
    "ragged csv": ("a.csv", "a,b\n1,2\n3\n4,5,6\n", {}, ["a.csv:3: expected 2 fields", "got 1", "a.csv:4"]),
    "header only": ("a.csv", "text,label\n", {}, ["a.csv: no rows"]),
    "repeated header": ("a.csv", "text,text\na,b\n", {}, ["names 'text' twice"]),
    "open quote": ("a.csv", 'text\na\n"b\nc\n', {}, ["a.csv:3: a record that cannot be read", "close each quote"]),
    "stray quote": ("a.tsv", 'text\tlabel\n"a" b\t1\n', {}, ["a.tsv:2", "write a quote inside quotes twice"]),
    "wrong column": (
        "a.csv",
        "reviews,stars\na,1\n",
        {"columns": {"text": "review", "label": "stars"}},
        ["no column 'review' to use as 'text', it has reviews, stars; did you mean 'reviews'?"],
    ),
    "not UTF-8": ("a.txt", b"ab\ncaf\xe9", {}, ["a.txt:2: not UTF-8: byte 0xe9 at offset 6"]),
    "not UTF-8 after BOM": ("a.txt", b"\xef\xbb\xbfab\xff", {}, ["byte 0xff at offset 5"]),
    "UTF-16": ("a.txt", "text".encode("utf-16"), {}, ["at offset 0; it looks like UTF-16"]),
    "no text": ("a.txt", "1 good\n\n0\n", {"format": "label-text"}, ["a.txt:3: no text; expected a label"]),
    "no label": ("a.txt", " good film\n", {"format": "label-text"}, ["a.txt:1: no label", "got 'good film'"]),
    "unknown suffix": ("a.parquet", "x", {}, ["cannot tell the format from '.parquet'", "json (.json)", "npz (.npz)"]),
    "no suffix": ("data", "x", {}, ["cannot tell the format from 'a name without suffix'"]),
    "split of text": ("a.txt", "x", {"split": "train"}, ["split is for npz and datasets, this is text"]),
    "separator of json": ("a.json", '["a"]', {"separator": "\n"}, ["separator is for format: text, this is json"]),
    "rotated text": ("a.txt", "x", {"rotate": 90}, ["rotate: 90 is for images, got rows of text"]),
    "inverted text": ("a.txt", "x", {"invert": True}, ["invert: true is for images"]),
    "absent class": (
        "a.jsonl",
        '{"text": "a", "label": "pos"}',
        {"classes": ["poss", 3]},
        ["no row is of class 'poss', the labels are pos; did you mean 'pos'?", "no row is of class 3"],
    ),
    "file as folder": ("a.png", "x", {"format": "images"}, ["format: images is read from a folder, this is a file"]),
    "no zip": ("a.npz", b"x" * 100, {}, ["a.npz: not an npz archive, or cut off"]),
    "cut off zip": ("a.npz", npz(x=grey())[:-30], {}, ["a.npz: not an npz archive, or cut off"]),
    "no images": ("a.npz", npz(z=grey()), {}, ["no images: expected arrays such as", "got z"]),
    "empty archive": ("a.npz", npz(), {}, ["no images", "got none"]),
    "object array": ("a.npz", npz(x=np.array([None, {}])), {}, ["x: cannot be read", "allow_pickle=False"]),
    "float images": ("a.npz", npz(x=np.zeros((2, 3, 3))), {}, ["x: expected uint8 images, 0 to 255, got float64"]),
    "flat images": ("a.npz", npz(x=grey().reshape(6, 6)), {}, ["expected images of shape", "got (6, 6)"]),
    "scalar images": ("a.npz", npz(x=np.uint8(3)), {}, ["expected images of shape", "got ()"]),
    "deep images": ("a.npz", npz(x=np.zeros((1, 2, 2, 4), np.uint8)), {}, ["expected images of shape", "(1, 2, 2, 4)"]),
    "no image at all": ("a.npz", npz(x=grey()[:0]), {}, ["a.npz: no rows"]),
    "float labels": ("a.npz", npz(x=grey(), y=np.zeros(6)), {}, ["y: expected an array of whole numbers", "float64"]),
    "scalar labels": ("a.npz", npz(x=grey(), y=np.int64(3)), {}, ["y: expected an array of whole numbers", "int64 ()"]),
    "huge labels": ("a.npz", npz(x=grey(1), y=np.array([2**63], np.uint64)), {}, ["y: expected an array of whole"]),
    "lengths differ": ("a.npz", npz(x=grey(), y=np.arange(5)), {}, ["lengths differ: x has 6 images, y has 5 labels"]),
    "split of whole": ("a.npz", npz(x=grey()), {"split": "train"}, ["has no splits, got split: train"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(write, case):
    name, content, keys, parts = MESSAGES[case]
    message = refusal(write(name, content), **keys)
    assert [part for part in parts if part not in message] == [], message


def test_problems_are_collected_and_counted(write):
    message = refusal(write("a.jsonl", '"fine"\n' + "{\n" * 42))
    assert len(message.splitlines()) == 6
    assert message.endswith("and 37 more")
    assert "more" not in refusal(write("b.jsonl", '"fine"\n' + "{\n" * 5))


def test_missing_files(tmp_path, write):
    write("train.jsonl", '"x"')
    assert "no such file or folder; did you mean 'train.jsonl'?" in refusal(tmp_path / "trian.jsonl")
    assert "nor is there a folder" in refusal(tmp_path / "none" / "train.jsonl")
    assert "path is empty" in refusal("")
    assert "a\0b" in refusal("a\0b")
    assert "cannot be read" in refusal("x" * 5000)
    assert "did you mean 'sklearn:digits'?" in refusal("sklearn:digit")
    assert "no such built-in data" in refusal("train.jsonl", format="builtin")
    assert "its format is builtin, got format: csv" in refusal("sklearn:digits", format="csv")
    assert "format: csv is read from a file, this is a folder" in refusal(tmp_path, format="csv")


def test_files_that_may_not_be_read(write, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read every file, whatever its mode
    assert "a.txt: cannot be read: Permission denied" in refusal(write("a.txt", "x"))


def test_an_archive_that_claims_more_than_there_is(write):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 9)})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    assert "x: cannot be read" in refusal(write("a.npz", file.getvalue()))


def test_bad_folders(tmp_path, folder):
    (folder / "café" / "0.png").write_bytes(b"\x89PNG noise")
    assert "0.png: not a picture that can be read" in refusal(folder)
    (folder / "empty").mkdir()
    assert "empty: no pictures of this class" in refusal(folder)
    flat = tmp_path / "flat"
    flat.mkdir()
    assert "no classes" in refusal(flat)
    (flat / "a.png").write_bytes(picture(grey(1)[0]))
    assert "got 1 picture and no folders" in refusal(flat)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"offsets": [0, 10**9, 10**9 + 1]}, ["offsets must lie in 0 to", "1,000,000,001"]),
        ({"offsets": [-1, 5, 9]}, ["offsets must lie in 0 to"]),
        ({"offsets": [9, 5, 20]}, ["offsets must never fall, got 9 then 5 at image 0"]),
        ({"offsets": [0.0, 5.0, 9.0]}, ["expected whole-number offsets"]),
        ({"offsets": [[0, 5, 9]]}, ["expected whole-number offsets"]),
        ({"offsets": [0]}, ["lengths differ: jpeg has 0 images"]),
        ({"offsets": np.zeros(0, np.int64), "y": np.zeros(0, np.int64)}, ["expected whole-number offsets"]),
        ({"offsets": [0, 5, 9]}, ["jpeg[0]: not a picture that can be read", "jpeg[1]"]),
        ({"jpeg": np.zeros((2, 2), np.uint8)}, ["expected the bytes of all images, uint8 (bytes,), got uint8 (2, 2)"]),
        ({"y": [1, 2, 3]}, ["lengths differ: jpeg has 2 images, y has 3 labels"]),
    ],
)
def test_bad_jpeg_archives(write, changes, parts):
    raw, offsets = jpegs(grey(1, 4, 4)[0], grey(1, 4, 4)[0])
    arrays = {"jpeg": raw, "offsets": offsets, "y": [1, 2], **changes}
    message = refusal(write("a.npz", npz(**{name: np.asarray(array) for name, array in arrays.items()})))
    assert [part for part in parts if part not in message] == [], message


def test_jpeg_archive_without_offsets(write):
    assert "no array 'offsets', it has jpeg" in refusal(write("a.npz", npz(jpeg=jpegs(grey(1)[0])[0])))


def test_only_a_corrupt_jpeg_is_named(write):
    raw, offsets = jpegs(*grey(4, 8, 8))
    raw = raw.copy()
    raw[offsets[2] : offsets[3]] = 0
    message = refusal(write("a.npz", npz(jpeg=raw, offsets=offsets)))
    assert "jpeg[2]" in message
    assert "jpeg[1]" not in message


def test_archives_with_other_things_in_them(write):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", b"not an array")
    assert "x: not an array" in refusal(write("a.npz", file.getvalue()))


def test_an_archive_is_never_unpickled(write, monkeypatch):
    import pickle

    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    refusal(write("a.npz", npz(x=np.array([object], dtype=object))))


# Selecting


@pytest.fixture
def digits(write):
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 5), dtype=np.uint8)
    return write("digits.npz", npz(x=images, y=np.arange(300) % 3))


def test_classes_and_limit(digits):
    rows = read(DataSpec(path=digits, classes=[2, "0"], limit=5))
    assert rows.columns["label"].tolist() == [0, 2, 0, 2, 0]
    assert [rows.where(row).rpartition("[")[2] for row in range(5)] == ["0]", "2]", "3]", "5]", "6]"]


def test_limit_comes_after_the_part(digits):
    held_out = read(DataSpec(path=digits, part="held_out", held_out=0.5))
    limited = read(DataSpec(path=digits, part="held_out", held_out=0.5, limit=7))
    assert limited.digest == held_out.take(range(7)).digest


def test_rotate_and_invert(digits):
    plain = read(digits).columns["image"]
    assert np.array_equal(read(DataSpec(path=digits, rotate=90)).columns["image"][3], np.rot90(plain[3]))
    assert np.array_equal(read(DataSpec(path=digits, rotate=180)).columns["image"], plain[:, ::-1, ::-1])
    assert np.array_equal(read(DataSpec(path=digits, invert=True)).columns["image"], 255 - plain)


@pytest.mark.parametrize("keys", [{"rotate": 90}, {"invert": True}, {"rotate": 270, "invert": True}])
def test_a_turned_image_is_split_as_the_one_it_was(digits, keys):
    plain = read(DataSpec(path=digits, part="held_out"))
    turned = read(DataSpec(path=digits, part="held_out", **keys))
    assert turned.columns["label"].tolist() == plain.columns["label"].tolist()
    again = read(DataSpec(path=digits, **keys)).part("held_out")
    assert again.digest == turned.digest != plain.digest


# Splits

words = st.text(max_size=8)


@FEW
@given(st.lists(words, max_size=30), st.lists(words, max_size=30), st.floats(0.01, 0.99), st.randoms())
def test_adding_rows_never_moves_a_row(texts, more, held_out, random):
    few = Rows({"text": texts}, "few")
    shuffled = [*texts, *more]
    random.shuffle(shuffled)
    side = dict(zip(shuffled, Rows({"text": shuffled}, "many").keys < held_out * 2**64, strict=True))
    assert [bool(key < held_out * 2**64) for key in few.keys] == [bool(side[text]) for text in texts]


@FEW
@given(st.lists(words, min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_parts_are_the_whole_and_duplicates_stay_together(texts, held_out):
    rows = Rows({"text": texts}, "here", lines=range(1, len(texts) + 1))
    outcomes = [attempt(lambda name=name: rows.part(name, held_out)) for name in ("train", "held_out")]
    parts = [outcome for outcome in outcomes if isinstance(outcome, Rows)]
    assert all("is empty" in outcome for outcome in outcomes if isinstance(outcome, str))
    assert all([texts[line - 1] for line in part.lines] == part.columns["text"] for part in parts)
    assert sorted(text for part in parts for text in part.columns["text"]) == sorted(texts)
    assert len(parts) == 1 or not set(parts[0].columns["text"]) & set(parts[1].columns["text"])


@FEW
@given(st.lists(words, min_size=1, max_size=40), st.floats(0.01, 0.98))
def test_what_is_held_out_stays_held_out_when_more_is(texts, held_out):
    rows = Rows({"text": texts}, "here")
    below = rows.keys < np.uint64(held_out * 2**64)
    assert (rows.keys[below] < np.uint64((held_out + 0.01) * 2**64)).all()


def test_the_share_is_about_right():
    rows = Rows({"text": [str(number) for number in range(5000)]}, "here")
    assert 400 < len(rows.part("held_out")) < 600
    assert len(rows.part("train")) + len(rows.part("held_out")) == len(rows.part("all")) == 5000


def test_keys_are_the_same_on_every_machine():
    rows = Rows({"text": ["café"], "label": np.array([3])}, "here")
    assert rows.keys.tolist() == [16698086918938196293]


def test_a_key_ignores_the_file_it_came_from(write):
    as_csv = read(write("a.csv", "label,text\n1,a\n0,b\n"))
    as_json = read(write("a.json", '[{"text": "a", "label": 1}, {"text": "b", "label": 0}]'))
    as_text = read(DataSpec(path=write("a.txt", "1 a\n0 b\n"), format="label-text"))
    assert as_csv.keys.tolist() == as_json.keys.tolist() == as_text.keys.tolist()
    assert as_csv.digest == as_json.digest == as_text.digest
    longer = read(write("b.csv", "label,text\n1,a\n0,b\nx,c\n"))  # its labels are text now
    assert longer.keys.tolist()[:2] == as_csv.keys.tolist()
    assert longer.take([0, 1]).digest != as_csv.digest


def test_an_empty_part_says_what_to_do(write):
    path = write("a.txt", "one row")
    message = refusal(path, part="held_out", held_out=1e-9)
    assert "part: held_out of 1 row is empty at held_out: 1e-09; raise held_out, add rows" in message
    assert "lower held_out" in refusal(path, part="train", held_out=1 - 1e-9)


def test_parts_refuse_wrong_arguments():
    rows = Rows({"text": ["a"]}, "here")
    with pytest.raises(RequestError, match="did you mean 'train'"):
        rows.part("trian")
    with pytest.raises(RequestError, match="between 0 and 1, got 1"):
        rows.part("train", 1)


def test_digest_follows_the_content():
    def digest(texts, joined=None, name="text"):
        return Rows({name: texts}, "anywhere", joined=joined).digest

    assert digest(["a", "b"]) == digest(("a", "b")) == Rows({"text": ["a", "b"]}, "elsewhere", lines=[1, 2]).digest
    others = [digest(["ab"]), digest(["b", "a"]), digest(["a", "b"], "\n\n"), digest(["a", "b"], name="prompt")]
    assert len({digest(["a", "b"]), *others, digest([1]), digest(["1"])}) == 7
    assert len(digest([])) == 64


@FEW
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=20))
def test_any_text_survives_jsonl(tmp_path, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    rows = read(str(path))
    assert rows.columns["text"] == texts
    assert len(rows.digest) == 64


# Noise

FORMATS = ("jsonl", "json", "csv", "tsv", "text", "label-text", "npz")
JSONISH = st.text(alphabet='[]{}":,\\ \n019.eE-+NaNtruefalsenullutext\ud800é', max_size=60)


def read_noise(folder, kind, content):
    path = folder / "noise"
    path.write_bytes(content)
    outcome = attempt(lambda: read(DataSpec(path=str(path), format=kind)))
    if isinstance(outcome, Rows):
        assert len(outcome) == len(outcome.keys) > 0
        assert outcome.digest
    else:
        assert outcome.startswith(str(path))


@pytest.mark.parametrize("kind", FORMATS)
@FEW
@given(content=st.binary(max_size=200) | JSONISH.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_noise_is_refused_or_read(tmp_path, kind, content):
    read_noise(tmp_path, kind, content)


@settings(FEW, max_examples=80)
@given(data=st.data())
def test_damaged_archives_are_refused_or_read(tmp_path, data):
    raw, offsets = jpegs(*grey(2, 4, 4))
    archives = npz(x=grey(), y=np.arange(6)), npz(jpeg=raw, offsets=offsets, y=np.arange(2))
    content = bytearray(data.draw(st.sampled_from(archives)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    read_noise(tmp_path, "npz", bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))


@FEW
@given(content=st.binary(max_size=200), cut=st.integers(0, 60))
def test_damaged_pictures_are_refused_or_read(tmp_path, content, cut):
    (tmp_path / "class").mkdir(exist_ok=True)
    for start in (b"", picture(grey(1, 4, 4)[0])[:cut], picture(grey(1, 4, 4)[0], "JPEG")[: 10 * cut]):
        (tmp_path / "class" / "a.png").write_bytes(start + content)
        outcome = attempt(lambda: read(str(tmp_path)))
        assert isinstance(outcome, Rows) or "a.png" in outcome


# Real data


@pytest.mark.parametrize(
    ("name", "keys", "count", "kind"),
    [
        ("mnist.npz", {"split": "test"}, 10_000, "image-label"),
        ("cifar10-jpeg.npz", {"split": "test"}, 10_000, "image-label"),
        ("counterfact-10000.jsonl", {}, 10_000, "other"),
        ("instructions-1100.json", {}, 1_100, "instruction"),
        ("tinystories-600.json", {}, 600, "text"),
        ("tiny-shakespeare.txt", {}, 7_222, "text"),
        ("sst2-dev.txt", {"format": "label-text"}, 872, "text-label"),
        ("trec-train.txt", {"format": "label-text"}, 5_452, "text-label"),
    ],
)
def test_real_data(assets, name, keys, count, kind):
    rows = read(DataSpec(path=str(assets / name), **keys))
    assert (len(rows), rows.kind) == (count, kind)
    assert 0.08 < len(rows.part("held_out")) / count < 0.12


def test_paragraphs_give_the_play_again(assets):
    path = assets / "tiny-shakespeare.txt"
    rows = read(str(path))
    play = re.sub(r"\n{3,}", "\n\n", path.read_text(encoding="utf-8")).strip("\n")
    assert rows.joined.join(rows.columns["text"]) == play
