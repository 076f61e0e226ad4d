"""Whose tokens a merge has, and which rows of which model they are."""

import json

import numpy as np
import pytest
from tests.tokens import (
    CHAT,
    LAW,
    TALE,
    aligned_by,
    member,
    merged_rows,
    refused,
    with_added,
    written,
)

from lfm.reuse.merge._tokens.policy import Tokenizer
from lfm.reuse.merge._tokens.tables import Tables
from lfm.reuse.merge._tokens.vocabulary import Member

HINT = "say whose tokens the output has: `tokenizer: base`, `union` or one of the models"

# --- one tokenizer ---------------------------------------------------------------------------------------------------


def test_models_with_one_tokenizer_are_left_as_they_are(tmp_path):
    members = [member(tmp_path, label, TALE) for label in "ABC"]
    found = aligned_by(members, base=True)
    assert (found.trivial, found.size, found.files, found.config, found.notes) == (True, 300, {}, {}, ())
    assert dict(found.ids) == TALE.get_vocab()


def test_models_without_tokens_need_no_tokenizer(tmp_path):
    found = aligned_by([member(tmp_path, "A", rows=0), member(tmp_path, "B", rows=0)])
    assert found.trivial
    assert found.size == 0
    assert "no tensor of these models has rows" in refused([member(tmp_path, "C", TALE, 0)], "union")[0]


def test_models_without_any_tokenizer_are_matched_row_by_row(tmp_path):
    members = [member(tmp_path, "A", rows=7), Member("B", None, Tables(7))]
    assert aligned_by(members).trivial
    short = member(tmp_path, "C", rows=6)
    assert refused([*members, short]) == (
        "different numbers of rows of tokens, and no tokenizer that names them: A 7, B 7, C 6",
    )
    assert "A: has no tokenizer" in refused(members, "base")[0]


def test_a_model_whose_tensors_have_no_rows_of_tokens_cannot_give_them(tmp_path):
    members = [member(tmp_path, "A", TALE, 0), member(tmp_path, "B", TALE)]
    for policy in ("same", "base", "union", "A"):
        assert refused(members, policy) == ("A: no tensor has rows that belong to tokens (A 0, B 300)",)


def test_other_tokens_are_refused_with_counts_and_the_first_that_differ(tmp_path):
    swapped = json.loads(TALE.to_str())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["Ġlittle"], vocabulary["Ġdog"] = vocabulary["Ġdog"], vocabulary["Ġlittle"]
    old = {text: TALE.token_to_id(text) for text in ("Ġlittle", "Ġdog")}
    one, two = sorted(vocabulary.keys() & old.keys(), key=vocabulary.get)
    members = [
        member(tmp_path, "A", TALE),
        member(tmp_path, "B", CHAT),
        member(tmp_path, "C", json.dumps(swapped), 300),
    ]
    assert refused(members) == (
        "B: its tokenizer is not that of A: 302 tokens, there 300; "
        f"only here 2 ('<|im_start|>' 300, '<|im_end|>' 301); {HINT}",
        "C: its tokenizer is not that of A: 300 tokens, there 300; "
        f"at other ids 2 ({one!r} {old[two]}, there {old[one]}, {two!r} {old[one]}, there {old[two]}); {HINT}",
    )
    assert "only there 2 ('<|im_start|>' 300" in refused([members[1], members[0]])[0]


def test_tokens_that_no_row_stands_for_do_not_make_tokenizers_different(tmp_path):
    found = aligned_by([member(tmp_path, "A", CHAT, 300), member(tmp_path, "B", TALE)])
    assert (found.trivial, found.size, found.files) == (True, 300, {})


def test_tokens_that_only_one_of_two_equal_tokenizers_has_rows_for_are_not_cut_off_silently(tmp_path):
    members = [member(tmp_path, "A", CHAT, 300), member(tmp_path, "B", CHAT, 302)]
    assert "only here 2 ('<|im_start|>' 300" in refused(members)[0]
    assert aligned_by(members, "union").size == 302
    assert aligned_by(members, "base").size == 300


