"""Tokenizers trained on the spot, and models as far as their tokens go."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lfm.errors import RequestError
from lfm.reuse.merge._tokens.policy import Tokenizer as Policy
from lfm.reuse.merge._tokens.tables import Tables, aligned, mean_rows
from lfm.reuse.merge._tokens.vocabulary import Member, align

TALES = [
    "Once upon a time there was a little girl who had a little red ball.",
    "The little dog and the big dog ran.",
] * 4
LAWS = [
    "Whereas the tenant hath the tenancy thereof, the landlord shall let the lands.",
    "Über Ärger: größer – 中文 🙂",
] * 4
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bpe(texts, size=300, special=("<s>", "</s>")):
    """Return a byte-level BPE tokenizer trained on these texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def unigram(texts, size=60):
    """Return a Unigram tokenizer, with an added token that lies behind its vocabulary."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<pad>"])
    return made


def wordpiece(texts, size=80):
    """Return a WordPiece tokenizer, lower-casing as BERT's."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made


def words(texts):
    """Return a tokenizer of whole words."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return made


def with_added(tokenizer, *texts, special=True):
    """Return a copy of a tokenizer with more added tokens."""
    made = Tokenizer.from_str(tokenizer.to_str())
    made.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    return made


TALE, LAW = bpe(TALES), bpe(LAWS, 320)
CHAT = with_added(TALE, "<|im_start|>", "<|im_end|>")


def member(at, label, tokenizer=None, rows=None, *, config=None, others=(), **files):
    """Return a model in the folder `at / label`; `files` are more of them, `__` in a name standing for a dot."""
    folder = at / label
    folder.mkdir(parents=True)
    if tokenizer is not None:
        text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, content in files.items():
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    if rows is None:
        rows = tokenizer.get_vocab_size()
    return Member(label, folder, Tables(rows, (EMBEDDING, HEAD) if rows else (), tuple(others)), config)


def table(member, width=3, seed=0):
    """Return random rows for a model's tokens."""
    return np.random.default_rng(seed).normal(size=(member.rows, width)).astype(np.float32)


def reader(array):
    """Return the way in which an engine reads a table: elements from one to another, flat."""
    return lambda first, last: array.reshape(-1)[first:last]


def output(alignment, members, tables):
    """Return every model's table in the output's order, as a slow loop has it from the rule."""
    found = [np.zeros((alignment.size, tables[0].shape[1])) for _ in members]
    for row in range(alignment.size):
        donors = [table[there[row]] for table, there in zip(tables, alignment.donors, strict=True) if there[row] >= 0]
        for index, there in enumerate(alignment.rows):
            if there[row] >= 0:
                found[index][row] = tables[index][there[row]]
            elif not alignment.means[row] and donors:
                found[index][row] = np.mean(donors, axis=0, dtype=np.float64)
    for own, there in zip(found, alignment.rows, strict=True):
        mean = own[alignment.named & ~alignment.means].mean(0)
        own[alignment.means & (there < 0)] = mean
    return [own.astype(np.float32) for own in found]


def aligned_by(members, policy="same", *, base=False):
    return align(members, Policy.model_validate(policy), base=base)


def refused(members, policy="same", *, base=False):
    with pytest.raises(RequestError) as caught:
        aligned_by(members, policy, base=base)
    return caught.value.problems


def merged_rows(alignment, members, seed=0):
    """Return every model's table before, and after, by the code that engines use."""
    tables = [table(member, seed=seed + index) for index, member in enumerate(members)]
    reads = [reader(own) for own in tables]
    means = mean_rows(reads, alignment, 3)
    after = aligned(reads, alignment, 3, 0, alignment.size * 3, means=means)
    return tables, [own.reshape(-1, 3) for own in after]


def written(alignment):
    return Tokenizer.from_str(alignment.files["tokenizer.json"].decode())
