"""YAML that remembers its lines, so that every complaint about a recipe can say where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lfm.errors import RequestError

TAG = "tag:yaml.org,2002:"
KINDS: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
    yaml.ScalarNode: ("str", "int", "float", "bool", "null"),
}
MAX_NODES = 100_000  # aliases can make a small file enormous
Place = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which a date is text, and so is `=`."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class Located:
    """The content of a YAML file, and the line of every value in it; or of a command, and its options by key."""

    name: str
    value: Any
    lines: dict[Place, int] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def where(self, place: Iterable[str | int]) -> str:
        """Return `file:line: dotted.place`, with the line of the nearest enclosing value that has one."""
        place = tuple(place)
        line = self.line(place)
        keys = [_printable(str(part)) for part in place]
        dotted = ".".join([self.options.get(key, key) for key in keys[:1]] + keys[1:])
        return ": ".join(part for part in (self.name if line is None else f"{self.name}:{line}", dotted) if part)

    def line(self, place: Place) -> int | None:
        """Return the line of a value, or of the nearest enclosing one that has one."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), None)


def _printable(key: str) -> str:
    return key if key.isprintable() else repr(key)


def read_yaml(path: Path) -> Located:
    """Return a YAML file's content. Raises RequestError, with the line, for anything that is not plain YAML."""
    return parse_yaml(_text_of(path), str(path))


def read_documents(path: Path) -> list[Located]:
    """Return the documents of a YAML file, which `---` separates; otherwise as `read_yaml`."""
    return _documents(_text_of(path), str(path))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def parse_yaml(text: str, name: str) -> Located:
    """Return the content of a YAML text; `name` stands for the file in messages."""
    documents = _documents(text, name)
    if len(documents) > 1:
        raise RequestError(f"{documents[1].where(())}: not valid YAML: but found another document")
    return documents[0] if documents else Located(name, None)


def _documents(text: str, name: str) -> list[Located]:
    documents: list[Located] = []
    try:
        loader = _Loader(text)
        try:
            while loader.check_node():
                located = Located(name, None)
                node = loader.get_node()
                if node is not None:
                    located.value = _Reader(loader, located).read(node, ())
                documents.append(located)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RequestError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RequestError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RequestError(f"{name}: nested too deeply") from None
    return documents


class _Reader:
    def __init__(self, loader: _Loader, located: Located) -> None:
        self._loader = loader
        self._located = located
        self._count = 0

    def read(self, node: yaml.Node, place: Place) -> Any:
        self._count += 1
        if self._count > MAX_NODES:
            raise RequestError(f"{self._located.name}: more than {MAX_NODES:,} values, counting every use of an alias")
        line = node.start_mark.line + 1
        self._located.lines.setdefault(place, line)
        self._check_tag(node, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*place, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _check_tag(self, node: yaml.Node, line: int) -> None:
        if node.tag.removeprefix(TAG) not in KINDS[type(node)]:
            raise self._problem(line, f"not valid YAML here: the tag {node.tag!r}")

    def _problem(self, line: int, text: str) -> RequestError:
        return RequestError(f"{self._located.name}:{line}: {text}")

    def _scalar(self, node: yaml.Node) -> Any:
        line = node.start_mark.line + 1
        try:
            value = self._loader.construct_object(node)
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise self._problem(line, f"not valid YAML here: {error}") from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise self._problem(line, "a number that needs more than 64 bits; put it in quotes if it is text")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self._problem(line, f"half a character: {value!r}")
        return value

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == f"{TAG}merge":
                merged = {**self._merged(value_node, place, line), **merged}
                continue
            key = self._key(key_node, line)
            if key in found:
                raise self._problem(line, f"the key {key!r} stands here twice")
            self._located.lines[(*place, key)] = line
            found[key] = self.read(value_node, (*place, key))
        return {**merged, **found}

    def _key(self, node: yaml.Node, line: int) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._problem(line, "a list or mapping cannot be a key; put it in quotes if it is text")
        self._check_tag(node, line)
        key = self._scalar(node)
        if not isinstance(key, str):
            raise self._problem(line, f"the key {node.value!r} is not text; put it in quotes")
        return key

    def _merged(self, node: yaml.Node, place: Place, line: int) -> dict[str, Any]:
        """Return the keys that `<<:` brings in; of several mappings the first that has a key gives it."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self._problem(line, "`<<` takes a mapping, or a list of them")
            merged = {**self.read(part, place), **merged}
        return merged
