"""From rows to tensors: which tokens are predicted, what padding may change, what images become."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lfm.data import Rows
from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import IGNORE, Encoder, class_names, inputs_of, targets
from lfm.models.handle import Model
from lfm.models.local import LocalBackend, byte_tokenizer
from lfm.models.ref import ImageSpec

WORDS = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(60))])}


def words(bos=None, eos=None, ends_all=False):
    """A tokenizer of words, with or without special tokens."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if ends_all:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token=bos, eos_token=eos)


def texts(*documents, joined=None):
    return Rows({"text": list(documents)}, "rows", joined=joined)


def numbered(first, count):
    return " ".join(f"w{i}" for i in range(first, first + count))


def ids(text):
    return [WORDS[word] for word in text.split()]


def encode(rows, tokenizer, length=8, packed=False, task="causal-lm", **known):
    return Encoder(task, tokenizer, **known).encode(rows, length, packed=packed)


def predicted(examples):
    """Every (preceding token, predicted token) that takes part in the loss, in order."""
    found = []
    for index in range(len(examples)):
        batch = examples.batch([index])
        row, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        found += [(row[i], labels[i + 1]) for i in range(len(row) - 1) if labels[i + 1] != IGNORE]
    return found


def pairs(stream):
    return list(pairwise(stream))


# --- plain text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 7, 8, 9, 15, 16, 50])
def test_every_token_but_the_first_is_predicted_once(count):
    text = numbered(0, count)
    examples = encode(texts(text), words(), length=8)
    assert predicted(examples) == pairs(ids(text))
    assert max(examples.batch([i])["input_ids"].shape[1] for i in range(len(examples))) <= 8


def test_documents_are_kept_apart_for_measuring_and_put_together_for_training():
    first, second = numbered(0, 10), numbered(20, 3)
    apart = encode(texts(first, second), words(bos="<s>", eos="</s>"))
    assert predicted(apart) == pairs([1, *ids(first)]) + pairs([1, *ids(second)])
    together = encode(texts(first, second), words(bos="<s>", eos="</s>"), packed=True)
    assert predicted(together) == pairs([1, *ids(first), 1, *ids(second)])


def test_packed_documents_are_divided_by_what_the_tokenizer_has():
    rows = texts("w1 w2", "", "w3")
    assert predicted(encode(rows, words(eos="</s>"), packed=True)) == pairs([4, 5, 2, 2, 6, 2])
    assert predicted(encode(rows, words(eos="</s>", ends_all=True), packed=True)) == pairs([4, 5, 2, 2, 6, 2])
    assert predicted(encode(rows, words(), packed=True)) == pairs([4, 5, 6])
    assert encode(rows, words(), packed=True).batch([0])["input_ids"].dtype == torch.int64


def test_neighbours_in_one_file_are_joined_as_they_were():
    rows = texts("w1 w2", "w3", joined="\n\n")
    for packed in (True, False):
        assert predicted(encode(rows, words(), packed=packed)) == pairs([4, 5, 6])
    assert encode(rows, words()).characters == len("w1 w2\n\nw3")
    assert encode(texts("w1 w2", "w3 w4"), words()).characters == 10


def test_text_without_two_tokens_is_refused():
    with pytest.raises(RequestError, match="rows: no text of two tokens or more"):
        encode(texts("w1", ""), words())


def test_bytes_are_characters_where_they_are_ascii():
    text = "Hello, world. " * 9
    examples = encode(texts(text), byte_tokenizer(), length=16)
    assert examples.characters == len(text)
    assert len(predicted(examples)) == len(text) - 1


def test_more_tokens_than_the_model_takes_are_refused_before_it_sees_them():
    tokenizer = words()
    rows = texts(numbered(0, 40))
    with pytest.raises(RequestError, match="has texts of 32 tokens, and the model takes 16; set `length` to 16 or"):
        encode(rows, tokenizer, length=32, context=16)
    assert len(encode(rows, tokenizer, length=16, context=16)) == 3
    assert len(encode(texts("w1 w2"), tokenizer, length=32, context=16)) == 1


# --- prompts and completions ----------------------------------------------------------------------------------------


def answers(*rows):
    return Rows({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]}, "rows")


def test_only_the_answer_and_its_end_carry_loss():
    batch = encode(answers(("w1 w2 w3", "w4 w5")), words(bos="<s>", eos="</s>")).batch([0])
    assert batch["input_ids"][0].tolist() == [1, 4, 5, 6, 7, 8, 2]
    assert batch["labels"][0].tolist() == [IGNORE] * 4 + [7, 8, 2]


