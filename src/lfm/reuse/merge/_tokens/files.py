"""The files and config keys that follow when the output has another tokenizer than the model its config comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm.checkpoint import read_json
from lfm.errors import RequestError
from lfm.reuse.merge._tokens.lexicon import FLAGS, Lexicon, difference, merges, numbered, tokenizer_files

STALE = ("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")  # what says the same as tokenizer.json
GENERATION = "generation_config.json"
SIZE_KEYS = ("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size", "padded_vocab_size", "n_vocab")
ID_KEYS = ("_token_id", "_token_index", "suppress_tokens")
PHRASES = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")  # of tokens, in generation
Files = Mapping[str, bytes | Path | None]  # content, a file to copy, or nothing


@dataclass(frozen=True)
class Addition:
    """A token that a tokenizer gets: an ordinary one of another tokenizer, or one with flags, which needs none."""

    text: str
    id: int
    origin: Lexicon | None = None
    flags: Mapping[str, Any] | None = None


def output_files(
    reference: Path | None, donor: Path | None, lexicon: Lexicon, additions: Sequence[Addition], ids: Mapping[str, int]
) -> dict[str, bytes | Path | None]:
    """Return what is written over the side files of `reference`: content, files to copy, None for files to leave out.

    Nothing, where the reference's own tokenizer is kept as it is.
    """
    files: dict[str, bytes | Path | None] = {}
    if donor is not None and reference != donor:
        old = tokenizer_files(reference) if reference is not None else {}
        files |= dict.fromkeys(old) | tokenizer_files(donor)
    if not additions:
        return files
    files["tokenizer.json"] = checked(extended(lexicon, additions), ids)
    stale = [name for name in lexicon.files if any(Path(name).match(pattern) for pattern in STALE)]
    if any(addition.flags is None for addition in additions):
        files |= dict.fromkeys(stale)
    return {**files, **_other_files(lexicon, additions, bool(stale))}


def _other_files(lexicon: Lexicon, additions: Sequence[Addition], slow: bool) -> dict[str, bytes | Path | None]:
    """Return the other files that list added or special tokens, with the new ones in them."""
    flagged = [(addition, addition.flags) for addition in additions if addition.flags is not None]
    special = [addition.text for addition, flags in flagged if flags.get("special")]
    files: dict[str, bytes | Path | None] = {}
    decoder = False
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name not in lexicon.files:
            continue
        content = read_json(lexicon.files[name])
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if special and isinstance(content.get(key), list):
                content[key] = [*content[key], *special]
        if isinstance(content.get("added_tokens_decoder"), dict):
            decoder = True
            content["added_tokens_decoder"] |= {
                str(addition.id): {"content": addition.text, **{flag: bool(flags.get(flag)) for flag in FLAGS}}
                for addition, flags in flagged
            }
        files[name] = as_json(content)
    listed = "added_tokens.json" in lexicon.files
    if flagged and (listed or (slow and not decoder)):
        old = read_json(lexicon.files["added_tokens.json"]) if listed else {}
        files["added_tokens.json"] = as_json({**old, **{addition.text: addition.id for addition, _ in flagged}})
    return files


def generation_file(
    reference: Path | None, donor: Path | None, old: Mapping[str, int], new: Mapping[str, int]
) -> dict[str, bytes | Path | None]:
    """Return generation_config.json for another model's tokenizer: its own, or the reference's with ids of the new."""
    if donor is not None and (donor / GENERATION).is_file():
        return {GENERATION: donor / GENERATION}
    if reference is None or not (reference / GENERATION).is_file():
        return {}
    content = read_json(reference / GENERATION)
    changed = _ids(content, {}, {number: new.get(text) for text, number in old.items()})
    return {GENERATION: as_json({key: value for key, value in (content | changed).items() if key not in PHRASES})}


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return a config file as it is written."""
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def config_changes(
    config: Mapping[str, Any],
    donor: Mapping[str, Any] | None,
    *,
    old: Mapping[str, int],
    new: Mapping[str, int],
    rows: tuple[int, int],
) -> dict[str, Any]:
    """Return the keys of a config that change, nested ones with all that stands beside them.

    The number of tokens, wherever it was that of the embedding. Where the tokenizer is another model's, ids of tokens
    (beginning, end, padding, images) are what that model's config (`donor`) says; else those that the same tokens have
    in the output, None for tokens that it does not have.
    """
    changes = _sizes(config, *rows) if rows[0] != rows[1] else {}
    if "vocab_size" in config and rows[0] != rows[1]:
        changes["vocab_size"] = rows[1]
    if donor is None:
        return changes
    moved = _ids(config, donor, {number: new.get(text) for text, number in old.items()})
    return _joined(changes, moved, config)


