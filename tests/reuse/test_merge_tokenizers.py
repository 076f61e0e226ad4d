"""Tokenizers that are read, refused, joined and written."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens import (
    CHAT,
    LAW,
    LAWS,
    TALE,
    TALES,
    aligned_by,
    bpe,
    member,
    merged_rows,
    refused,
    unigram,
    with_added,
    wordpiece,
    words,
    written,
)
from tokenizers import Tokenizer as Library

CONVERT = "AutoTokenizer.from_pretrained({!r}, use_fast=True).save_pretrained(<its folder>)"

# --- tokenizers that are not tokenizer.json --------------------------------------------------------------------------


def test_sentencepiece_files_are_compared_by_their_bytes(tmp_path):
    one = member(tmp_path, "A", rows=9, tokenizer__model=b"pieces")
    two = member(tmp_path, "B", rows=9, tokenizer__model=b"pieces")
    other = member(tmp_path, "C", rows=9, tokenizer__model=b"other pieces")
    grown = member(tmp_path, "D", rows=9, tokenizer__model=b"pieces", added_tokens__json={"<pad>": 8})
    assert aligned_by([one, two]).trivial
    assert refused([one, two, other, grown]) == tuple(
        f"{label}: its tokenizer is not that of A: tokenizer.model or added tokens differ; "
        f"to compare or align them, convert: {CONVERT.format('A')}, {CONVERT.format(label)}"
        for label in "CD"
    )
    padded = aligned_by([one, two], {"pad_to_multiple_of": 4})
    assert (padded.size, padded.rows[0].tolist()) == (12, [*range(9), -1, -1, -1])
    assert padded.named.tolist() == [True] * 9 + [False] * 3


@pytest.mark.parametrize("policy", ["base", "union", "B", {"tokens": {"<x>": {}}}])
def test_sentencepiece_files_alone_do_not_say_which_row_is_which_token(policy, tmp_path):
    one = member(tmp_path, "A", rows=9, tokenizer__model=b"pieces")
    two = member(tmp_path, "B", rows=9, tokenizer__model=b"pieces")
    problems = refused([one, two], policy)
    assert problems[0] == (
        "A: has tokenizer.model and no tokenizer.json, so which row is which token is not known; "
        f"convert it with transformers: {CONVERT.format('A')}"
    )
    assert len(problems) == (1 if isinstance(policy, dict) else 2)


def test_a_sentencepiece_file_and_its_conversion_are_one_tokenizer(tmp_path):
    converted = member(tmp_path, "A", TALE, tokenizer__model=b"pieces")
    slow = member(tmp_path, "B", rows=300, tokenizer__model=b"pieces")
    assert aligned_by([converted, slow]).trivial
    found = aligned_by([slow, converted])
    assert found.trivial
    assert found.files["tokenizer.json"] == tmp_path / "A" / "tokenizer.json"
    assert aligned_by([slow, member(tmp_path, "D", CHAT), converted], "union").size == 302
    alone = member(tmp_path, "C", TALE)
    assert refused([alone, slow]) == (
        "B: its tokenizer cannot be compared with that of C; to compare or align them, convert: " + CONVERT.format("B"),
    )


def test_lists_of_tokens_are_tokenizers_too(tmp_path):
    ids = TALE.get_vocab()
    lines = "\n".join(sorted(ids, key=ids.get)) + "\n"
    one, two = member(tmp_path, "A", rows=300, vocab__json=ids), member(tmp_path, "B", rows=300, vocab__txt=lines)
    assert aligned_by([one, two, member(tmp_path, "C", TALE)]).trivial
    chat = member(tmp_path, "D", CHAT)
    found = aligned_by([one, chat], "base", base=True)
    assert found.rows[1].tolist() == list(range(300))
    assert refused([one, chat], "union")[0].startswith("A: has no tokenizer.json to add 2 tokens to; convert it")
    assert "it has no tokenizer.json" in refused([member(tmp_path, "E", LAW), one], "union")[0]


def test_nested_lists_of_tokens_are_compared_by_their_bytes(tmp_path):
    one, two = (member(tmp_path, label, rows=2, vocab__json={"eng": {"a": 0}, "deu": {"b": 0}}) for label in "AB")
    assert aligned_by([one, two]).trivial
    assert "A: has vocab.json and no tokenizer.json" in refused([one, two], "base")[0]


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "not the tokenizer.json of the tokenizers library"),
        ('{"model": {"vocab": {"a": "x"}}}', "not the tokenizer.json of the tokenizers library"),
        ('{"model": {"vocab": [["a"]]}}', "not the tokenizer.json of the tokenizers library"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', "added_tokens must be a list of objects"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": {"a": 1}}', "added_tokens must be a list of objects"),
        ('{"model": {"vocab": {"a": 0}, "merges": [["a"]]}}', "model.merges must be a list of pairs"),
        ('{"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}', "model.merges must be a list of pairs"),
        ('{"model": {"vocab": {"\\ud800": 0}}}', "the token '\\ud800' is no Unicode text"),
    ],
)
def test_broken_tokenizers_are_all_named_beside_what_else_is_wrong(text, message, tmp_path):
    members = [member(tmp_path, label, text, 4) for label in "AB"] + [member(tmp_path, "C", TALE)]
    problems = refused(members, "unoin")
    assert "did you mean 'union'?" in problems[0]
    assert [line.split(":")[0] for line in problems[1:]] == [str(tmp_path / label / "tokenizer.json") for label in "AB"]
    assert all(message in line for line in problems[1:])


def test_broken_files_beside_the_tokenizer_are_named(tmp_path):
    broken = member(tmp_path, "A", TALE, tokenizer_config__json="{", added_tokens__json={})
    assert refused([broken])[0].startswith(f"{tmp_path / 'A' / 'tokenizer_config.json'}: not valid JSON")


# --- ids as the library has them -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ids_are_those_that_the_library_gives(tmp_path_factory, data):
    texts = ["a", "b", "c", "é", "文", "🙂", "<x>", "<y>", " "]
    vocabulary = data.draw(st.dictionaries(st.sampled_from(texts), st.integers(0, 12), min_size=1))
    entries = data.draw(st.lists(st.tuples(st.sampled_from(texts), st.integers(0, 12), st.booleans()), max_size=5))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = json.loads(bpe([], 2, special=()).to_str())
    content["model"] |= {"vocab": vocabulary, "merges": []}
    content["added_tokens"] = [
        {"content": text, "id": number, "special": special, **flags} for text, number, special in entries
    ]
    text = json.dumps(content)
    ids = aligned_by([member(tmp_path_factory.mktemp("ids"), "A", text, 20)]).ids
    assert ids == Library.from_str(text).get_vocab()


def test_a_token_that_stands_twice_has_its_last_id(tmp_path):
    text = TALE.to_str().replace('"<s>":0', '"new":300,"<s>":0,"new":301')
    found = aligned_by([member(tmp_path, "A", text, 302)])
    assert found.ids == Library.from_str(text).get_vocab()
    assert found.ids["new"] == 301
    assert found.trivial


def test_two_tokens_with_one_id_share_its_row(tmp_path):
    content = json.loads(TALE.to_str())
    content["model"]["vocab"]["twin"] = content["model"]["vocab"]["Ġlittle"]
    twins = json.dumps(content)
    found = aligned_by([member(tmp_path, "A", twins, 300), member(tmp_path, "B", CHAT)], "union")
    assert found.ids == written(found).get_vocab()
    assert found.rows[1][found.ids["twin"]] == TALE.token_to_id("Ġlittle")
    other = aligned_by([member(tmp_path, "C", TALE), member(tmp_path, "D", twins, 300)], "union")
    assert other.rows[1][other.ids["twin"]] == other.rows[1][other.ids["Ġlittle"]] == TALE.token_to_id("Ġlittle")


def test_added_tokens_at_other_ids_than_their_file_says_are_told(tmp_path):
    content = json.loads(CHAT.to_str())
    content["added_tokens"][-1]["id"] = 400
    found = aligned_by([member(tmp_path, "A", json.dumps(content), 302)])
    assert found.ids == CHAT.get_vocab()
    assert re.search(r"1 added token with another id .*: '<\|im_end\|>' 400 instead of 301", found.notes[0])


def test_added_tokens_of_the_other_files_count(tmp_path):
    decoder = {"300": {"content": "<|im_start|>", "special": True}, "301": {"content": "<|im_end|>", "special": True}}
    one = member(tmp_path, "A", TALE, 302, tokenizer_config__json={"added_tokens_decoder": decoder})
    two = member(tmp_path, "B", TALE, 302, added_tokens__json={"<|im_end|>": 301, "<|im_start|>": 300})
    assert aligned_by([one, two, member(tmp_path, "C", CHAT)]).trivial
    grown = aligned_by([one, member(tmp_path, "D", with_added(CHAT, "<tool>"))], "union")
    assert written(grown).get_vocab() == grown.ids
    assert grown.ids["<tool>"] == 302


# --- joining ---------------------------------------------------------------------------------------------------------

KINDS = {
    "bpe": (TALE, LAW),
    "unigram": (unigram(TALES), unigram(LAWS)),
    "wordpiece": (wordpiece(TALES), wordpiece(LAWS)),
    "words": (words(TALES), words(LAWS)),
    "added": (CHAT, with_added(TALE, "<tool>", "<|im_end|>", special=False)),
    "unicode": (TALE, with_added(TALE, "größer", "<中文>", "🙂")),
}


@pytest.mark.parametrize(("one", "two"), KINDS.values(), ids=KINDS)
def test_a_union_has_the_tokens_of_all_and_the_library_gives_them_the_same_ids(one, two, tmp_path):
    members = [member(tmp_path, "A", one), member(tmp_path, "B", two)]
    found = aligned_by(members, "union")
    made, ids = written(found), found.ids
    assert made.get_vocab() == ids
    assert {text: ids[text] for text in one.get_vocab()} == one.get_vocab()
    new = sorted(set(two.get_vocab()) - set(one.get_vocab()), key=two.token_to_id)
    assert new
    assert [ids[text] for text in new] == list(range(one.get_vocab_size(), found.size))
    tables, after = merged_rows(found, members)
    for text, row in ids.items():
        places = [tokenizer.token_to_id(text) for tokenizer in (one, two)]
        for index in range(2):
            giver = index if places[index] is not None else 1 - index
            assert np.array_equal(after[index][row], tables[giver][places[giver]]), text
    for text in {*TALES, *LAWS, "the little landlord", "<|im_start|>hath<|im_end|>", "<tool>", "größer <中文>"}:
        encoded = made.encode(text)
        assert encoded.ids == [ids.get(token, ids.get("<unk>")) for token in encoded.tokens]
    assert any(made.encode(text).tokens != one.encode(text).tokens for text in [*LAWS, "<tool>"])


def test_joined_bpe_splits_text_as_the_first_tokenizer_and_then_joins_neighbours(tmp_path):
    found = aligned_by([member(tmp_path, "A", TALE), member(tmp_path, "B", LAW)], "union")
    made = written(found)
    text = " ".join([*LAWS[:2], *TALES[:2]])
    tokens = made.encode(text).tokens
    assert any(token not in TALE.get_vocab() for token in tokens)
    assert len(tokens) < len(TALE.encode(text).tokens)
    assert made.decode(made.encode(text).ids) == text
    merges = json.loads(found.files["tokenizer.json"])["model"]["merges"]
    parts = {one + two: (one, two) for one, two in merges if one + two not in TALE.get_vocab()}

    def split(token):
        return [token] if token not in parts else split(parts[token][0]) + split(parts[token][1])

    assert [part for token in tokens for part in split(token)] == TALE.encode(text).tokens


def test_merges_may_be_written_in_either_way(tmp_path):
    texts = []
    for tokenizer in (TALE, LAW):
        content = json.loads(tokenizer.to_str())
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        texts.append(json.dumps(content))
    new = aligned_by([member(tmp_path, "A", TALE), member(tmp_path, "B", LAW)], "union")
    old = aligned_by([member(tmp_path, "C", texts[0], 300), member(tmp_path, "D", texts[1], 320)], "union")
    assert old.files["tokenizer.json"] == new.files["tokenizer.json"]


def test_a_union_of_three_keeps_the_order_of_the_models(tmp_path):
    tokenizers = [TALE, CHAT, with_added(LAW, "<tool>")]
    members = [member(tmp_path, label, own) for label, own in zip("ABC", tokenizers, strict=True)]
    found = aligned_by(members, {"source": "union"}, base=True)
    assert [found.ids[text] for text in ("<|im_start|>", "<|im_end|>")] == [300, 301]
    assert found.ids["<tool>"] == found.size - 1
    assert found.rows[0].tolist() == [*range(300), *[-1] * (found.size - 300)]
    tables, after = merged_rows(found, members)
    text = next(text for text in LAW.get_vocab() if text not in TALE.get_vocab())
    assert all(np.array_equal(own[found.ids[text]], tables[2][LAW.token_to_id(text)]) for own in after)
    assert found.notes[0] == (
        f"A: has rows for 300 of the {found.size} tokens; for the others it takes the mean of those that have them"
    )


def test_new_tokens_take_the_place_of_padding(tmp_path):
    members = [member(tmp_path, "A", TALE, 304, config={"vocab_size": 304}), member(tmp_path, "B", CHAT, 320)]
    found = aligned_by(members, "union", base=True)
    assert (found.size, found.config) == (304, {})
    assert found.rows[0].tolist() == [*range(300), -1, -1, 302, 303]
    assert found.rows[1].tolist() == list(range(304))
    assert [int(there[300]) for there in found.donors] == [-1, 300]


@pytest.mark.parametrize(("other", "told"), [(unigram(TALES), "Unigram"), (wordpiece(TALES), "WordPiece")])
def test_tokenizers_of_different_kinds_are_not_joined(other, told, tmp_path):
    members = [member(tmp_path, "A", TALE), member(tmp_path, "B", other)]
    assert refused(members, "union") == (
        f"B: its tokenizer cannot be joined with that of A: it is a {told} tokenizer, that one BPE; "
        "take the tokens of one model: `tokenizer: base`, or its name",
    )
    assert aligned_by(members, "base").size == 300


def test_tokenizers_that_prepare_text_differently_are_not_joined(tmp_path):
    content = json.loads(LAW.to_str())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    content["pre_tokenizer"]["add_prefix_space"] = True
    content["model"]["byte_fallback"] = True
    problems = refused([member(tmp_path, "A", TALE), member(tmp_path, "B", json.dumps(content), 320)], "union")
    assert (
        "normalizer NFC + Lowercase, there none; pre_tokenizer ByteLevel with other settings; "
        "model.byte_fallback True, there none" in problems[0]
    )


def test_added_tokens_join_whatever_prepares_the_text(tmp_path):
    content = json.loads(with_added(CHAT, "<s>", special=False).to_str())
    content["normalizer"] = {"type": "NFC"}
    content["added_tokens"][0]["lstrip"] = True
    found = aligned_by([member(tmp_path, "A", TALE), member(tmp_path, "B", json.dumps(content), 302)], "union")
    assert written(found).get_vocab() == CHAT.get_vocab()
    assert json.loads(found.files["tokenizer.json"])["added_tokens"][0] == json.loads(TALE.to_str())["added_tokens"][0]
    assert "B: added tokens with other flags than the models before it: '<s>'; the first are kept" in found.notes


def test_files_that_would_say_something_else_are_left_out(tmp_path):
    slow = {"vocab__json": TALE.get_vocab(), "merges__txt": "#version: 0.2\n", "tokenizer__model": b"pieces"}
    one = member(tmp_path, "A", TALE, **slow)
    joined = aligned_by([one, member(tmp_path, "B", LAW)], "union")
    assert {name for name, content in joined.files.items() if content is None} == {
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    }
    grown = aligned_by([one, member(tmp_path, "C", CHAT)], "union")
    assert grown.files.keys() == {"tokenizer.json", "added_tokens.json"}  # what the others say is still so
    assert json.loads(grown.files["added_tokens.json"]) == {"<|im_start|>": 300, "<|im_end|>": 301}


def test_unigram_tokens_keep_their_scores(tmp_path):
    one, two = KINDS["unigram"]
    found = aligned_by([member(tmp_path, "A", one), member(tmp_path, "B", two)], "union")
    own, theirs = (dict(json.loads(tokenizer.to_str())["model"]["vocab"]) for tokenizer in (one, two))
    scores = dict(json.loads(found.files["tokenizer.json"])["model"]["vocab"])
    assert scores == {**theirs, **own, "<pad>": min(own.values())}
    encoded = written(found).encode(LAWS[0]).tokens
    assert any(token in theirs and token not in own for token in encoded)


def test_flags_in_tokenizer_json_count_before_those_of_other_files(tmp_path):
    decoder = {"301": {"content": "<|im_end|>", "special": False, "lstrip": True}}
    one = member(tmp_path, "A", CHAT, tokenizer_config__json={"added_tokens_decoder": decoder})
    found = aligned_by([one, member(tmp_path, "B", with_added(CHAT, "<tool>"))], "union")
    entries = json.loads(found.files["tokenizer.json"])["added_tokens"]
    assert entries[:-1] == json.loads(CHAT.to_str())["added_tokens"]


def test_unigram_ids_follow_each_other_whatever_a_file_says(tmp_path):
    far = {"added_tokens_decoder": {"70": {"content": "<far>"}}}
    one = unigram(TALES)
    members = [member(tmp_path, "A", one, 80, tokenizer_config__json=far), member(tmp_path, "B", unigram(LAWS))]
    found = aligned_by(members, "union")
    assert found.ids["<far>"] == one.get_vocab_size()  # the library gives it the next id, so there is no gap
    assert written(found).get_vocab() == found.ids


def test_what_the_library_cannot_load_is_refused(tmp_path):
    content = json.loads(TALE.to_str())
    content["model"]["merges"].append(["q", "q"])  # makes a token that is not in its vocabulary
    problems = refused([member(tmp_path, "A", json.dumps(content), 300), member(tmp_path, "B", CHAT)], "union")
    assert "tokenizer: the tokenizers library does not load what the rules make" in problems[0]


def test_a_real_tokenizer_is_joined_with_a_larger_one(tmp_path, assets):
    folder = assets / "checkpoints" / "stories260k"
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    stories, content = Library.from_str(text), json.loads(text)
    content["model"]["vocab"] |= {"Zan": 512, "▁Zan": 513}
    content["model"]["merges"] += [["Z", "an"], ["▁", "Zan"]]
    grown = with_added(Library.from_str(json.dumps(content)), "<|im_end|>")
    config = json.loads((folder / "config.json").read_text())
    members = [member(tmp_path, "A", text, 512, config=config), member(tmp_path, "B", grown)]
    found = aligned_by(members, "union", base=True)
    made = written(found)
    assert (made.get_vocab(), found.config) == (grown.get_vocab(), {"vocab_size": 515})
    assert "▁Zan" in made.encode("Zan").tokens
    for told in ("Once upon a time, Zan said: <|im_end|>", "Tim and Zan 🙂 größer"):
        assert made.encode(told).ids == grown.encode(told).ids
        assert made.decode(made.encode(told).ids, skip_special_tokens=False).removeprefix("<s>").strip() == told
    plain = "Once upon a time there was a dog."
    assert made.encode(plain).ids == stories.encode(plain).ids


def test_transformers_loads_what_is_written(tmp_path):
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "added_tokens_decoder": {}}
    one = member(tmp_path, "A", TALE, tokenizer_config__json=settings)
    found = aligned_by([one, member(tmp_path, "B", with_added(LAW, "<|im_end|>"))], "union")
    files = {name.replace(".", "__"): content for name, content in found.files.items() if content is not None}
    member(tmp_path, "out", rows=0, **files)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.get_vocab() == found.ids
    assert made.convert_tokens_to_ids("<|im_end|>") == found.ids["<|im_end|>"]
    text = "the landlord<|im_end|>"
    assert made(text)["input_ids"] == written(found).encode(text).ids
    assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == "the landlord"


def test_nothing_heavy_is_imported():
    heavy = {"torch", "transformers", "tokenizers"}
    code = f"import sys, lfm.reuse.merge._tokens.chat_template; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