@pytest.mark.parametrize("base", [True, False])
def test_rows_of_padding_are_those_of_the_first_model(base, tmp_path):
    padded = [member(tmp_path, label, TALE, rows) for label, rows in (("A", 304), ("B", 302), ("C", 320))]
    found = aligned_by(padded, base=base)
    tables, after = merged_rows(found, padded)
    assert (found.trivial, found.size, found.config, found.files) == (False, 304, {}, {})
    assert np.array_equal(after[0], tables[0])
    assert np.array_equal(after[2], tables[2][:304])
    assert np.array_equal(after[1][:302], tables[1])
    stand_in = tables[0][302:304] if base else (tables[0][302:304] + tables[2][302:304]) / 2
    np.testing.assert_allclose(after[1][302:], stand_in, rtol=1e-6)
    assert found.notes == (
        "B: 302 rows, the output has 304: padding",
        "C: 320 rows, the output has 304: padding",
    )


def test_padding_is_not_matched_with_the_token_that_another_model_has_there(tmp_path):
    members = [member(tmp_path, "A", TALE, 304), member(tmp_path, "B", CHAT, 304)]
    found = aligned_by(members, "base", base=True)
    assert found.rows[1].tolist() == [*range(300), -1, -1, 302, 303]
    tables, after = merged_rows(found, members)
    assert np.array_equal(after[1][300:302], tables[0][300:302])


def test_gaps_between_ids_are_padding(tmp_path):
    content = json.loads(TALE.to_str())
    content["model"]["vocab"]["gap"] = 310
    members = [member(tmp_path, label, json.dumps(content), 312) for label in "AB"]
    assert aligned_by(members).trivial
    found = aligned_by([members[0], member(tmp_path, "C", TALE, 306)], "base", base=True)
    assert found.rows[1].tolist() == [*range(306), -1, -1, -1, -1, -1, -1]
    assert np.flatnonzero(~found.named).tolist() == [*range(300, 310), 311]


def test_a_model_without_tokenizer_has_that_of_a_model_with_as_many_rows(tmp_path):
    members = [member(tmp_path, "A", rows=300), member(tmp_path, "B", CHAT), member(tmp_path, "C", TALE)]
    found = aligned_by([members[0], members[2]])
    assert found.trivial
    assert found.notes == ("A: has no tokenizer; that of C is taken for it",)
    assert found.files == {"tokenizer.json": tmp_path / "C" / "tokenizer.json"}
    config = {"vocab_size": 300, "eos_token_id": 1}
    told = [Member("A", members[0].folder, members[0].tables, config), members[1]]
    told.append(Member("C", members[2].folder, members[2].tables, {"vocab_size": 300, "eos_token_id": 7}))
    joined = aligned_by(told, "union")
    assert (joined.size, joined.config) == (302, {"vocab_size": 302})  # the ids stay those of the first
    assert joined.donor == 2
    odd = member(tmp_path, "D", rows=299)
    for policy in ("same", "union", "base", "D"):
        assert refused([members[2], odd], policy)[0].startswith(
            "D: has no tokenizer, and no model with one has 299 rows of tokens too; put the tokenizer files"
        )


def test_the_same_tokens_split_in_another_way_are_told(tmp_path):
    content = json.loads(TALE.to_str())
    content["pre_tokenizer"]["add_prefix_space"] = True
    content["model"]["merges"] = content["model"]["merges"][::-1]
    found = aligned_by([member(tmp_path, "A", TALE), member(tmp_path, "B", json.dumps(content), 300)])
    assert found.trivial
    assert found.notes == (
        "B: same tokens as A, but text is split in another way (pre_tokenizer, merges); that of A is kept",
    )


# --- the tokens of one model -----------------------------------------------------------------------------------------


def test_the_base_keeps_its_tokens(tmp_path):
    tokenizers = {"A": TALE, "B": with_added(LAW, "<tool>"), "C": CHAT}
    members = [member(tmp_path, label, tokenizer) for label, tokenizer in tokenizers.items()]
    found = aligned_by(members, "base", base=True)
    assert (found.size, found.files, found.config, found.trivial) == (300, {}, {}, False)
    tables, after = merged_rows(found, members)
    for text, row in TALE.get_vocab().items():
        there = LAW.token_to_id(text)
        assert np.array_equal(after[1][row], tables[0][row] if there is None else tables[1][there])
    assert np.array_equal(after[0], tables[0])
    assert np.array_equal(after[2], tables[2][:300])
    shared = len(TALE.get_vocab().keys() & LAW.get_vocab().keys())
    assert found.notes[0] == (
        f"B: has rows for {shared} of the 300 tokens; for the others it takes the rows of A, else the mean of those "
        "that have them"
    )
    assert found.notes[1].startswith(f"B: {members[1].rows - shared} tokens not in the output, such as ")
    assert found.notes[2:] == ("C: 2 tokens not in the output, such as '<|im_start|>', '<|im_end|>'",)


