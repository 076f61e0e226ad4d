"""Models with different tokenizers in one merge: whose tokens the result has, and which rows of which model they are.

Embeddings and output layers have one row for each token. Before they are merged, every model's rows are brought into
the order of the output's tokens, by the tokens' text. For a token k that the set O(k) of models has rows for,

    row_i(k) = x_i[k]                      where model i has one
             = x_base[k]                   where it has none, and the base has
             = mean over O(k) of x_j[k]    where the base has none either, or there is no base
             = mean over k' of row_i(k')   where no model has one: the mean of the model's other tokens

so that a source that lacks a token has learned nothing about it: its task vector x_i - x_base is 0 there. Where the
base lacks the token, it too takes the mean of those that have it: if that is one model, no task vector moves its row
and the row passes through as it is, whatever the method and its scale; if it is several, their task vectors are their
differences from their mean, and sum to 0. Without a base (linear, slerp), models that lack a token agree with the mean
of the others and do not dilute it. The rules of `tokens` come before these.

Rows that no token has are padding, and are kept as they are: by the same rule, matched by position among models in
which they are padding. The output has the rows of the model whose tokenizer it gets, more where there are more tokens.
New padding is a mean row: scores of an average token, where zeros would beat every token with a score below 0.

mergekit fills rows by the same rule, and departs in three things: it cuts padding off unless `pad_to_multiple_of` is
given (1 gives what it gives), cuts tokens off that the tokenizer lists and no row stands for, and makes the other
models' ordinary tokens "added" ones, which tear words apart that contain them; here they come with their BPE merges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lfm.errors import RequestError, did_you_mean, plural
from lfm.reuse.merge._tokens.files import Addition, Files, config_changes, generation_file, output_files
from lfm.reuse.merge._tokens.lexicon import (
    Lexicon,
    cores,
    difference,
    obstacles,
    other_flags,
    other_splitting,
    read_lexicon,
    unreadable_alike,
)
from lfm.reuse.merge._tokens.policy import SOURCES, Mean, ModelToken, Tokenizer
from lfm.reuse.merge._tokens.tables import Array, Tables

CONVERT = "AutoTokenizer.from_pretrained({!r}, use_fast=True).save_pretrained(<its folder>)"
Candidate = tuple[str, Lexicon | None, Mapping[str, Any] | None]  # text, whose ordinary token it is, or its flags


@dataclass(frozen=True)
class Member:
    """A model as far as its tokens go."""

    label: str
    folder: Path | None  # with the tokenizer's files
    tables: Tables
    config: Mapping[str, Any] | None = None

    @property
    def rows(self) -> int:
        """The rows of its embedding."""
        return self.tables.rows


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where each row of the output's tables stands in each model.

    `rows[i][k]` is the row of model i that becomes row k, -1 where it has none. What it takes there is the mean of its
    own rows where `means[k]`, else the mean of the rows `donors[j][k]` of those models j that have one (not -1), else
    zeros; `tables.aligned` does that. `files` are written over those of the first model: content, a file to copy, or
    None for one to leave out. `config` is what changes in the first model's config.
    """

    size: int = 0
    rows: tuple[Array, ...] = ()
    donors: tuple[Array, ...] = ()
    means: Array = field(default_factory=lambda: np.zeros(0, bool))
    named: Array = field(default_factory=lambda: np.zeros(0, bool))  # the rows that belong to tokens
    trivial: bool = True  # whether every model's tables are used just as they are
    ids: Mapping[str, int] = field(default_factory=dict)  # of the output's tokens
    donor: int = 0  # which of the models the tokenizer comes from
    files: Files = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def align(members: Sequence[Member], policy: Tokenizer, *, base: bool) -> Alignment:
    """Return how the rows of these models are brought into one order; the first of them gives config and tokenizer.

    `base` says whether the first is the base of the others. Reads the tokenizers' files and no weights. Raises
    RequestError with all that is wrong.
    """
    problems = _policy_problems(policy, [member.label for member in members])
    lexicons, broken = _read_all(members)
    if problems or broken:
        raise RequestError(*problems, *broken)
    return _Aligner(members, policy, base, lexicons).alignment()


