"""What the tokens of a vocabulary are in bytes, and their tree: which tokens go on from some bytes, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm.errors import RequestError

Array = np.ndarray[Any, np.dtype[Any]]
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return every token's bytes by id, empty for tokens that stand for no text.

    Byte-level tokenizers (GPT-2's kind) and those of SentencePiece's kind are understood; others raise RequestError.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
    if '"ByteLevel"' in decoder:
        plain = _byte_level
    elif '"Metaspace"' in decoder or "\\u2581" in decoder:
        plain = _sentence_piece
    else:
        raise RequestError(
            "a tokenizer that is neither byte-level nor of SentencePiece's kind: which bytes its tokens stand for "
            "is not known"
        )
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    found = [b""] * len(tokenizer)
    for text, index in tokenizer.get_vocab().items():
        if index < len(found) and index not in special:
            found[index] = text.encode() if index in added else plain(text)
    return found


def _byte_level(text: str) -> bytes:
    table = _alphabet()
    return bytes(table[character] for character in text) if all(c in table for c in text) else text.encode()


def _alphabet() -> dict[str, int]:
    """Return GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others follow after 255."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(rest)}


def _sentence_piece(text: str) -> bytes:
    byte = BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()


@dataclass(frozen=True)
class Node:
    """The tokens that begin with some bytes: places `first` to `last` in the sorted vocabulary."""

    first: int
    last: int
    depth: int  # bytes that they share


class Trie:
    """The tree of a vocabulary, as ranges of its sorted tokens: the mass of a branch is a difference of two sums."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.ids: Array = np.array(sorted((i for i, t in enumerate(tokens) if t), key=lambda i: (tokens[i], i)))
        self._sorted = [tokens[index] for index in self.ids]
        self._lengths = np.array([len(token) for token in self._sorted])
        longest = max(map(len, self._sorted), default=0)
        # one column for each depth; -1 behind a token's end sorts before every byte
        self._columns = np.full((longest + 1, len(self._sorted)), -1, dtype=np.int16)
        for place, token in enumerate(self._sorted):
            self._columns[: len(token), place] = np.frombuffer(token, dtype=np.uint8)
        self.root = Node(0, len(self._sorted), 0)
        self._edges: dict[Node, Array] = {}

    def edges(self, node: Node) -> Array:
        """Return 257 places: the branch of byte b is from edges[b] to edges[b + 1]; tokens before have ended."""
        if node not in self._edges:
            column = self._columns[node.depth, node.first : node.last]
            self._edges[node] = node.first + np.searchsorted(column, np.arange(257))
        return self._edges[node]

    def child(self, node: Node, byte: int) -> Node:
        """Return the node one byte further, which may be empty."""
        edges = self.edges(node)
        return Node(int(edges[byte]), int(edges[byte + 1]), node.depth + 1)