def test_without_a_base_the_first_model_gives_the_tokens(tmp_path):
    members = [member(tmp_path, "A", TALE), member(tmp_path, "B", CHAT)]
    assert aligned_by(members, "base").ids == TALE.get_vocab()


def test_a_named_model_gives_tokens_files_and_ids(tmp_path):
    config = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "text_config": {"vocab_size": 300, "width": 4}}
    old = member(tmp_path, "A", TALE, config=config, vocab__json=TALE.get_vocab(), generation_config__json={"top_k": 1})
    new = member(
        *(tmp_path, "B", CHAT, 320),
        config={"vocab_size": 320, "eos_token_id": 301, "pad_token_id": 300},
        tokenizer_config__json={"eos_token": "<|im_end|>"},
        generation_config__json={"eos_token_id": [1, 301]},
    )
    found = aligned_by([old, new], {"model": "B"}, base=True)
    assert (found.size, found.donor) == (320, 1)
    assert found.config == {
        "vocab_size": 320,
        "eos_token_id": 301,
        "pad_token_id": 300,
        "text_config": {"vocab_size": 320, "width": 4},
    }
    names = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert found.files == {"vocab.json": None, **{name: tmp_path / "B" / name for name in names}}
    assert found.rows[0].tolist() == [*range(300), *[-1] * 20]
    assert aligned_by([old, new], "B", base=True).size == 320


def test_ids_that_the_named_model_does_not_tell_move_with_their_tokens(tmp_path):
    text = {"image_token_id": 301, "vocab_size": 302, "width": 4}
    config = {"bos_token_id": 0, "eos_token_id": [1, 301], "pad_token_id": 300, "text_config": text}
    generation = {"eos_token_id": 301, "suppress_tokens": [300, 1], "bad_words_ids": [[300]], "top_k": 3}
    old = member(tmp_path, "A", CHAT, config=config, generation_config__json=generation)
    found = aligned_by([old, member(tmp_path, "B", with_added(LAW, "<|im_end|>"))], "B")
    end = LAW.get_vocab_size()
    assert found.config == {
        "eos_token_id": [1, end],
        "pad_token_id": None,
        "text_config": {"image_token_id": end, "vocab_size": end + 1, "width": 4},
    }
    assert json.loads(found.files["generation_config.json"]) == {
        "eos_token_id": end,
        "suppress_tokens": [1],
        "top_k": 3,
    }


def test_a_model_called_base_can_be_named(tmp_path):
    members = [member(tmp_path, "A", TALE), member(tmp_path, "base", CHAT)]
    assert aligned_by(members, "base").size == 300
    assert aligned_by(members, {"model": "base"}).size == 302


@pytest.mark.parametrize("policy", ["base", "union", "B"])
def test_tensors_that_cannot_follow_are_refused_when_tokens_move(policy, tmp_path):
    odd = "model.embed_tokens_per_layer.weight"
    members = [member(tmp_path, "A", TALE, others=[odd]), member(tmp_path, "B", CHAT)]
    assert f"A: tensor {odd!r} belongs to tokens" in refused(members, policy)[0]
    assert aligned_by([members[0], member(tmp_path, "C", TALE)], "base").trivial


# --- rows that are missing -------------------------------------------------------------------------------------------


def test_rows_that_the_base_lacks_are_the_mean_of_those_that_have_them(tmp_path):
    tokenizers = {"A": TALE, "B": CHAT, "C": with_added(CHAT, "<tool>")}
    members = [member(tmp_path, label, tokenizer) for label, tokenizer in tokenizers.items()]
    found = aligned_by(members, "union", base=True)
    tables, after = merged_rows(found, members)
    deltas = [own - after[0] for own in after[1:]]
    shared, alone = found.ids["<|im_start|>"], found.ids["<tool>"]
    np.testing.assert_allclose(after[0][shared], (tables[1][300] + tables[2][300]) / 2, rtol=1e-6)
    np.testing.assert_allclose(deltas[0][shared] + deltas[1][shared], 0, atol=1e-6)
    assert np.array_equal(after[0][alone], tables[2][302])
    assert not deltas[0][alone].any()
    assert not deltas[1][alone].any()


