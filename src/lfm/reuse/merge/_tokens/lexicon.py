"""The tokens that a model knows, read from the files of its tokenizer, and tokenizers with tokens added."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeGuard

from lfm.checkpoint import read_json
from lfm.errors import RequestError, plural

UNREADABLE = ("*.model", "*.tiktoken", "tekken.json")  # tokenizers of other libraries
LISTS = ("vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    *UNREADABLE,
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What has to be the same in two tokenizers before the tokens of one mean something to the other.
PARTS = ("normalizer", "pre_tokenizer")
MODEL_PARTS = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


@dataclass(frozen=True, eq=False)
class Lexicon:
    """A tokenizer's tokens.

    `json`: from tokenizer.json, whose content is kept; `list`: from vocab.json or vocab.txt; `unreadable`: a tokenizer
    of another library (SentencePiece, tiktoken), of which only the digest is known.
    """

    kind: Literal["json", "list", "unreadable"]
    ids: dict[str, int]  # of every token, by its text
    added: dict[str, Mapping[str, Any]]  # tokens that are looked for before the text is split, with their flags
    digest: str
    files: Mapping[str, Path]
    content: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """The `model` section of tokenizer.json."""
        return self.content.get("model") or {}

    @property
    def type(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel; old files do not say, but show it."""
        if "type" in self.model:
            return str(self.model["type"])
        marks = {"merges": "BPE", "unk_id": "Unigram", "continuing_subword_prefix": "WordPiece"}
        return next((kind for key, kind in marks.items() if key in self.model), "WordLevel")


# --- reading --------------------------------------------------------------------------------------------------------


def read_lexicon(folder: Path, seen: dict[str, Lexicon]) -> Lexicon | None:
    """Return the tokens of the model in `folder`, or None where it has no tokenizer; files seen before are not parsed.

    Raises RequestError for files that are broken.
    """
    files = tokenizer_files(folder)
    core = next((name for name in ("tokenizer.json", *LISTS) if name in files), None)
    unreadable = [name for pattern in UNREADABLE for name in sorted(files) if Path(name).match(pattern)]
    if core is None and not unreadable:
        return None
    told = [name for name in ("tokenizer_config.json", "added_tokens.json") if name in files]
    digest = _digest(files[name] for name in ([core] if core else unreadable))
    key = " ".join([core or "", digest, _digest(files[name] for name in told)])
    if key not in seen:
        seen[key] = _read(files, core, digest)
    known = seen[key]
    return Lexicon(known.kind, known.ids, known.added, digest, files, known.content, known.notes)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that belong to its tokenizer, by name."""
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path for path in sorted(found)}


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        try:
            total.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    return total.hexdigest()


def _read(files: Mapping[str, Path], core: str | None, digest: str) -> Lexicon:
    config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    listed = read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
    more = _added_elsewhere(config, listed)
    if core == "tokenizer.json":
        return _from_json(files[core], more, digest, files)
    ids = _from_list(files[core]) if core is not None else None
    told = {text: int(entry["id"]) for text, entry in more.items()}  # what reads such files numbers them as told
    if ids is None:
        return Lexicon("unreadable", told, more, digest, files, {})
    return Lexicon("list", ids | told, more, digest, files, {})


def _added_elsewhere(config: Mapping[str, Any], listed: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the added tokens that are told outside of tokenizer.json, by text, in the order of their ids."""
    found: dict[str, Mapping[str, Any]] = {}
    for text, number in listed.items():
        if type(number) is int and number >= 0:
            found[text] = {"id": number, "content": text}
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and number.isdecimal():
            found[entry["content"]] = {**entry, "id": int(number)}
    return dict(sorted(found.items(), key=lambda item: item[1]["id"]))


def _from_json(path: Path, more: Mapping[str, Mapping[str, Any]], digest: str, files: Mapping[str, Path]) -> Lexicon:
    content = read_json(path)
    entries = content.get("added_tokens") or []
    ids = _model_ids(path, content.get("model"))
    if not _are_merges(content["model"].get("merges") or []):
        raise RequestError(f"{path}: model.merges must be a list of pairs of tokens")
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise RequestError(f"{path}: added_tokens must be a list of objects with a content")
    added = {entry["content"]: entry for entry in [*more.values(), *entries] if entry["content"]}
    order = dict.fromkeys([entry["content"] for entry in [*entries, *more.values()] if entry["content"]])
    placed = numbered(ids, content["model"], order)
    wrong = [text for text in order if added[text].get("id", placed[text]) != placed[text]]
    notes: tuple[str, ...] = ()
    if wrong:
        shown = ", ".join(f"{text!r} {added[text]['id']} instead of {placed[text]}" for text in wrong[:3])
        notes = (
            f"{path}: {plural(len(wrong), 'added token')} with another id than the tokenizers library gives: {shown}",
        )
    _check_text(path, placed)
    return Lexicon("json", placed, {text: added[text] for text in order}, digest, files, content, notes)


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str)


def _are_merges(merges: Any) -> bool:
    if not isinstance(merges, list):
        return False
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return _only(list, pairs) and set(map(len, pairs)) <= {2} and _only(str, chain.from_iterable(pairs))


def _only(kind: type, values: Iterable[object]) -> bool:
    """Return whether all values are of exactly this type; there are hundreds of thousands of them."""
    return set(map(type, values)) <= {kind}


def _are_ids(ids: Any) -> TypeGuard[dict[str, int]]:
    return isinstance(ids, dict) and _only(int, ids.values()) and min(ids.values(), default=0) >= 0


