"""YAML with lines: plain values only, each with its place; whatever else a file holds is refused with its line."""

import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.errors import RequestError
from lfm.recipe._yaml import MAX_NODES, parse_yaml, read_yaml


def refusal(text):
    with pytest.raises(RequestError) as caught:
        parse_yaml(text, "f")
    return str(caught.value)


def test_every_value_knows_its_line():
    located = parse_yaml("a:\n  b: [1,\n    2]\nc: x\n", "f")
    assert located.value == {"a": {"b": [1, 2]}, "c": "x"}
    assert located.where(("a", "b", 1)) == "f:3: a.b.1"
    assert located.where(("a", "b", 7, "no")) == "f:2: a.b.7.no"
    assert located.where(()) == "f:1"
    assert located.where(("c\nd",)) == "f:1: 'c\\nd'"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2026-01-01\n2026-01-02: b", {"a": "2026-01-01", "2026-01-02": "b"}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: 1e-4", {"a": "1e-4"}),
        ("a: =", {"a": "="}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
        ("a: {<<: [{p: 1}, {p: 2, q: 3}]}", {"a": {"p": 1, "q": 3}}),
        ("", None),
        ("# nothing", None),
    ],
)
def test_values_are_what_people_mean(text, value):
    assert parse_yaml(text, "f").value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "f:2: the key 'a' stands here twice"),
        ("a: 1\n3: 2", "f:2: the key '3' is not text; put it in quotes"),
        ("on: 1", "f:1: the key 'on' is not text; put it in quotes"),
        ("? [a]\n: 1", "f:1: a list or mapping cannot be a key; put it in quotes if it is text"),
        ("a: !!binary aGk=", "f:1: not valid YAML here: the tag 'tag:yaml.org,2002:binary'"),
        ("a: !!set {b}", "f:1: not valid YAML here: the tag 'tag:yaml.org,2002:set'"),
        ("a: !!map b", "f:1: not valid YAML here: the tag 'tag:yaml.org,2002:map'"),
        ("a: !!str {b: 1}", "f:1: not valid YAML here: the tag 'tag:yaml.org,2002:str'"),
        ("a: !!int b", "f:1: not valid YAML here: invalid literal"),
        ("\na: !!python/name:os.system", "f:2: not valid YAML here: the tag"),
        ("a: {<<: 1}", "f:1: `<<` takes a mapping, or a list of them"),
        ("a: 0x" + "f" * 6000, "f:1: a number that needs more than 64 bits"),
        ("a: " + "1" * 6000, "f:1: not valid YAML here: Exceeds the limit"),
        ('a: "\\ud800"', "f:1: half a character"),
        ("a: 1\n--- b", "f:2: not valid YAML: but found another document"),
        ("a:\n\tb: 1", "f:2: not valid YAML: found character '\\t'"),
        ("a: \x00", "f: not valid YAML: unacceptable character"),
        ("a: *b", "f:1: not valid YAML: found undefined alias"),
        ("a: &a\n  <<: *a", "f: nested too deeply"),
        ("[" * 20_000, "f: nested too deeply"),
    ],
)
def test_everything_else_is_refused_with_its_line(text, message):
    assert refusal(text).startswith(message)


@pytest.mark.parametrize("use", ["{<<: [%s]}", "[%s]"])
def test_aliases_cannot_make_a_small_file_enormous(use):
    text = "a0: &a0 {x: 1}\n"
    text += "".join(f"a{n + 1}: &a{n + 1} {use % ','.join([f'*a{n}'] * 10)}\n" for n in range(12))
    assert refusal(text) == f"f: more than {MAX_NODES:,} values, counting every use of an alias"


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, content, message in (
        ("latin", b"a: \xe9", "not UTF-8 text (byte 3)"),
        ("folder", None, "Is a directory"),
    ):
        path = tmp_path / name
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(RequestError) as caught:
            read_yaml(path)
        assert str(caught.value) == f"{path}: {message}"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(plain)
@settings(max_examples=200, deadline=None)
def test_what_pyyaml_writes_is_read_back(value):
    text = yaml.safe_dump(value, allow_unicode=False)
    assert parse_yaml(text, "f").value == value


@given(st.text(alphabet=st.sampled_from(string.printable + "\ufeff\x85\u2028é🙂&*!<"), max_size=80))
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused(text):
    problems = ["f"]
    try:
        parse_yaml(text, "f")
    except RequestError as error:
        problems = error.problems
    assert all(problem.startswith("f") for problem in problems)