def _sizes(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in SIZE_KEYS and value == before:
            changes[key] = after
        elif isinstance(value, dict) and (inner := _sizes(value, before, after)):
            changes[key] = {**value, **inner}
    return changes


def _ids(config: Mapping[str, Any], donor: Mapping[str, Any], places: Mapping[int, int | None]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key in dict.fromkeys([*config, *donor]):
        mine, theirs = config.get(key), donor.get(key)
        if key.endswith(ID_KEYS):
            value = theirs if theirs is not None else _placed(mine, places)
            if value != mine:
                changes[key] = value
        elif isinstance(mine, dict) and (inner := _ids(mine, theirs if isinstance(theirs, dict) else {}, places)):
            changes[key] = {**mine, **inner}
    return changes


def _placed(value: Any, places: Mapping[int, int | None]) -> Any:
    if isinstance(value, list):
        return [place for item in value if (place := places.get(item)) is not None]
    return places.get(value) if type(value) is int else value


def _joined(one: Mapping[str, Any], two: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return both sets of changes of a config; nested ones hold only what differs from it and what stands beside."""
    both = {**one, **two}
    for key in one.keys() & two.keys():
        if isinstance(both[key], dict):
            changed = {name: value for name, value in one[key].items() if value != config[key].get(name)}
            both[key] = {**two[key], **changed}
    return both


# --- tokens added to tokenizer.json -----------------------------------------------------------------------------------


def extended(donor: Lexicon, additions: Sequence[Addition]) -> dict[str, Any]:
    """Return the content of tokenizer.json with more tokens in it, every token at the id that it was given.

    Ordinary tokens come with the BPE merges that make them, behind all that were there: the text is split as before,
    and then neighbours are joined to new tokens. Unigram tokens keep the score of the tokenizer they come from.
    """
    ids = {**donor.ids, **{addition.text: addition.id for addition in additions}}
    ordinary = [addition for addition in additions if addition.flags is None]
    flagged = {addition.text: addition.flags for addition in additions if addition.flags is not None}
    model = dict(donor.model)
    order = [*donor.added, *flagged]
    if ordinary or numbered(_own_ids(donor), model, order) != ids:
        # the library numbers tokens that are not in `vocab` behind those that are, so all have to be there
        model["vocab"] = _scored(donor, ordinary, ids) if isinstance(model["vocab"], list) else ids
    if ordinary and donor.type == "BPE":
        model["merges"] = [*merges(donor), *_new_merges(donor, ordinary, ids)]
    entries = [{**_entry(flags), "content": text, "id": ids[text]} for text, flags in (donor.added | flagged).items()]
    return {**donor.content, "added_tokens": sorted(entries, key=lambda entry: int(entry["id"])), "model": model}


def _own_ids(lexicon: Lexicon) -> dict[str, int]:
    vocabulary = lexicon.model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {pair[0]: index for index, pair in enumerate(vocabulary)}


def _entry(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": 0, "content": "", **{flag: bool(flags.get(flag, False)) for flag in FLAGS}}


def _scored(donor: Lexicon, ordinary: Sequence[Addition], ids: Mapping[str, int]) -> list[list[Any]]:
    """Return a Unigram vocabulary up to the last of the new ids; tokens that are looked for first need no score."""
    pairs = [list(pair) for pair in donor.model["vocab"]]
    lowest = min((pair[1] for pair in pairs), default=0.0)
    scores = {addition.text: addition.origin for addition in ordinary}
    known = {origin: dict(origin.model["vocab"]) for origin in scores.values() if origin is not None}
    for _, text in sorted((number, text) for text, number in ids.items() if number >= len(pairs)):
        origin = scores.get(text)
        pairs.append([text, lowest if origin is None else known[origin][text]])
    return pairs


def _new_merges(donor: Lexicon, ordinary: Sequence[Addition], ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the merges that make new tokens; others would change how text without any new token is split."""
    prefix = donor.model.get("continuing_subword_prefix") or ""
    seen: set[tuple[str, str]] = set()
    texts = {addition.text for addition in ordinary}
    for origin in dict.fromkeys(addition.origin for addition in ordinary if addition.origin is not None):
        for one, two in merges(origin):
            made = one + two.removeprefix(prefix)
            if made in texts and one in ids and two in ids and (one, two) not in seen:
                seen.add((one, two))
                yield one, two


def checked(content: Mapping[str, Any], ids: Mapping[str, int]) -> bytes:
    """Return tokenizer.json as it is written, after the tokenizers library has read it and found the same ids."""
    from tokenizers import Tokenizer

    text = json.dumps(content, ensure_ascii=False)
    try:
        found = Tokenizer.from_str(text).get_vocab()
    except Exception as error:  # the library raises nothing more special
        raise RequestError(f"tokenizer: the tokenizers library does not load what the rules make: {error}") from None
    if wrong := difference(found, ids):
        raise RequestError(f"tokenizer: the tokenizers library numbers tokens in another way than the rules: {wrong}")
    return text.encode()
