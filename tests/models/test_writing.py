"""Writing agrees with transformers' `generate`, whatever the cache, the batch and the pieces that it comes in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens import bpe, unigram
from torch import nn

from lfm.errors import LfmError, RequestError
from lfm.models._sampling import choose, generators
from lfm.models._wording import BROKEN, Tellable, TokenizerWording
from lfm.models.local import byte_tokenizer
from lfm.models.text import Message, Sampling
from lfm.models.writing import ModuleStepper, TextModel, write

SIZE = 257
LLAMA = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
    "initializer_range": 0.5,
}
KINDS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=SIZE,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=256,
            eos_token_id=256,
            initializer_range=0.5,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(
            vocab_size=SIZE,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            eos_token_id=256,
            initializer_range=0.5,
        )
    ),
    "rwkv": lambda: tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, eos_token_id=256, bos_token_id=256)
    ),
    "bloom": lambda: tf.BloomForCausalLM(  # positions come from the attention mask alone
        tf.BloomConfig(vocab_size=SIZE, hidden_size=16, n_layer=2, n_head=2, eos_token_id=256, initializer_range=0.5)
    ),
    "sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, sliding_window=4)),
    "hybrid": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"])),
}
PROMPTS = ["ab", "The quick brown", "x", "no more", "ab"]


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return KINDS[kind]().eval()


def text_model(kind="llama"):
    return TextModel(made(kind), byte_tokenizer())


def written(model, prompts, **how):
    return write(model, prompts, Sampling(**how), None)


def texts(model, prompts, **how):
    return [answer.text for answer in written(model, prompts, **how)]


def generated(model, prompt, tokens):
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class Scripted(nn.Module):
    """A model without a cache that writes given tokens after any one-token prompt, then ends."""

    def __init__(self, *tokens, size=SIZE, end=256):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.tokens, self.size, self.end = [*tokens, end], size, end
        self.generation_config = SimpleNamespace(eos_token_id=[end])
        self.calls = 0

    def forward(self, input_ids):
        self.calls += 1
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[:, -1, self.tokens[min(input_ids.shape[1] - 1, len(self.tokens) - 1)]] = 5.0
        return SimpleNamespace(logits=logits)


def scripted(text, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    return TextModel(Scripted(*tokenizer(text)["input_ids"]), tokenizer)


# --- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The sliding window")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_writing_is_what_transformers_generates(kind):
    model = text_model(kind)
    expected = [generated(model, prompt, 12) for prompt in PROMPTS]
    assert texts(model, PROMPTS, max_new_tokens=12) == expected
    assert len(set(expected)) > 1


def test_every_token_is_read_once_with_a_cache_and_again_without():
    model = text_model()
    read = []
    model.module.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    written(model, ["abc"], max_new_tokens=5)
    assert read == [3, 1, 1, 1, 1]
    bare = scripted("hello")
    assert texts(bare, ["a"]) == ["hello"]
    assert bare.module.calls == 6


def test_log_probabilities_are_those_of_one_pass_over_the_whole():
    model = text_model()
    prompts = ["ab", "The quick"]
    for prompt, answer in zip(
        prompts, written(model, prompts, max_new_tokens=6, top_logprobs=3, temperature=1.0, seed=0), strict=True
    ):
        start = model.tokenizer(prompt)["input_ids"]
        vocabulary = {model.tokenizer.decode([i]): i for i in range(SIZE)}
        assert len(answer.tokens) == answer.completion_tokens == 6
        assert answer.finish == "length"
        assert answer.prompt_tokens == len(start)
        ids = list(start)
        for token in answer.tokens:
            with torch.no_grad():
                row = model.module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best = row.topk(3)
            assert next(iter(token.top.values())) == pytest.approx(best.values[0].item(), abs=1e-4)
            found = (row - token.logprob).abs().argmin().item() if token.text == BROKEN else vocabulary[token.text]
            assert row[found].item() == pytest.approx(token.logprob, abs=1e-4)
            ids.append(found)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_an_answer_does_not_change_with_what_else_is_asked():
    model = text_model()
    how = {"max_new_tokens": 10, "temperature": 1.0, "seed": 7}
    together = texts(model, PROMPTS, **how)
    assert [texts(model, [prompt], **how)[0] for prompt in PROMPTS[:4]] == together[:4]
    assert together[0] != together[4], "a prompt asked twice has two answers"
    assert texts(model, PROMPTS[::-1], **how)[::-1][1:4] == together[1:4]
    assert texts(model, PROMPTS, **how | {"seed": 8}) != together
    assert texts(model, PROMPTS, max_new_tokens=10, temperature=1.0) != together


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_is_asked(how, expected):
    order = [2, 0, 3, 1]  # the most probable token is not the first
    row = torch.zeros(4)
    row[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = generators(0, [(i,) for i in range(4000)])
    chosen = torch.tensor(choose(row.repeat(4000, 1), Sampling(**{"temperature": 1.0} | how), draws))
    counts = torch.stack([(chosen == token).double().mean() for token in order])
    assert torch.allclose(counts, torch.tensor(expected, dtype=torch.double), atol=0.03)
    assert not counts[torch.tensor(expected) == 0].any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=8), st.floats(0.01, 5), st.integers(0, 8), st.floats(0.01, 1))
def test_no_token_without_mass_is_ever_drawn(values, temperature, top_k, top_p):
    row = torch.tensor([*values, float("-inf")]).log_softmax(-1)
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    (token,) = choose(row[None], how, generators(1, ["a"]))
    assert row[token] > float("-inf")
    if top_k:
        assert row[token] >= row.topk(min(top_k, len(row))).values[-1]


# --- text -----------------------------------------------------------------------------------------------------------


def pieces(model, prompt="a", **how):
    """Return an answer and the pieces in which it was told."""
    heard = []
    (answer,) = write(model, [prompt], Sampling(**how), lambda index, piece: heard.append(piece))
    assert "".join(heard) == answer.text
    assert "" not in heard
    return answer, heard


def test_pieces_are_whole_characters():
    answer, heard = pieces(scripted("Ärger – 中文🙂!"))
    assert (answer.text, answer.finish) == ("Ärger – 中文🙂!", "stop")
    assert heard == list(answer.text)


def test_a_character_that_is_never_finished_is_shown_as_broken():
    half = byte_tokenizer()("🙂")["input_ids"][:2]
    tokens = byte_tokenizer()("ok")["input_ids"]
    model = TextModel(Scripted(*tokens, *half), byte_tokenizer())
    assert pieces(model) == (pieces(model)[0], ["o", "k", BROKEN])


@pytest.mark.parametrize(
    ("stop", "text", "heard"),
    [
        (["lo"], "hel", ["h", "e", "l"]),
        (["low"], "hello, world", None),
        (["world", "o, w"], "hell", ["h", "e", "l", "l"]),
        (["hello, world!"], "hello, world", ["hello, world"]),
        (["h"], "", []),
        (["zzz"], "hello, world", None),
    ],
)
def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(stop, text, heard):
    answer, told = pieces(scripted("hello, world"), stop=stop, top_logprobs=0)
    assert (answer.text, answer.finish) == (text, "stop")
    assert heard is None or told == heard
    assert "".join(token.text for token in answer.tokens) == text


def test_a_stop_text_may_end_within_a_token():
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=bpe(["one two three"] * 50, 300), eos_token="</s>")
    ids = tokenizer("one two three")["input_ids"]
    assert len(ids) == 3
    model = TextModel(Scripted(*ids, size=len(tokenizer), end=tokenizer.eos_token_id), tokenizer)
    prompt = tokenizer.decode(ids[:1])
    answer, heard = pieces(model, prompt, stop=["o t"], top_logprobs=1)
    assert (answer.text, heard) == ("one tw", ["one", " tw"])
    assert [token.text for token in answer.tokens] == ["one", " two"]
    assert answer.completion_tokens == 3


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.randoms())
def test_stopping_in_pieces_is_stopping_in_the_whole(text, stops, random):
    heard = []
    out = Tellable(stops, heard.append)
    rest, stopped = text, False
    while rest and not stopped:
        count = random.randint(1, 3)
        piece, rest = rest[:count], rest[count:]
        stopped = out.push(piece)
    out.finish()
    seen = text[: len(text) - len(rest)]
    cut = min((at for stop in stops if (at := seen.find(stop)) >= 0), default=len(seen))
    assert "".join(heard) == out.text == seen[:cut]
    assert stopped == any(stop in text for stop in stops)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_text_in_pieces_is_the_text(text):
    tokenizer = byte_tokenizer()
    wording = TokenizerWording(tokenizer, frozenset(), None)
    reader = wording.reader(tokenizer("ab")["input_ids"])
    out = [reader.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(out) + reader.flush() == text


def test_the_space_before_a_first_word_is_kept():
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=unigram(["the cat sat on the mat"] * 20))
    ids = tokenizer("the cat sat")["input_ids"]
    reader = TokenizerWording(tokenizer, frozenset(), None).reader(ids[:1])
    after = tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
    assert "".join(reader.push(token) for token in ids[1:]) + reader.flush() == after


def test_several_texts_are_told_apart():
    heard = {}
    model = text_model()
    answers = write(model, PROMPTS, Sampling(max_new_tokens=6), lambda i, piece: heard.setdefault(i, []).append(piece))
    assert ["".join(heard.get(index, [])) for index in range(len(PROMPTS))] == [answer.text for answer in answers]


# --- conversations --------------------------------------------------------------------------------------------------


def test_a_conversation_goes_through_the_chat_template():
    model = text_model()
    model.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    turns = [Message(role="system", content="Be kind."), Message(role="user", content="Hi")]
    text = "[system]Be kind.[user]Hi[me]"
    assert texts(model, [turns, text], max_new_tokens=8) == texts(model, [text, text], max_new_tokens=8)
    model.tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(RequestError, match="does not take this conversation: turns must alternate"):
        written(model, [turns])


def test_a_conversation_without_a_template_is_refused():
    with pytest.raises(RequestError, match="has no chat template"):
        written(text_model(), [[Message(role="user", content="Hi")]])


# --- bad input ------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_prompts_is_said_at_once():
    with pytest.raises(RequestError) as caught:
        written(text_model(), ["", "ok", [], "x" * 64, "x" * 60], max_new_tokens=8)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"prompt {i}" for i in (1, 3, 4, 5)]
    assert "an empty prompt is nothing to go on from" in caught.value.problems[0]
    assert "a conversation without a message" in caught.value.problems[1]
    assert "64 tokens and up to 8 new ones are more than the 64" in caught.value.problems[2]
    assert "shorten the prompt" in caught.value.problems[2]
    assert "set max_new_tokens to 4 or less" in caught.value.problems[3]


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="stop"):
        Sampling(stop=("",))


def test_a_model_of_nan_says_so():
    model = text_model()
    with torch.no_grad():
        model.module.lm_head.weight.fill_(float("nan"))
    with pytest.raises(LfmError, match="NaN"):
        written(model, ["a"], max_new_tokens=2)


def test_nothing_asked_is_nothing_written():
    assert written(text_model(), []) == []


def test_texts_of_several_lengths_need_padding():
    stepper = ModuleStepper(made("mamba"))
    assert not stepper.pads
    with pytest.raises(ValueError, match="several lengths"):
        stepper.start([[1, 2], [1]])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_repeated_and_reordered(kind):
    module = made(kind)
    stepper = ModuleStepper(module)
    stepper.start([[5, 6, 7], [8, 9, 10]])
    stepper.select(torch.tensor([1, 0, 1]))
    rows = stepper.step(torch.tensor([11, 12, 13]))
    fresh = ModuleStepper(module)
    assert torch.allclose(rows, fresh.start([[8, 9, 10, 11], [5, 6, 7, 12], [8, 9, 10, 13]]), atol=1e-5)


# --- a real model ---------------------------------------------------------------------------------------------------


def test_a_real_model_goes_on_with_a_story(assets):
    from lfm.models.local import load_model
    from lfm.models.ref import ModelRef

    model = load_model(ModelRef(ref=str(assets / "checkpoints/stories260k")))
    assert model.complete(["Once upon a time", "Once upon a"], max_new_tokens=30) == [
        ", there was a little girl named Lily. She loved to play outside in the park. One day,",
        " time, there was a little girl named Lily. She loved to play outside in the park. One day",
    ]
