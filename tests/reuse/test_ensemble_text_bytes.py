"""Next bytes from models of tokens are what all tokenisations sum to, and models of two vocabularies join."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as tf
from tests.tokens import bpe, unigram, wordpiece
from tokenizers import decoders

from lfm.errors import RequestError
from lfm.models._sampling import generators
from lfm.models.local import byte_tokenizer, load_model
from lfm.models.ref import ModelRef
from lfm.models.text import Message, Sampling
from lfm.models.writing import ModuleStepper, TextModel, write, write_with
from lfm.reuse.ensemble._bytes import END, Beam, ByteStepper, ByteWording, Speller, Spelling, bits
from lfm.reuse.ensemble._stepping import AveragedStepper
from lfm.reuse.ensemble._trie import Trie, token_bytes

WIDE = {"width": 100_000, "floor": 0.0}
TEXTS = ["banana bandana", "abba baba", "naïve – 中"] * 10


def tokenizer(size=300, texts=TEXTS):
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe(texts, size), bos_token="<s>", eos_token="</s>")


def pieces(texts):
    made = unigram(texts)
    made.decoder = decoders.Metaspace()
    return made


def llama(vocabulary, seed=0, **options):
    config = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "eos_token_id": vocabulary.eos_token_id,
        "initializer_range": 0.4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = tf.MistralConfig if "sliding_window" in options else tf.LlamaConfig
        cls = tf.MistralForCausalLM if "sliding_window" in options else tf.LlamaForCausalLM
        module = cls(kind(**config | options)).eval()
    return TextModel(module, vocabulary)


def speller(seed=0, size=300, **options):
    return Speller(llama(tokenizer(size), seed), **options)


# --- the vocabulary -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [bpe(TEXTS), pieces([t for t in TEXTS if t.isascii()])], ids=["bytes", "pieces"])
def test_tokens_are_spelled(made):
    found = tf.PreTrainedTokenizerFast(tokenizer_object=made)
    tokens = token_bytes(found)
    ids = found("banana bandana", add_special_tokens=False)["input_ids"]
    assert b"".join(tokens[index] for index in ids).strip() == b"banana bandana"
    assert all(tokens[index] == b"" for index in found.all_special_ids)


def test_a_tokenizer_of_words_is_refused():
    with pytest.raises(RequestError, match="neither byte-level nor"):
        token_bytes(tf.PreTrainedTokenizerFast(tokenizer_object=wordpiece(["some words"])))


def test_the_tree_of_a_vocabulary():
    words = [b"a", b"ab", b"abc", b"b", b"", b"a"]
    trie = Trie(words)
    node = trie.child(trie.root, ord("a"))
    assert [words[i] for i in trie.ids[node.first : node.last]] == [b"a", b"a", b"ab", b"abc"]
    assert int(trie.edges(node)[0]) - node.first == 2, "two tokens end here"
    deep = trie.child(trie.child(node, ord("b")), ord("c"))
    assert [words[i] for i in trie.ids[deep.first : deep.last]] == [b"abc"]
    empty = trie.child(deep, ord("x"))
    assert empty.first == empty.last


# --- against the sum over all tokenisations ---------------------------------------------------------------------------


def said(member, ids):
    """Return what a model says of the next token when it may say no special token but the end."""
    with torch.no_grad():
        probs = member.model.module(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    allowed = torch.tensor([bool(token) for token in member.tokens])
    allowed[list(member.model.ends)] = True
    return (probs * allowed / probs[allowed].sum()).numpy()


def exact(member, text, ids, ended):
    """Return the probability of all token sequences that spell `text`, and end there or go on."""
    probs = said(member, ids) if text or ended else None
    if not text:
        return probs[list(member.model.ends)].sum() if ended else 1.0
    total = 0.0
    for index, token in enumerate(member.tokens):
        if token and text.startswith(token):
            total += probs[index] * exact(member, text[len(token) :], [*ids, index], ended)
        elif token.startswith(text) and token != text and not ended:
            total += probs[index]
    return total


@pytest.mark.parametrize("kind", ["cached", "sliding"])
@pytest.mark.parametrize("text", ["banana", "ab ba", "na ï", "中"])
def test_a_wide_beam_is_the_sum_over_all_tokenisations(text, kind):
    options = {"sliding_window": 3} if kind == "sliding" else {}
    member = Speller(llama(tokenizer(), 0, **options), **WIDE)
    assert ModuleStepper(member.model.module).gaps == (kind == "cached")
    beam, total = Beam(member, b""), 0.0
    for byte in text.encode():
        total += math.log(beam.next()[byte])
        beam.push(byte)
    raw = text.encode()
    assert total == pytest.approx(math.log(exact(member, raw, member.lead, ended=False)), abs=1e-4)
    ended = total + math.log(beam.next()[END])
    assert ended == pytest.approx(math.log(exact(member, raw, member.lead, ended=True)), abs=1e-4)


def test_probabilities_of_next_bytes_sum_to_one():
    spelling = Spelling([speller(0), speller(1, 320)], [1, 3], "probabilities", b"ban")
    for byte in b"ana bandana":
        for one in [*spelling.each(), spelling.next().exp().numpy()]:
            assert one.sum() == pytest.approx(1, abs=1e-9)
            assert (one >= 0).all()
        spelling.push(byte)


def test_a_narrow_beam_is_near_a_wide_one():
    text = "banana bandana abba"
    wide, narrow = (bits([speller(0, **options)], [1], text).together for options in ({"width": 500, "floor": 0.0}, {}))
    assert narrow == pytest.approx(wide, rel=0.05)


def test_no_beam_loses_a_text_that_the_vocabulary_can_spell():
    text = "banxana Ärger – 中文🙂 banbanana"
    for options in ({"width": 1}, {"width": 2, "floor": 0.5}, {"width": 8, "floor": 0.9}):
        assert math.isfinite(bits([speller(0, **options)], [1], text).together)


def test_the_same_model_twice_is_the_model():
    text = "banana bandana"
    for of in ("probabilities", "logits"):
        both = bits([speller(0), speller(0)], [1, 2], text, of)
        assert both.members[0] == both.members[1] == pytest.approx(both.together, rel=1e-9)
    assert bits([speller(0), speller(1)], [1, 0], text).together == pytest.approx(both.members[0], rel=1e-12)


def test_averages_are_those_of_the_formulas():
    members = [speller(0), speller(1, 320)]
    for of in ("probabilities", "logits"):
        spelling = Spelling(members, [1, 3], of, b"ban")
        first, second = spelling.each()
        if of == "probabilities":
            expected = 0.25 * first + 0.75 * second
        else:
            expected = first**0.25 * second**0.75
            expected /= expected.sum()
        assert np.allclose(spelling.next().exp().numpy(), expected, atol=1e-12)


# --- writing --------------------------------------------------------------------------------------------------------


def by_bytes(members, weights, prompts, **how):
    return write_with(ByteStepper(members, weights), ByteWording(), prompts, Sampling(**how), None)


def test_greedy_bytes_are_the_most_probable_ones():
    members = [speller(0), speller(1, 320)]
    prompt = "ban"
    (answer,) = by_bytes(members, [1, 1], [prompt], max_new_tokens=6, top_logprobs=2)
    spelling = Spelling(members, [1, 1], "probabilities", prompt.encode())
    expected = []
    for _ in range(6):
        expected.append(int(spelling.next().argmax()))
        if expected[-1] == END:
            break
        spelling.push(expected[-1])
    assert answer.text == bytes(byte for byte in expected if byte != END).decode(errors="replace")
    assert answer.prompt_tokens == 3


def test_a_model_of_bytes_writes_as_it_does_alone():
    model = llama(byte_tokenizer())
    prompts, how = ["abc", "The quick brown"], Sampling(max_new_tokens=20)
    alone = write(model, prompts, how, None)
    joined = write_with(ByteStepper([Speller(model)] * 2, [1, 1]), ByteWording(), prompts, how, None)
    assert [answer.text for answer in joined] == [answer.text for answer in alone]


def test_sampled_bytes_do_not_depend_on_the_batch():
    members, how = [speller(0), speller(1, 320)], {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    prompts = ["ban", "abba ", "ban"]
    together = [answer.text for answer in by_bytes(members, [1, 1], prompts, **how)]
    assert together[1] == by_bytes(members, [1, 1], ["abba "], **how)[0].text
    assert together[0] != together[2]


def test_rows_go_their_own_ways():
    stepper = ByteStepper([speller(0), speller(1, 320)], [1, 1])
    stepper.start([list(b"ban"), list(b"ab")])
    stepper.select(torch.tensor([1, 0, 1]))
    rows = stepper.step(torch.tensor([*b"bac"]))
    fresh = [ByteStepper([speller(0), speller(1, 320)], [1, 1]) for _ in range(3)]
    alone = []
    for one, prompt, byte in zip(fresh, (b"ab", b"ban", b"ab"), b"bac", strict=True):
        one.start([list(prompt)])
        alone.append(one.step(torch.tensor([byte])))
    assert torch.allclose(rows, torch.cat(alone), atol=1e-5)


def test_a_member_that_cannot_spell_a_text_abstains():
    narrow = tf.PreTrainedTokenizerFast(tokenizer_object=pieces(["banana bandana abba"] * 20), bos_token="<unk>")
    narrow.eos_token = "<pad>"
    members = [Speller(llama(narrow)), speller(1, 320)]
    found = bits(members, [1, 1], "banana 中 ban")
    assert found.members[0] == math.inf
    assert math.isfinite(found.together)
    with pytest.raises(RequestError, match="no member's vocabulary"):
        bits(members[:1], [1], "banana 中 ban")


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(RequestError, match="share no chat template"):
        by_bytes([speller(0)], [1], [[Message(role="user", content="Hi")]])
    with pytest.raises(RequestError, match="longer than the 128 tokens"):
        by_bytes([speller(0)], [1], ["中 x" * 80])
    bare = tf.PreTrainedTokenizerFast(tokenizer_object=bpe(TEXTS))
    with pytest.raises(RequestError, match="marks no beginning"):
        bits([Speller(TextModel(llama(tokenizer()).module, bare))], [1], "a")


# --- one vocabulary -------------------------------------------------------------------------------------------------


def averaged(models, weights, of="probabilities", prompts=("ban", "abba baba"), **how):
    stepper = AveragedStepper([ModuleStepper(model.module) for model in models], weights, of)
    return write_with(stepper, models[0].wording, prompts, Sampling(max_new_tokens=8, top_logprobs=1, **how), None)


def test_one_hot_weights_are_the_single_model_bit_for_bit():
    models = [llama(tokenizer(), 0), llama(tokenizer(), 1)]
    for of in ("probabilities", "logits"):
        for index, model in enumerate(models):
            alone = write(model, ["ban", "abba baba"], Sampling(max_new_tokens=8, top_logprobs=1), None)
            assert averaged(models, [1 - index, index], of) == alone


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_tokens_are_averaged_as_the_formulas_say(of):
    models = [llama(tokenizer(), 0), llama(tokenizer(), 1)]
    stepper = AveragedStepper([ModuleStepper(model.module) for model in models], [1, 3], of)
    ids = models[0].tokenizer("banana abba ban")["input_ids"]
    assert len(ids) > 1
    stepper.start([ids[:-1]])
    found = stepper.step(torch.tensor(ids[-1:]))[0].double().exp()
    with torch.no_grad():
        each = [model.module(torch.tensor([ids])).logits[0, -1].double().softmax(-1) for model in models]
    expected = 0.25 * each[0] + 0.75 * each[1] if of == "probabilities" else each[0] ** 0.25 * each[1] ** 0.75
    assert torch.allclose(found, expected / expected.sum(), atol=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-5)


def test_generators_do_not_repeat():
    first, second = (torch.rand(4, generator=one) for one in generators(0, ["a", "a"]))
    assert not torch.equal(first, second)


# --- a real model ---------------------------------------------------------------------------------------------------


def test_a_real_model_is_no_worse_by_bytes_than_by_tokens(assets):
    folder = assets / "checkpoints/stories260k"
    model = load_model(ModelRef(ref=str(folder)))
    own = TextModel(model.module, model.encoder.tokenizer)
    text = "Once upon a time, there was a little girl named Lily."
    ids = torch.tensor([own.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        rows = own.module(ids).logits[0].log_softmax(-1)
    by_tokens = -sum(rows[place, token].item() for place, token in enumerate(ids[0, 1:])) / math.log(2)
    found = bits([Speller(own)], [1], text)
    assert found.together < by_tokens + 0.5, "all tokenisations together have at least the mass of one"
    (answer,) = by_bytes([Speller(own)], [1], ["Once upon a ti"], max_new_tokens=30)
    assert answer.text.startswith("me, there was a little girl")