def _model_ids(path: Path, model: object) -> dict[str, int]:
    """Return the ids of the model's own tokens; of a token that stands twice the last counts, as in the library."""
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if _are_ids(vocabulary):
        return dict(vocabulary)
    pairs = vocabulary if isinstance(vocabulary, list) else [None]
    if all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        return {pair[0]: index for index, pair in enumerate(pairs)}
    raise RequestError(f"{path}: not the tokenizer.json of the tokenizers library: model.vocab must list tokens")


def numbered(ids: Mapping[str, int], model: Mapping[str, Any], added: Iterable[str]) -> dict[str, int]:
    """Return all ids as the tokenizers library gives them: it numbers added tokens itself, whatever the file says.

    Those that the model does not have come behind as many as it has, also where its own ids have gaps.
    """
    placed, number = dict(ids), len(model["vocab"])
    for text in added:
        if text not in placed:
            placed[text] = number
            number += 1
    return placed


def _check_text(path: Path, ids: Mapping[str, int]) -> None:
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        bad = next(text for text in ids if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text))
        raise RequestError(f"{path}: the token {bad!r} is no Unicode text (half a surrogate pair)") from None


def _from_list(path: Path) -> dict[str, int] | None:
    """Return the ids in a list of tokens; None for lists of another kind (one for each language, say)."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: cannot be read: {error}") from None
        return {line.rstrip("\r"): index for index, line in enumerate(lines) if line.rstrip("\r")}
    ids = read_json(path)
    return ids if _are_ids(ids) else None


# --- comparing ------------------------------------------------------------------------------------------------------


def difference(here: Mapping[str, int], there: Mapping[str, int]) -> str:
    """Return how two sets of tokens differ, in numbers and with the first ones of each kind; empty if they do not."""
    mine = [text for text in here if text not in there]
    theirs = [text for text in there if text not in here]
    moved = [text for text in here if there.get(text, here[text]) != here[text]]
    if not mine and not theirs and not moved:
        return ""
    told = [f"{plural(len(here), 'token')}, there {len(there):,}"]
    if mine:
        told.append(f"only here {len(mine):,} ({_first(mine, here)})")
    if theirs:
        told.append(f"only there {len(theirs):,} ({_first(theirs, there)})")
    if moved:
        moved = sorted(moved, key=here.__getitem__)
        shown = ", ".join(f"{text!r} {here[text]}, there {there[text]}" for text in moved[:3])
        told.append(f"at other ids {len(moved):,} ({shown}{', ...' if len(moved) > 3 else ''})")
    return "; ".join(told)


def _first(texts: Sequence[str], ids: Mapping[str, int]) -> str:
    texts = sorted(texts, key=ids.__getitem__)
    return ", ".join(f"{text!r} {ids[text]}" for text in texts[:3]) + (", ..." if len(texts) > 3 else "")


def obstacles(one: Lexicon, two: Lexicon) -> list[str]:
    """Return what keeps the ordinary tokens of one tokenizer from being used by another."""
    if two.kind != "json":
        return ["it has no tokenizer.json"]
    if one.type != two.type:
        return [f"it is a {two.type} tokenizer, that one {one.type}"]
    parts = [(key, one.content.get(key), two.content.get(key)) for key in PARTS]
    parts += [(f"model.{key}", one.model.get(key) or None, two.model.get(key) or None) for key in MODEL_PARTS]
    return [_unlike(key, mine, theirs) for key, mine, theirs in parts if _plain(mine) != _plain(theirs)]


def other_splitting(one: Lexicon, two: Lexicon) -> list[str]:
    """Return what makes two tokenizers with the same tokens split text differently."""
    found = [key for key in PARTS if _plain(one.content.get(key)) != _plain(two.content.get(key))]
    if list(merges(one)) != list(merges(two)):
        found.append("merges")
    return found


def unreadable_alike(one: Lexicon, two: Lexicon) -> bool:
    """Return whether two tokenizers, of which not all can be read, have the same files and the same added tokens."""
    names = [name for pattern in UNREADABLE for name in one.files if Path(name).match(pattern)]
    if one.kind == two.kind:
        return one.digest == two.digest and one.ids == two.ids
    shared = [name for name in names if name in two.files]
    if not shared or any(_digest([one.files[name]]) != _digest([two.files[name]]) for name in shared):
        return False
    slow, fast = (one, two) if one.kind == "unreadable" else (two, one)
    return all(fast.ids.get(text) == number for text, number in slow.ids.items())


def _unlike(key: str, mine: Any, theirs: Any) -> str:
    here, there = _short(theirs), _short(mine)
    return f"{key} {here}, there {there}" if here != there else f"{key} {here} with other settings"


def _plain(part: Any) -> Any:
    """Return a part of a tokenizer, a sequence of one being that one."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        inner = next((value for value in part.values() if isinstance(value, list)), [])
        return inner[0] if len(inner) == 1 else part
    return part


def _short(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "Sequence":
        inner = next((value for value in part.values() if isinstance(value, list)), [])
        return " + ".join(_short(item) for item in inner) or "nothing"
    return str(part.get("type")) if isinstance(part, dict) else "none" if part is None else repr(part)


def other_flags(one: Mapping[str, Mapping[str, Any]], two: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the added tokens that both have and treat differently."""
    shared = [text for text in two if text in one]
    return [text for text in shared if any(bool(one[text].get(key)) != bool(two[text].get(key)) for key in FLAGS)]


def cores(lexicon: Lexicon) -> str:
    """Return the files that hold a tokenizer which cannot be read here."""
    return ", ".join(
        name for name in lexicon.files if name in LISTS or any(Path(name).match(pattern) for pattern in UNREADABLE)
    )


def merges(lexicon: Lexicon) -> Iterator[tuple[str, str]]:
    """Yield the pairs that BPE joins, first those that it joins first."""
    for merge in lexicon.model.get("merges") or ():
        one, two = merge.split(" ") if isinstance(merge, str) else merge
        yield one, two