def test_a_prompt_is_not_ended_before_its_answer():
    batch = encode(answers(("w1 w2", "w4")), words(eos="</s>", ends_all=True)).batch([0])
    assert batch["input_ids"][0].tolist() == [4, 5, 7, 2]


def test_a_long_prompt_is_cut_from_its_beginning_and_a_long_answer_from_its_end():
    tokenizer = words(eos="</s>")
    long_prompt = encode(answers((numbered(0, 20), "w30 w31")), tokenizer, length=8).batch([0])
    assert long_prompt["input_ids"][0].tolist() == [*ids(numbered(15, 5)), *ids("w30 w31"), 2]
    long_answer = encode(answers((numbered(0, 20), numbered(30, 20))), tokenizer, length=8).batch([0])
    assert long_answer["input_ids"][0].tolist() == [*ids("w19"), *ids(numbered(30, 7))]
    assert long_answer["labels"][0].tolist() == [IGNORE, *ids(numbered(30, 7))]


def test_a_row_that_predicts_nothing_is_named():
    with pytest.raises(RequestError, match=r"rows\[1\]: has no completion to learn from"):
        encode(answers(("w1", "w2"), ("w1", "")), words())
    assert len(predicted(encode(answers(("w1", "")), words(eos="</s>")))) == 1
    with pytest.raises(RequestError, match=r"rows\[0\]: has no prompt to learn from"):
        encode(answers(("", "w1")), words())


def test_answers_have_no_number_of_characters():
    assert encode(answers(("w1", "w2")), words()).characters is None


# --- padding --------------------------------------------------------------------------------------------------------


def model_of(kind):
    size = {"vocab_size": 63, "num_labels": 3}
    llama = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match kind:
            case "llama":
                module = tf.LlamaForCausalLM(tf.LlamaConfig(**size, **llama))
            case "llama-classifier":
                module = tf.LlamaForSequenceClassification(tf.LlamaConfig(**size, **llama))
            case "gpt2":
                module = tf.GPT2LMHeadModel(tf.GPT2Config(**size, n_embd=16, n_layer=2, n_head=2))
            case "gpt2-classifier":
                config = tf.GPT2Config(**size, n_embd=16, n_layer=2, n_head=2, pad_token_id=2)
                module = tf.GPT2ForSequenceClassification(config)
            case "bert-classifier":
                module = tf.BertForSequenceClassification(tf.BertConfig(**size, **llama))
    return module.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-classifier", "gpt2-classifier", "bert-classifier"])
def test_padding_changes_no_logits(kind):
    documents = ["w0 w1", numbered(0, 8), "<unk> w0 <unk>", "w5"]
    classify = kind.endswith("classifier")
    task = "text-classification" if classify else "causal-lm"
    tokenizer = words(bos="<s>", eos="</s>")
    rows = Rows({"text": documents, "label": ["a", "b", "a", "b"]}, "rows")
    encoder = Encoder(task, tokenizer, classes={"a": 0, "b": 1}, pad=2)
    examples = encoder.encode(rows, 16)
    module = model_of(kind)
    model = Model(LocalBackend(module, tokenizer), Access.WEIGHTS, task, encoder, "tiny")
    together = model.logits(examples.batch(range(4)))
    for index in range(4):
        alone = model.logits(examples.batch([index]))[0]
        padded = together[index] if classify else together[index, : len(alone)]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_padding_takes_no_part_in_the_loss():
    batch = encode(texts("w1 w2", numbered(0, 6)), words()).batch([0, 1])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    assert batch["labels"][0].tolist() == [4, 5, IGNORE, IGNORE, IGNORE, IGNORE]
    scores, labels = targets(torch.zeros(2, 6, 63), batch["labels"], "causal-lm")
    assert scores.shape == (10, 63)
    assert int((labels != IGNORE).sum()) == 6


# --- labelled texts -------------------------------------------------------------------------------------------------


def test_texts_are_cut_and_carry_the_class_of_their_label():
    rows = Rows({"text": [numbered(0, 30), "w1", ""], "label": np.array([3, 7, 3])}, "rows")
    names = class_names(rows)
    assert names == {"3": 0, "7": 1}
    batch = encode(rows, words(), task="text-classification", classes=names, pad=9).batch([0, 1, 2])
    assert batch["input_ids"][0].tolist() == ids(numbered(0, 8))
    assert batch["input_ids"][1].tolist() == [4] + [9] * 7
    assert batch["labels"].tolist() == [0, 1, 0]
    assert inputs_of(batch).keys() == {"input_ids", "attention_mask"}