def test_rows_that_a_source_lacks_are_those_of_the_base(tmp_path):
    members = [member(tmp_path, "A", CHAT), member(tmp_path, "B", TALE), member(tmp_path, "C", CHAT)]
    found = aligned_by(members, "union", base=True)
    tables, after = merged_rows(found, members)
    assert np.array_equal(after[1][300:], tables[0][300:])
    assert np.array_equal(after[2], tables[2])
    without = aligned_by(members, "union", base=False)
    _, after = merged_rows(without, members)
    np.testing.assert_allclose(after[1][300:], (tables[0][300:] + tables[2][300:]) / 2, rtol=1e-6)


def test_a_token_that_no_model_has_a_row_for_starts_as_an_average_one(tmp_path):
    members = [member(tmp_path, "A", TALE, 304), member(tmp_path, "B", TALE, 304)]
    found = aligned_by(members, {"tokens": {"<new>": {}}})
    tables, after = merged_rows(found, members)
    assert (found.ids["<new>"], found.size) == (300, 304)
    assert written(found).token_to_id("<new>") == 300
    for before, own in zip(tables, after, strict=True):
        np.testing.assert_allclose(own[300], before[:300].mean(0), atol=1e-6)
        assert np.array_equal(own[301:], before[301:])


# --- rules for single tokens -----------------------------------------------------------------------------------------


def test_rules_say_what_stands_in_a_row(tmp_path):
    members = [member(tmp_path, "A", TALE), member(tmp_path, "B", CHAT), member(tmp_path, "C", CHAT)]
    rules = {
        "<|im_start|>": {"source": {"kind": "model_token", "model": "A", "token": "<s>"}},
        "<|im_end|>": {"source": "C", "force": True},
        "<zero>": {"source": {"kind": "zero"}},
        "<mean>": {"source": {"kind": "mean"}},
        "<like>": {"source": {"kind": "model_token", "model": "B", "token_id": 17}},
        "</s>": {"source": {"kind": "zero"}, "force": True},
        "<s>": {"source": {"kind": "zero"}},
    }
    found = aligned_by(members, {"source": "union", "tokens": rules}, base=True)
    tables, after = merged_rows(found, members)
    assert written(found).get_vocab() == found.ids
    assert [found.ids[text] for text in ("<zero>", "<mean>", "<like>")] == [302, 303, 304]
    for before, own in zip(tables, after, strict=True):
        assert np.array_equal(own[302], np.zeros(3))
        assert not np.signbit(own[302]).any()
        assert np.array_equal(own[304], tables[1][17])
        assert np.array_equal(own[301], tables[2][301])
        assert np.array_equal(own[1], np.zeros(3))
        assert np.array_equal(own[0], before[0])  # all have it, and nothing is forced
        np.testing.assert_allclose(own[303], np.delete(own[:305], 303, axis=0).mean(0), atol=1e-6)
    assert np.array_equal(after[0][300], tables[0][0])
    assert np.array_equal(after[1][300], tables[1][300])


def test_a_forced_row_makes_even_one_tokenizer_an_alignment(tmp_path):
    members = [member(tmp_path, "A", TALE), member(tmp_path, "B", TALE)]
    found = aligned_by(members, {"tokens": {"<s>": {"source": "B", "force": True}}})
    tables, after = merged_rows(found, members)
    assert not found.trivial
    assert not found.files
    assert np.array_equal(after[0][0], tables[1][0])
    assert np.array_equal(after[0][1:], tables[0][1:])


