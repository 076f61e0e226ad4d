"""Where subjects and targets are among the tokens, with tokenizers of all kinds."""

from types import SimpleNamespace

import pytest
from tests.edit import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lfm.data.requests import Request
from lfm.edit._locate import asked, tokens_of
from lfm.errors import RequestError

TEXTS = ["The home of Zoë Łuków is Rome", "東京 is the capital of 日本", "Bo lives in Oslo. Bo likes Bo"]
CASES = [  # prompt, subject, and what the text up to the subject's last token holds
    ("The home of Zoë Łuków is", "Zoë Łuków"),
    ("東京 is the capital of", "東京"),
    ("Bo lives where Bo", "Bo"),  # twice, and at the end
    ("Who knows Ada Byron", "Ada Byron"),
]


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def model_of(tokenizer):
    return SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer))


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def model(request, assets):
    if request.param == "bytes":
        return model_of(bytes_tokenizer())
    folder = next(file.parent for file in sorted(assets.rglob("tokenizer_config.json")) if "260" in str(file))
    return model_of(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(("prompt", "subject"), CASES)
@pytest.mark.parametrize("before", ["", "Once upon a time. "])
def test_the_last_token_of_the_subject_is_found(model, prompt, subject, before):
    found = asked(model, Request(prompt, "", subject), before)
    tokenizer = model.encoder.tokenizer
    upto = tokenizer.decode(found.ids[: found.subject + 1], skip_special_tokens=True)
    short = tokenizer.decode(found.ids[: found.subject], skip_special_tokens=True)
    whole = tokenizer.decode(found.ids, skip_special_tokens=True)
    end = whole.rindex(subject) + len(subject)  # a subject that stands there twice is meant where it stands last
    assert len(short.rstrip("\ufffd")) < end <= len(upto)


def test_without_a_subject_the_last_token_stands_for_it(model):
    found = asked(model, Request("Who knows Ada", ""))
    assert found.subject == len(found.ids) - 1


def test_a_target_begins_behind_the_prompt(model):
    request = Request("Zoë Łuków lives in", "", "Zoë Łuków")
    found = asked(model, request, target="Rome")
    assert found.ids[: found.target] == tokens_of(model, request.prompt)[0]
    assert model.encoder.tokenizer.decode(found.ids[found.target :]).strip() == "Rome"
    assert found.subject < found.target


def test_words_as_tokens():
    model = model_of(world.tokenizer(12))
    [one, *_] = world.requests(1, count=12)
    found = asked(model, Request(one["prompt"], one["target"], one["subject"]), target=one["target"])
    assert model.encoder.tokenizer.decode([found.ids[found.subject]]) == one["subject"].split()[-1]
    assert len(found.ids) - found.target == 1


def test_a_target_without_a_token_of_its_own_is_refused():
    with pytest.raises(RequestError, match="no token of its own"):
        asked(model_of(world.tokenizer(12)), Request("Ada lives in", ""), target=" ")