def test_a_label_that_the_model_does_not_know_is_named_with_what_to_do():
    rows = Rows({"text": ["w1", "w2"], "label": ["good", "odd"]}, "rows")
    with pytest.raises(RequestError, match=r"has no class called odd; it has bad, good\. Tune it with --new-head"):
        encode(rows, words(), task="text-classification", classes={"bad": 0, "good": 1})
    with pytest.raises(RequestError, match=r"it has 0, 1, .* 9 \.\.\. \(12\)"):
        encode(rows, words(), task="text-classification", classes={str(i): i for i in range(12)})


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("causal-lm", {"label": ["a"]}),
        ("text-classification", {"text": ["w1"]}),
        ("text-classification", {"image": np.zeros((1, 2, 2), np.uint8), "label": ["a"]}),
        ("image-classification", {"text": ["w1"], "label": ["a"]}),
        ("image-classification", {"image": np.zeros((1, 2, 2), np.uint8)}),
    ],
)
def test_rows_that_do_not_fit_the_task_are_refused(task, columns):
    image = ImageSpec(size=2, channels=1) if task == "image-classification" else None
    with pytest.raises(RequestError, match=f"rows: {task} takes the columns .*; these rows have"):
        encode(Rows(columns, "rows"), words(), task=task, classes={"a": 0}, image=image)


def test_text_without_a_tokenizer_and_images_without_a_format_are_refused():
    with pytest.raises(RequestError, match="text needs a tokenizer, and the model has none"):
        encode(texts("w1 w2"), None)
    rows = Rows({"image": np.zeros((1, 2, 2), np.uint8), "label": ["a"]}, "rows")
    with pytest.raises(RequestError, match="an image model needs to know its input"):
        encode(rows, None, task="image-classification", classes={"a": 0})


# --- images ---------------------------------------------------------------------------------------------------------


def pictures(images, spec):
    count = len(images)
    rows = Rows({"image": images, "label": ["a"] * count}, "rows")
    examples = Encoder("image-classification", image=spec, classes={"a": 0}).encode(rows, 8)
    return examples.batch(range(count))["pixel_values"]


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_are_normalised_channel_by_channel():
    images = random_images(2, 4, 4, 3)
    spec = ImageSpec(size=4, channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels = pictures(images, spec)
    assert pixels.shape == (2, 3, 4, 4)
    for channel in range(3):
        expected = (images[..., channel] / 255 - spec.mean[channel]) / spec.std[channel]
        np.testing.assert_allclose(pixels[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_grey_becomes_colour_and_colour_becomes_grey():
    plain = {"mean": (0.0,), "std": (1.0,)}
    grey, colour = random_images(2, 4, 4), random_images(2, 4, 4, 3)
    as_colour = pictures(grey, ImageSpec(size=4, channels=3, **plain))
    assert as_colour.shape == (2, 3, 4, 4)
    for channel in range(3):
        np.testing.assert_allclose(as_colour[:, channel], grey / 255, rtol=1e-6)
    as_grey = pictures(colour, ImageSpec(size=4, channels=1, **plain))
    np.testing.assert_allclose(as_grey[:, 0], colour.mean(-1) / 255, rtol=1e-5)


def test_images_are_resized_as_pillow_resizes_them():
    image = pytest.importorskip("PIL.Image")
    images = random_images(2, 9, 7, 3)
    for size in (4, 16):
        pixels = pictures(images, ImageSpec(size=size, channels=3, mean=(0.0,), std=(1.0,)))
        for index in range(2):
            resized = image.fromarray(images[index]).resize((size, size), image.Resampling.BILINEAR)
            expected = np.asarray(resized).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(pixels[index], expected, atol=1.5 / 255)


def test_images_of_different_sizes_come_into_one_batch():
    images = [random_images(6, 5), random_images(4, 4, 3), random_images(4, 4)]
    spec = ImageSpec(size=4, channels=3, mean=(0.0,), std=(1.0,))
    pixels = pictures(images, spec)
    assert pixels.shape == (3, 3, 4, 4)
    torch.testing.assert_close(pixels[1], pictures(images[1][None], spec)[0])
    torch.testing.assert_close(pixels[2], pictures(images[2][None], spec)[0])