def _policy_problems(policy: Tokenizer, labels: Sequence[str]) -> list[str]:
    told = ", ".join(dict.fromkeys(labels))
    problems = []
    if policy.model is not None and policy.model not in labels:
        hint = did_you_mean(policy.model, [*labels, *SOURCES])
        problems.append(f"tokenizer: {policy.model!r} is none of {', '.join(SOURCES)}, and no model ({told}){hint}")
    for text, rule in policy.tokens.items():
        label = rule.source.model if isinstance(rule.source, ModelToken) else rule.source
        if isinstance(label, str) and label not in labels:
            problems.append(f"tokenizer.tokens.{text}: no model {label!r} ({told}){did_you_mean(label, labels)}")
    return problems


def _read_all(members: Sequence[Member]) -> tuple[list[Lexicon | None], list[str]]:
    seen: dict[str, Lexicon] = {}
    found: list[Lexicon | None] = []
    problems: list[str] = []
    for member in members:
        found.append(None)
        try:
            found[-1] = read_lexicon(member.folder, seen) if member.folder else None
        except RequestError as error:
            problems += error.problems
    return found, list(dict.fromkeys(problems))


class _Aligner:
    def __init__(
        self, members: Sequence[Member], policy: Tokenizer, base: bool, lexicons: Sequence[Lexicon | None]
    ) -> None:
        self._members = members
        self._policy = policy
        self._base = base
        self._labels = [member.label for member in members]
        self._same = policy.model is None and policy.source == "same"
        self._problems: list[str] = []
        self._notes = list(dict.fromkeys(note for lexicon in lexicons if lexicon for note in lexicon.notes))
        self._donor = self._choose(lexicons)
        self._lexicons = self._assumed(lexicons)

    def alignment(self) -> Alignment:
        self._check()
        self._stop()
        donor = self._lexicons[self._donor]
        ids, additions = self._tokens(donor) if donor and donor.kind != "unreadable" else ({}, [])
        self._stop()
        size = self._size(ids, additions)
        named = self._named(ids, size)
        rows = [self._rows(lexicon, member, ids, named) for lexicon, member in self._pairs()]
        donors, means = self._defaults(rows)
        rows = self._ruled(ids, rows, donors, means)
        trivial = all(
            member.rows == size and np.array_equal(own, np.arange(size))
            for member, own in zip(self._members, rows, strict=True)
            if member.rows
        )
        self._check_others(trivial)
        self._stop()
        self._note_shares(rows, named, ids)
        return Alignment(
            *(size, tuple(rows), tuple(donors), means, named, trivial, ids, self._donor),
            files=self._files(donor, ids, additions),
            config=self._config(ids, size),
            notes=tuple(self._notes),
        )

    def _stop(self) -> None:
        if self._problems:
            raise RequestError(*dict.fromkeys(self._problems))

    def _pairs(self) -> Iterator[tuple[Lexicon | None, Member]]:
        return zip(self._lexicons, self._members, strict=True)

    # --- do the tokenizers fit

    def _choose(self, lexicons: Sequence[Lexicon | None]) -> int:
        """Return the model whose tokenizer the output gets; by `same` the first that has one."""
        if self._policy.model is not None:
            return self._labels.index(self._policy.model)
        return next((index for index, lexicon in enumerate(lexicons) if lexicon), 0) if self._same else 0

    def _assumed(self, lexicons: Sequence[Lexicon | None]) -> list[Lexicon | None]:
        """Return the models' tokens: where they cannot be read, those of a model that has the same files and more.

        A model without any tokenizer is taken to have that of the first with as many rows.
        """
        known = [index for index, lexicon in enumerate(lexicons) if lexicon]
        assumed = [self._readable(index, lexicons) for index in range(len(lexicons))]
        for index, member in enumerate(self._members):
            if assumed[index] is not None or not known or not member.rows:
                continue
            like = next((other for other in known if self._members[other].rows == member.rows), None)
            if like is not None:
                assumed[index] = assumed[like]
                self._donor = like if self._donor == index else self._donor
                self._notes.append(f"{member.label}: has no tokenizer; that of {self._labels[like]} is taken for it")
            else:
                self._problems.append(
                    f"{member.label}: has no tokenizer, and no model with one has {member.rows:,} rows of tokens too; "
                    "put the tokenizer files of the model that it was made from into its folder"
                )
        return assumed

    def _readable(self, index: int, lexicons: Sequence[Lexicon | None]) -> Lexicon | None:
        own = lexicons[index]
        if own is None or own.kind != "unreadable":
            return own
        for like, other in enumerate(lexicons):
            if other is not None and other.kind == "json" and unreadable_alike(own, other):
                self._donor = like if self._donor == index else self._donor
                return other
        return own

    def _check(self) -> None:
        """Note as problems tokenizers that differ, or are not known well enough for what is asked."""
        sizes = {member.label: member.rows for member in self._members}
        told = ", ".join(f"{label} {rows:,}" for label, rows in sizes.items())
        if not any(self._lexicons) and len(set(sizes.values())) > 1:
            self._problems.append(f"different numbers of rows of tokens, and no tokenizer that names them: {told}")
        elif any(sizes.values()) and not self._members[self._donor].rows:
            self._problems.append(f"{self._labels[self._donor]}: no tensor has rows that belong to tokens ({told})")
        elif self._same:
            self._compare()
        else:
            self._insist()

    def _compare(self) -> None:
        first, mine = self._lexicons[self._donor], self._members[self._donor]
        for other, member in self._pairs():
            if first is None or other is None or other is first or not member.rows:
                continue
            if "unreadable" in (first.kind, other.kind):
                if not unreadable_alike(first, other):
                    self._problems.append(self._unlike(member, first, other))
            elif other.ids is not first.ids or member.rows != mine.rows:
                self._compare_tokens(member, first, other)
        if self._policy.tokens and (first is None or first.kind == "unreadable"):
            self._problems.append(self._convert(mine, first))

    def _compare_tokens(self, member: Member, first: Lexicon, other: Lexicon) -> None:
        mine = self._members[self._donor]
        told = difference(_spoken(other.ids, member.rows), _spoken(first.ids, mine.rows))
        if told:
            self._problems.append(
                f"{member.label}: its tokenizer is not that of {mine.label}: {told}; "
                "say whose tokens the output has: `tokenizer: base`, `union` or one of the models"
            )
        elif first.kind == other.kind == "json" and (parts := other_splitting(first, other)):
            self._notes.append(
                f"{member.label}: same tokens as {mine.label}, but text is split in another way ({', '.join(parts)}); "
                f"that of {mine.label} is kept"
            )

    def _unlike(self, member: Member, first: Lexicon, other: Lexicon) -> str:
        mine = self._members[self._donor]
        what = f"{member.label}: its tokenizer cannot be compared with that of {mine.label}"
        if first.kind == other.kind:
            what = f"{member.label}: its tokenizer is not that of {mine.label}: {cores(other)} or added tokens differ"
        guilty = [item.label for item, own in ((mine, first), (member, other)) if own.kind == "unreadable"]
        return f"{what}; to compare or align them, convert: {', '.join(map(CONVERT.format, guilty))}"

    def _insist(self) -> None:
        for lexicon, member in self._pairs():
            if member.rows and (lexicon.kind == "unreadable" if lexicon else not any(self._lexicons)):
                self._problems.append(self._convert(member, lexicon))
        if self._policy.source == "union" and not any(member.rows for member in self._members):
            self._problems.append("tokenizer: no tensor of these models has rows that belong to tokens; leave it out")

    def _convert(self, member: Member, lexicon: Lexicon | None) -> str:
        if lexicon is None:
            return f"{member.label}: has no tokenizer, so which row is which token is not known; use `tokenizer: same`"
        return (
            f"{member.label}: has {cores(lexicon)} and no tokenizer.json, so which row is which token is not known; "
            f"convert it with transformers: {CONVERT.format(member.label)}"
        )

    # --- whose tokens

    def _tokens(self, donor: Lexicon) -> tuple[dict[str, int], list[Addition]]:
        """Return the ids of the output's tokens, and those among them that the donor's tokenizer has to learn."""
        ids = dict(donor.ids)
        additions: list[Addition] = []
        number = 1 + max(ids.values(), default=-1)
        for text, origin, flags in [
            *(self._new_tokens(donor) if self._policy.source == "union" else ()),
            *self._named_by_rules(),
        ]:
            if text not in ids:
                ids[text] = number
                additions.append(Addition(text, number, origin, flags))
                number += 1
        if additions and donor.kind != "json":
            self._problems.append(
                f"{self._labels[self._donor]}: has no tokenizer.json to add {plural(len(additions), 'token')} to; "
                f"convert it with transformers: {CONVERT.format(self._labels[self._donor])}"
            )
        return ids, additions

    def _new_tokens(self, donor: Lexicon) -> Iterator[Candidate]:
        """Yield the tokens of all models that have rows, in the order of the models and of their ids there."""
        flags = dict(donor.added)
        for lexicon, member in self._pairs():
            if lexicon is None or lexicon.ids is donor.ids:
                continue
            texts = sorted(_spoken(lexicon.ids, member.rows), key=lexicon.ids.__getitem__)
            ordinary = [text for text in texts if text not in donor.ids and text not in lexicon.added]
            if ordinary and (told := obstacles(donor, lexicon)):
                self._problems.append(
                    f"{member.label}: its tokenizer cannot be joined with that of {self._labels[self._donor]}: "
                    f"{'; '.join(told)}; take the tokens of one model: `tokenizer: base`, or its name"
                )
            if differ := other_flags(flags, lexicon.added):
                self._notes.append(
                    f"{member.label}: added tokens with other flags than the models before it: "
                    f"{', '.join(map(repr, differ[:3]))}; the first are kept"
                )
            flags = {**lexicon.added, **flags}
            yield from ((text, lexicon, lexicon.added.get(text)) for text in texts)

    def _named_by_rules(self) -> Iterator[Candidate]:
        for text in self._policy.tokens:
            known = (lexicon.added[text] for lexicon in self._lexicons if lexicon and text in lexicon.added)
            yield text, None, next(known, {})

    def _size(self, ids: Mapping[str, int], additions: Sequence[Addition]) -> int:
        """Return the number of rows: of the donor, or more where tokens ask for it; padded if the policy says so."""
        rows = self._members[self._donor].rows
        spoken = [ids[text] for text in self._policy.tokens] + [addition.id for addition in additions]
        if self._policy.source == "union" and self._policy.model is None:
            known = [(lexicon.ids, member.rows) for lexicon, member in self._pairs() if lexicon]
            spoken += [number for text, number in ids.items() if any(own.get(text, top) < top for own, top in known)]
        else:
            spoken += [number for number in ids.values() if number < rows]
        end = 1 + max(spoken, default=rows - 1)
        multiple = self._policy.pad_to_multiple_of
        return -(-end // multiple) * multiple if multiple else max(rows, end)

    # --- which rows

    def _named(self, ids: Mapping[str, int], size: int) -> Array:
        """Return which rows belong to tokens; where tokens have no names, all that the donor has."""
        named = np.zeros(size, bool)
        numbers = _numbers(ids) if ids else np.arange(self._members[self._donor].rows)
        named[numbers[numbers < size]] = True
        return named

    def _rows(self, lexicon: Lexicon | None, member: Member, ids: Mapping[str, int], named: Array) -> Array:
        """Return where each row stands in a model: by its token's text, or at the same place if both are padding."""
        places = np.arange(len(named))
        if not ids or lexicon is None:
            return np.where(places < member.rows, places, -1)
        found = np.full(len(named), -1, np.int64)
        numbers = _numbers(ids)
        own = numbers
        if lexicon.ids != ids:
            own = np.fromiter((lexicon.ids.get(text, -1) for text in ids), np.int64, len(ids))
        known = (own >= 0) & (own < member.rows) & (numbers < len(found))
        found[numbers[known]] = own[known]
        padding = (places < member.rows) & ~named
        used = _numbers(lexicon.ids)
        padding[used[used < len(padding)]] = False
        return np.where(padding, places, found)

    def _defaults(self, rows: Sequence[Array]) -> tuple[list[Array], Array]:
        """Return what models take that lack a row, by the rule at the top of this file."""
        lacking = np.any([own < 0 for own in rows], axis=0)
        of_base = (rows[0] >= 0) if self._base else np.zeros_like(lacking)
        donors = [np.where(lacking & ~(of_base & (index > 0)), own, -1) for index, own in enumerate(rows)]
        return donors, np.all([own < 0 for own in rows], axis=0)

    def _ruled(
        self, ids: Mapping[str, int], rows: Sequence[Array], donors: Sequence[Array], means: Array
    ) -> list[Array]:
        """Return the rows as the rules for single tokens leave them; what they say goes into `donors` and `means`."""
        after = [own.copy() for own in rows]
        for text, rule in self._policy.tokens.items():
            number = ids[text]
            lacking = rule.force or any(own[number] < 0 for own in rows)
            if rule.source is None or not lacking:
                continue
            means[number] = isinstance(rule.source, Mean)
            for own in donors:
                own[number] = -1
            if isinstance(rule.source, str | ModelToken):
                index, row = self._given(text, rule.source, rows, number)
                donors[index][number] = row
            if rule.force:
                for own in after:
                    own[number] = -1
        return after

    def _given(self, text: str, source: str | ModelToken, rows: Sequence[Array], number: int) -> tuple[int, int]:
        """Return the model and the row there that a rule names."""
        where = f"tokenizer.tokens.{text}"
        if isinstance(source, str):
            index = self._labels.index(source)
            if rows[index][number] < 0:
                self._problems.append(f"{where}: {source} has no row for it; name another model, or a `kind`")
            return index, int(rows[index][number])
        index = self._labels.index(source.model)
        lexicon, count = self._lexicons[index], self._members[index].rows
        if source.token is None:
            row, what = source.token_id or 0, f"row {source.token_id}"
        else:
            row, what = lexicon.ids.get(source.token, -1) if lexicon else -1, f"token {source.token!r}"
        if not 0 <= row < count:
            self._problems.append(f"{where}: {source.model} has {count:,} rows of tokens, and no {what} among them")
            return index, -1
        return index, row

    def _check_others(self, trivial: bool) -> None:
        """Note as a problem every tensor that would have to follow the tokens, and cannot."""
        if trivial or self._same:
            return
        for member in self._members:
            self._problems += [
                f"{member.label}: tensor {name!r} belongs to tokens in a way that is not known, and cannot follow them "
                "to other rows; only models with one tokenizer can be merged (`tokenizer: same`)"
                for name in member.tables.others[:3]
            ]

    # --- what is written

    def _files(self, donor: Lexicon | None, ids: Mapping[str, int], additions: Sequence[Addition]) -> Files:
        if donor is None:
            return {}
        reference, folder = self._members[0].folder, self._members[self._donor].folder
        files = dict(output_files(reference, folder, donor, additions, ids))
        if self._is_another():
            files |= generation_file(reference, folder, self._ids_of_first(), ids)
        return files

    def _config(self, ids: Mapping[str, int], size: int) -> Mapping[str, Any]:
        reference, donor = self._members[0], self._members[self._donor]
        own = donor.config or {} if self._is_another() else None
        rows = (reference.rows, size)
        return config_changes(reference.config or {}, own, old=self._ids_of_first(), new=ids, rows=rows)

    def _is_another(self) -> bool:
        """Return whether the tokenizer is another one than that of the model that gives the config."""
        return not self._same and self._lexicons[self._donor] is not self._lexicons[0]

    def _ids_of_first(self) -> Mapping[str, int]:
        first = self._lexicons[0]
        return first.ids if first else {}

    def _note_shares(self, rows: Sequence[Array], named: Array, ids: Mapping[str, int]) -> None:
        """Say which models lack rows, what stands in for them, and which rows are not used."""
        total = int(named.sum())
        for index, ((lexicon, member), own) in enumerate(zip(self._pairs(), rows, strict=True)):
            share = int((own[named] >= 0).sum())
            if self._same and member.rows not in (0, len(named)):
                self._notes.append(f"{member.label}: {member.rows:,} rows, the output has {len(named):,}: padding")
            elif share < total and member.rows:
                first = f"the rows of {self._labels[0]}, else " if self._base and index else ""
                self._notes.append(
                    f"{member.label}: has rows for {share:,} of the {total:,} tokens; for the others it takes {first}"
                    "the mean of those that have them"
                )
            if lexicon is None or not ids or self._same:
                continue
            if lost := [text for text, row in lexicon.ids.items() if row < member.rows and text not in ids]:
                shown = ", ".join(map(repr, lost[-3:]))
                self._notes.append(f"{member.label}: {plural(len(lost), 'token')} not in the output, such as {shown}")


def _spoken(ids: Mapping[str, int], rows: int) -> dict[str, int]:
    """Return the tokens that have a row; a tokenizer may list more than the model was made for."""
    return {text: number for text, number in ids.items() if number < rows}


def _numbers(ids: Mapping[str, int]) -> Array:
    return np.fromiter(ids.values(), np.int64, len(ids))
