"""Which tensors have rows of tokens, and reading them in another order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens import output, reader, table

from lfm.reuse.merge._tokens.tables import Tables, aligned, mean_rows, read_rows, vocabulary_tables
from lfm.reuse.merge._tokens.vocabulary import Alignment, Member

# --- which tensors ---------------------------------------------------------------------------------------------------

LAYER = {
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.output.weight": (50, 8),
    "norm.weight": (8,),
}


@pytest.mark.parametrize(
    ("tables", "rest", "config"),
    [
        ({"model.embed_tokens.weight": (50, 8)}, LAYER, {"vocab_size": 50, "tie_word_embeddings": True}),
        ({"model.embed_tokens.weight": (50, 8), "lm_head.weight": (50, 8)}, LAYER, None),
        ({"transformer.wte.weight": (50, 8)}, {"transformer.wpe.weight": (50, 8)}, {"n_ctx": 50, "vocab_size": 50}),
        ({"gpt_neox.embed_in.weight": (50, 8), "embed_out.weight": (50, 8)}, {}, {"vocab_size": 48}),
        (
            {
                "bert.embeddings.word_embeddings.weight": (50, 8),
                "cls.predictions.bias": (50,),
                "cls.predictions.decoder.weight": (50, 8),
                "cls.predictions.decoder.bias": (50,),
            },
            {"bert.embeddings.position_embeddings.weight": (50, 8), "cls.predictions.transform.dense.weight": (8, 8)},
            {"vocab_size": 50, "max_position_embeddings": 50},
        ),
        (
            {
                "shared.weight": (50, 8),
                "encoder.embed_tokens.weight": (50, 8),
                "decoder.embed_tokens.weight": (50, 8),
                "lm_head.weight": (50, 8),
            },
            {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2)},
            {"vocab_size": 50},
        ),
        (
            {"model.shared.weight": (50, 8), "final_logits_bias": (1, 50), "lm_head.weight": (50, 8)},
            {"model.encoder.embed_positions.weight": (66, 8)},
            {"vocab_size": 50},
        ),
        ({"word_embeddings.weight": (50, 8), "lm_head.bias": (50,)}, {"ln_f.bias": (8,)}, {}),
        ({"lm_head.weight": (32, 8), "lm_head.bias": (32,)}, {"wav2vec2.masked_spec_embed": (8,)}, {"vocab_size": 32}),
        ({"odd.lookup.weight": (50, 8), "scores": (50,)}, {"odd.layers.0.w1": (50, 8)}, {"vocab_size": 50, "width": 8}),
        (
            {"model.language_model.embed_tokens.weight": (50, 8), "lm_head.weight": (50, 8)},
            {"model.vision_tower.embeddings.position_embedding.weight": (50, 8)},
            {"text_config": {"vocab_size": 50, "hidden_size": 8}, "vision_config": {"num_positions": 50}},
        ),
        ({}, {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 16)}, None),
    ],
)  # fmt: skip
def test_tables_are_found_in_any_architecture(tables, rest, config):
    known = Tables(next(iter(tables.values()))[0], tuple(tables)) if tables else Tables()
    if config == {"vocab_size": 50}:  # with a config that explains no other 50, the one in a layer is odd, not a table
        assert set(vocabulary_tables({**rest, **tables}, config).names) == set(tables)
    if "odd.layers.0.w1" in rest:
        known = Tables(50, known.names, ("odd.layers.0.w1",))
        assert vocabulary_tables({**tables, **rest}, config) == known
        assert vocabulary_tables({**tables, **rest}) == Tables()  # without a config nothing tells
    else:
        found = vocabulary_tables({**tables, **rest}, config)
        assert (found.rows, found.names) == (known.rows, known.names)


def test_an_embedding_as_wide_as_it_is_long_takes_no_layer_with_it():
    shapes = {
        "embed_tokens.weight": (8, 8),
        "layers.0.proj.weight": (8, 8),
        "proj_in.weight": (8, 8),
        "norm.weight": (8,),
    }
    assert vocabulary_tables(shapes, {"vocab_size": 8, "hidden_size": 8}).names == ("embed_tokens.weight",)


def test_what_belongs_to_tokens_in_another_way_is_told_apart():
    shapes = {
        "model.embed_tokens.weight": (50, 8),
        "model.embed_tokens_per_layer.weight": (40, 8),
        "model.layers.0.mlp.gate.tid2eid": (50, 2),
        "cls.predictions.dense.weight": (4, 50),
    }
    found = vocabulary_tables(shapes, {"vocab_size": 50, "hidden_size": 8})
    assert found == Tables(50, ("model.embed_tokens.weight",), tuple(shapes)[1:])


# --- reading rows ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_rows_are_read_in_their_new_order_in_parts_of_any_size(data):
    width, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    rows = np.array(data.draw(st.lists(st.integers(-1, count - 1), min_size=1, max_size=20)))
    stored = np.arange(1.0, count * width + 1, dtype=np.float32).reshape(count, width)
    stop = data.draw(st.integers(0, len(rows) * width))
    start = data.draw(st.integers(0, stop))
    values, missing = read_rows(reader(stored), rows, width, start, stop)
    whole = np.where(rows[:, None] >= 0, stored[rows], 0)
    assert values.tolist() == whole.reshape(-1)[start:stop].tolist()
    touched = sorted({place // width for place in range(start, stop)})
    assert missing.tolist() == [bool(rows[row] < 0) for row in touched] or start == stop


def test_rows_that_follow_each_other_are_read_in_one_go():
    calls = []

    def read(first, last):
        calls.append((first, last))
        return np.ones(last - first, np.float16)

    rows = np.array([4, 5, 6, -1, -1, 2, 1, 7, 8])
    values, missing = read_rows(read, rows, 10, 5, 85, np.float16)
    assert calls == [(45, 70), (20, 30), (10, 20), (70, 85)]
    assert values.dtype == np.float16
    assert values.tolist() == [1] * 25 + [0] * 20 + [1] * 35
    assert missing.tolist() == [False] * 3 + [True] * 2 + [False] * 4


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_aligned_tables_are_those_of_a_slow_loop_in_parts_of_any_size(data):
    size, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    members = [Member(str(index), None, Tables(data.draw(st.integers(1, 6)))) for index in range(3)]
    lists = st.lists(st.integers(-1, 100), min_size=size, max_size=size)
    drawn = [np.minimum(np.array(data.draw(lists)), member.rows - 1) for member in members * 2]
    flags = np.array(data.draw(st.lists(st.sampled_from([False, False, True]), min_size=size, max_size=size)))
    named = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    named[flags.argmin()] = True
    flags[flags.argmin()] = False  # at least one row for means to be means of
    alignment = Alignment(size, tuple(drawn[:3]), tuple(drawn[3:]), flags, named)
    tables = [table(member, width, seed) for seed, member in enumerate(members)]
    reads = [reader(own) for own in tables]
    means = mean_rows(reads, alignment, width)
    step = data.draw(st.integers(1, size * width))
    cuts = [*range(0, size * width, step), size * width]
    parts = [aligned(reads, alignment, width, a, b, means=means) for a, b in pairwise(cuts)]
    expected = output(alignment, members, tables)
    for index, own in enumerate(expected):
        np.testing.assert_allclose(
            np.concatenate([part[index] for part in parts]), own.reshape(-1), rtol=2e-6, atol=1e-7
        )


def test_a_row_of_one_donor_keeps_its_bits():
    one, two = np.array([[-0.0, 1e-40]], np.float32), np.array([[1.0, 2.0]], np.float32)
    rows, none = (np.array([0, -1]), np.array([-1, 0])), np.zeros(2, bool)
    alignment = Alignment(2, rows, rows, none, ~none)
    found = aligned([reader(one), reader(two)], alignment, 2, 0, 4)
    assert found[1].view(np.int32).tolist() == np.array([-0.0, 1e-40, 1, 2], np.float32).view(np.int32).tolist()
