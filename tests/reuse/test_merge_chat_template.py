"""The chat template of a merge."""

import json
import re

import pytest
from jinja2 import Environment
from tests.tokens import CHAT, TALE, aligned_by, member

from lfm.errors import RequestError
from lfm.reuse.merge._tokens.chat_template import ALPACA, CHATML, chat_template_files

ONE, TWO = "{{ messages[0].content }}", "{% for message in messages %}{{ message.content }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye!"},
]


def chosen(choice, members, policy="same"):
    return chat_template_files(choice, members, aligned_by(members, policy))


def render(template, messages, **more):
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    return environment.from_string(template).render(messages=messages, **more)


def test_chatml_writes_what_it_is_described_to_write():
    assert render(CHATML, TALK[1:3]) == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert render(CHATML, TALK, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_alpaca_writes_what_it_is_described_to_write():
    assert render(ALPACA, TALK[1:2], eos_token="</s>", add_generation_prompt=True) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi!\n\n### Response:\n"
    )
    assert render(ALPACA, TALK, eos_token="</s>", add_generation_prompt=True) == (
        "Be brief.\n\n### Instruction:\nHi!\n\n### Response:\nHello.</s>\n\n### Instruction:\nBye!\n\n### Response:\n"
    )


def test_the_commonest_template_of_the_models_is_taken(tmp_path):
    members = [
        member(tmp_path, "A", TALE, tokenizer_config__json={"chat_template": ONE, "eos_token": "</s>"}),
        member(tmp_path, "B", TALE, chat_template__jinja=TWO),
        member(
            tmp_path, "C", TALE, tokenizer_config__json={"chat_template": [{"name": "default", "template": f"{TWO}\n"}]}
        ),
        member(tmp_path, "D", TALE),
    ]
    files, notes = chosen("auto", members)
    assert files["chat_template.jinja"] == TWO.encode()
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "</s>"}
    assert not notes
    assert chosen("auto", members[:2]) == ({}, [])  # of two the first, which the output has anyway
    assert chosen("auto", members[3:]) == (
        {},
        ["chat_template: auto: no model has a chat template, so the output has none"],
    )


def test_a_template_can_be_written_out_or_named(tmp_path):
    members = [member(tmp_path, "A", TALE, chat_template__json={"chat_template": ONE}), member(tmp_path, "B", CHAT)]
    files, notes = chosen(TWO, members, "base")
    assert files == {"chat_template.jinja": TWO.encode(), "chat_template.json": None}
    files, notes = chosen("chatml", members, "union")
    assert files["chat_template.jinja"] == CHATML.encode()
    assert not notes
    _, notes = chosen("chatml", members, "base")
    assert notes == [
        "chat_template: chatml: <|im_start|> and <|im_end|> are no tokens of the output, so they are split like other "
        "text; `tokenizer: {tokens: {'<|im_start|>': {}, '<|im_end|>': {}}}` adds them"
    ]
    assert chosen("alpaca", members, "base")[0]["chat_template.jinja"] == ALPACA.encode()


def test_a_template_goes_with_the_tokenizer_config_of_the_union(tmp_path):
    config = {"chat_template": ONE, "added_tokens_decoder": {}}
    members = [member(tmp_path, "A", TALE, tokenizer_config__json=config), member(tmp_path, "B", CHAT)]
    found = aligned_by(members, "union")
    files, _ = chat_template_files("chatml", members, found)
    assert json.loads(files["tokenizer_config.json"])["added_tokens_decoder"].keys() == {"300", "301"}
    named = aligned_by(members[::-1], {"model": "A"})
    files, _ = chat_template_files("chatml", members[::-1], named)
    assert json.loads(files["tokenizer_config.json"]) == {"added_tokens_decoder": {}}


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("llama3", "llama3 is not built in; give the template's text"),
        ("mistral", "mistral is not built in"),
        ("exaone", "exaone is not built in"),
        ("chatmi", "'chatmi' is none of auto, chatml, alpaca, and no template text (Jinja); did you mean 'chatml'?"),
        ("", "'' is none of auto"),
        ("{ messages }", "no template text"),
    ],
)
def test_other_templates_are_refused_by_name(choice, told, tmp_path):
    with pytest.raises(RequestError, match=re.escape(told)):
        chosen(choice, [member(tmp_path, "A", TALE)])


def test_templates_that_cannot_be_read_are_all_named(tmp_path):
    members = [member(tmp_path, label, TALE, chat_template__jinja=b"\xff") for label in "AB"]
    with pytest.raises(RequestError) as caught:
        chosen("auto", members)
    assert len(caught.value.problems) == 2