def test_a_rule_can_bring_a_token_of_another_model_to_the_base(tmp_path):
    config = {"additional_special_tokens": ["<s>"], "added_tokens_decoder": {}}
    files = {"tokenizer_config__json": config, "special_tokens_map__json": {"additional_special_tokens": ["<s>"]}}
    members = [
        member(tmp_path, "A", TALE, config={"vocab_size": 300}, **files),
        member(tmp_path, "B", CHAT),
    ]
    found = aligned_by(members, {"source": "base", "tokens": {"<|im_end|>": {}}}, base=True)
    tables, after = merged_rows(found, members)
    assert (found.size, found.config) == (301, {"vocab_size": 301})
    assert np.array_equal(after[0][300], tables[1][301])
    assert json.loads(found.files["tokenizer.json"])["added_tokens"][-1]["special"]
    told = json.loads(found.files["tokenizer_config.json"])
    assert told["additional_special_tokens"] == ["<s>", "<|im_end|>"]
    assert told["added_tokens_decoder"]["300"]["content"] == "<|im_end|>"
    assert json.loads(found.files["special_tokens_map.json"])["additional_special_tokens"] == ["<s>", "<|im_end|>"]


def test_a_rule_for_a_token_that_is_listed_and_has_no_row_gives_it_one(tmp_path):
    members = [member(tmp_path, "A", CHAT, 300), member(tmp_path, "B", TALE, 300)]
    found = aligned_by(members, {"tokens": {"<|im_end|>": {"source": {"kind": "zero"}}}})
    assert (found.size, found.files) == (302, {})
    _, after = merged_rows(found, members)
    assert not after[0][301].any()
    assert after[0][300].any()  # listed too, and below: an average row


def test_all_that_is_wrong_with_rules_is_told_at_once(tmp_path):
    members = [member(tmp_path, "A", TALE), member(tmp_path, "B", CHAT)]
    rules = {
        "<|im_start|>": {"source": "A"},
        "<x>": {"source": {"kind": "model_token", "model": "A", "token": "<nothing>"}},
        "<y>": {"source": {"kind": "model_token", "model": "B", "token_id": 302}},
    }
    assert refused(members, {"source": "union", "tokens": rules}) == (
        "tokenizer.tokens.<|im_start|>: A has no row for it; name another model, or a `kind`",
        "tokenizer.tokens.<x>: A has 300 rows of tokens, and no token '<nothing>' among them",
        "tokenizer.tokens.<y>: B has 302 rows of tokens, and no row 302 among them",
    )


@pytest.mark.parametrize(
    "policy",
    [
        {"sorce": "union"},
        {"source": "A", "model": "B"},
        {"source": "base", "model": "B"},
        {"pad_to_multiple_of": 0},
        {"tokens": {"<x>": {"force": True}}},
        {"tokens": {"<x>": {"source": {"kind": "ones"}}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A"}}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A", "token": "a", "token_id": 1}}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "A", "token_id": -1}}}},
    ],
)
def test_policies_that_mean_nothing_are_refused(policy):
    with pytest.raises(ValueError):
        Tokenizer.model_validate(policy)


def test_misspelt_sources_get_a_hint(tmp_path):
    members = [member(tmp_path, label, TALE) for label in ("chat", "code")]
    assert refused(members, {"source": "unoin", "tokens": {"<s>": {"source": "caht"}}}) == (
        "tokenizer: 'unoin' is none of same, base, union, and no model (chat, code); did you mean 'union'?",
        "tokenizer.tokens.<s>: no model 'caht' (chat, code); did you mean 'chat'?",
    )


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["same", "base", "union", "A"])
def test_the_number_of_rows_can_be_rounded_up(policy, tmp_path):
    members = [member(tmp_path, "A", TALE, config={"vocab_size": 300}), member(tmp_path, "B", TALE)]
    found = aligned_by(members, {"source": policy, "pad_to_multiple_of": 64})
    tables, after = merged_rows(found, members)
    assert (found.size, found.config, found.trivial) == (320, {"vocab_size": 320}, False)
    for before, own in zip(tables, after, strict=True):
        assert np.array_equal(own[:300], before)
        np.testing.assert_allclose(own[300:], np.tile(before.mean(0), (20, 1)), atol=1e-6)


def test_padding_is_cut_where_a_multiple_says_so(tmp_path):
    members = [member(tmp_path, "A", TALE, 384), member(tmp_path, "B", TALE, 384)]
    found = aligned_by(members, {"pad_to_multiple_of": 8})
    tables, after = merged_rows(found, members)
    assert found.size == 304
    assert np.array_equal(after[1], tables[1][:304])
    assert aligned_by(members, {"pad_to_multiple_of": 1}).size == 300
    assert aligned_by(members).trivial
