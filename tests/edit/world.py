"""A made-up world: people, and where each was born, works, lives and what each speaks; a model that knows all of it.

Three phrasings for each fact and four sentences in each training sequence: a subject then stands in many contexts, and
its last token carries the fact, as in models of real text.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "du", "pe")
RELATIONS = {
    "born": (("{} was born in", "The birthplace of {} is", "{} comes from the city of"), "city"),
    "works": (("{} works for", "The employer of {} is", "{} has a job at"), "firm"),
    "speaks": (("{} speaks", "The language of {} is", "{} talks to people in"), "tongue"),
    "plays": (("{} plays the", "The instrument of {} is the", "{} likes to practise the"), "tool"),
}
ANSWERS = 16  # of each relation


def answers(relation: str) -> list[str]:
    kind = RELATIONS[relation][1]
    return [f"{kind.capitalize()}{number}" for number in range(ANSWERS)]


@cache
def people(count: int = 60) -> tuple[str, ...]:
    """First and last names, each shared by a few: no name alone tells who it is."""
    generator = torch.Generator().manual_seed(1)
    names: dict[str, None] = {}
    while len(names) < count:
        parts = torch.randint(len(SYLLABLES), (4,), generator=generator).tolist()
        first, last = (SYLLABLES[a] + SYLLABLES[b] for a, b in (parts[:2], parts[2:]))
        names[f"{first.capitalize()} {last.capitalize()}"] = None
    return tuple(names)


@cache
def facts(count: int = 60) -> dict[tuple[str, str], str]:
    """The answer for each person and relation."""
    generator = torch.Generator().manual_seed(2)
    return {
        (person, relation): answers(relation)[int(torch.randint(ANSWERS, (1,), generator=generator))]
        for person in people(count)
        for relation in RELATIONS
    }


def sentences(count: int = 60) -> list[str]:
    return [
        f"{phrase.format(person)} {answer} ."
        for (person, relation), answer in facts(count).items()
        for phrase in RELATIONS[relation][0]
    ]


def tokenizer(count: int = 60) -> PreTrainedTokenizerFast:
    """One token for each word or full stop; a name is two. Texts begin with the token that each training text has."""
    words = sorted({word for sentence in sentences(count) for word in sentence.split()})
    vocabulary = {"<end>": 0, "<unknown>": 1, **{word: index + 2 for index, word in enumerate(words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>", unk_token="<unknown>")


CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 128},
    "llama": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
}


@cache
def trained(kind: str = "gpt2", steps: int = 700, seed: int = 0, count: int = 60) -> Path:
    """Return the folder of a model that knows the world."""
    words = tokenizer(count)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        told = dict(CONFIGS[kind])
        config = AutoConfig.for_model(
            told.pop("model_type"), vocab_size=len(words), bos_token_id=0, eos_token_id=0, **told
        )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_config(config)
        texts = [torch.tensor(ids[1:]) for ids in words(sentences(count))["input_ids"]]
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
        for _ in range(steps):
            packed = [_packed(texts) for _ in range(32)]
            ids = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True, padding_value=-100)
            loss = model(input_ids=ids, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    folder = Path(mkdtemp()) / kind
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _packed(texts: list[torch.Tensor]) -> torch.Tensor:
    chosen = torch.randint(len(texts), (4,)).tolist()
    return torch.cat([torch.tensor([0]), *(texts[index] for index in chosen)])


def requests(number: int, seed: int = 0, count: int = 60) -> list[dict]:
    """Return edits of the world: a fact, what it should become, other ways to ask, and others' facts to leave alone."""
    generator = torch.Generator().manual_seed(seed + 100)
    keys = list(facts(count))
    chosen = torch.randperm(len(keys), generator=generator)[:number].tolist()
    found = []
    for person, relation in (keys[index] for index in chosen):
        phrases = RELATIONS[relation][0]
        old = facts(count)[person, relation]
        others = [answer for answer in answers(relation) if answer != old]
        near = [other for other in people(count) if other != person]
        some = torch.randperm(len(near), generator=generator)[:4].tolist()
        found.append(
            {
                "prompt": phrases[0].format(person),
                "target": others[int(torch.randint(len(others), (1,), generator=generator))],
                "subject": person,
                "old": old,
                "paraphrases": [phrase.format(person) for phrase in phrases[1:]],
                "neighbours": [
                    {"prompt": phrases[0].format(near[i]), "answer": facts(count)[near[i], relation]} for i in some
                ]
                + [
                    {"prompt": RELATIONS[other][0][0].format(person), "answer": facts(count)[person, other]}
                    for other in RELATIONS
                    if other != relation
                ],
            }
        )
    return found


def knows(folder: Path, count: int = 60) -> float:
    """Return the share of all facts, in all phrasings, that a model says."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = tokenizer(count)
    asked = [
        (phrase.format(person), answer)
        for (person, relation), answer in facts(count).items()
        for phrase in RELATIONS[relation][0]
    ]
    right = 0
    with torch.no_grad():
        for prompt, answer in asked:
            ids = torch.tensor([words(prompt)["input_ids"]])
            right += int(model(input_ids=ids).logits[0, -1].argmax()) == words.convert_tokens_to_ids(answer)
    return right / len(asked)
