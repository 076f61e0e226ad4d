"""Edit requests: what a model should say, and what else should or should not change with it.

Read from rows in any of these layouts: ours (`prompt`, `target`, and any of `subject`, `old`, `paraphrases`,
`neighbours`), CounterFact's, zsRE's, KnowEdit's and EasyEdit's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lfm.data._check import described
from lfm.data._rows import Rows
from lfm.errors import RequestError


@dataclass(frozen=True)
class Neighbour:
    """A prompt whose answer an edit should leave alone; `answer` is what is right there, if that is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Request:
    """What a model should say after a prompt.

    `subject` is what the fact is about, a part of the prompt; `old` what the model says (or said) instead;
    `paraphrases` are other ways to ask for the same.
    """

    prompt: str
    target: str
    subject: str | None = None
    old: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    where: str = ""  # where it was read, for messages

    @property
    def id(self) -> str:
        """A name that follows from what is asked for: twelve hexadecimal digits."""
        asked = json.dumps([self.prompt, self.target, self.subject], ensure_ascii=False)
        return hashlib.sha256(asked.encode("utf-8")).hexdigest()[:12]


def requests_of(rows: Rows) -> list[Request]:
    """Return the requests that rows hold, each once. Raises RequestError with everything that is wrong, and where."""
    layout = next((layout for needed, layout in _LAYOUTS if needed <= rows.columns.keys()), None)
    if layout is None:
        raise RequestError(
            f"{rows.origin}: an edit takes the columns prompt and target (and subject, old, paraphrases, neighbours); "
            f"these rows have {', '.join(rows.columns)}. Name them with `columns: {{ours: theirs}}`"
        )
    found: list[Request] = []
    problems: list[str] = []
    for index in range(len(rows)):
        row = {name: column[index] for name, column in rows.columns.items()}
        try:
            found.append(layout(row, rows.where(index)))
        except RequestError as error:
            problems += [f"{rows.where(index)}: {line}" for line in error.problems]
    problems += _problems(found)
    if problems:
        raise RequestError(*problems)
    return list({request.id: request for request in found}.values())


def _problems(found: Sequence[Request]) -> Iterator[str]:
    """Yield what is wrong with requests taken together: one prompt with two targets."""
    seen: dict[str, Request] = {}
    for request in found:
        other = seen.setdefault(request.prompt, request)
        if other.target != request.target:
            yield (
                f"{request.where}: the prompt {request.prompt!r} asks for {request.target!r} where {other.where} asks "
                f"for {other.target!r}; keep one of them"
            )


# --- layouts --------------------------------------------------------------------------------------------------------


def _ours(row: dict[str, Any], where: str) -> Request:
    return _made(
        where,
        prompt=row["prompt"],
        target=row["target"],
        subject=row.get("subject"),
        old=row.get("old"),
        paraphrases=_texts(row.get("paraphrases"), "paraphrases"),
        neighbours=_neighbours(row.get("neighbours")),
    )


def _counterfact(row: dict[str, Any], where: str) -> Request:
    asked = row["requested_rewrite"]
    subject = asked["subject"]
    true = asked["target_true"]["str"]
    return _made(
        where,
        prompt=asked["prompt"].format(subject),
        target=asked["target_new"]["str"],
        subject=subject,
        old=true,
        paraphrases=_texts(row.get("paraphrase_prompts"), "paraphrase_prompts"),
        neighbours=tuple(Neighbour(prompt, true) for prompt in row.get("neighborhood_prompts") or ()),
    )


def _easyedit(row: dict[str, Any], where: str) -> Request:
    near = row.get("locality_prompt")
    return _made(
        where,
        prompt=row["prompt"],
        target=row["target_new"],
        subject=row.get("subject"),
        old=row.get("ground_truth"),
        paraphrases=_texts(row.get("rephrase_prompt") or row.get("rephrase"), "rephrase_prompt"),
        neighbours=_neighbours([{"prompt": near, "answer": row.get("locality_ground_truth")}] if near else None)
        + _of_knowedit(row.get("locality")),
    )


def _zsre(row: dict[str, Any], where: str) -> Request:
    answers = row.get("answers") or []
    near = row.get("loc")
    return _made(
        where,
        prompt=row["src"],
        target=row["alt"],
        subject=row.get("subject"),
        old=answers[0] if answers else None,
        paraphrases=_texts(row.get("rephrase"), "rephrase"),
        neighbours=(Neighbour(near, row.get("loc_ans")),) if near else (),
    )


_LAYOUTS: tuple[tuple[set[str], Callable[[dict[str, Any], str], Request]], ...] = (
    ({"prompt", "target"}, _ours),
    ({"requested_rewrite"}, _counterfact),
    ({"prompt", "target_new"}, _easyedit),
    ({"src", "alt"}, _zsre),
)


def _made(
    where: str,
    *,
    prompt: Any,
    target: Any,
    subject: Any,
    old: Any,
    paraphrases: tuple[str, ...],
    neighbours: tuple[Neighbour, ...],
) -> Request:
    problems = []
    for name, value in (("prompt", prompt), ("target", target)):
        if not isinstance(value, str):
            problems.append(f"{name}: expected text, got {described(value)}")
        elif not value.strip():
            problems.append(f"{name} is empty")
    for name, value in (("subject", subject), ("old", old)):
        if value is not None and not isinstance(value, str):
            problems.append(f"{name}: expected text, got {described(value)}")
    subject = subject if isinstance(subject, str) and subject.strip() else None
    if not problems and subject is not None and subject not in prompt:
        problems.append(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    if problems:
        raise RequestError(*problems)
    old = old.strip() if isinstance(old, str) and old.strip() else None
    return Request(prompt.rstrip(), target.strip(), subject, old, paraphrases, neighbours, where)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Return a list of texts; one text alone, or a list written as JSON (as in a CSV file), will do."""
    if value in (None, ""):
        return ()
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RequestError(f"{name}: expected a list of texts, got {described(value)}")
    return tuple(one.rstrip() for one in value if one.strip())


def _neighbours(value: Any) -> tuple[Neighbour, ...]:
    if value in (None, ""):
        return ()
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list):
        raise RequestError(f"neighbours: expected a list, got {described(value)}")
    found = []
    for one in value:
        if isinstance(one, str):
            found.append(Neighbour(one.rstrip()))
        elif isinstance(one, dict) and isinstance(one.get("prompt"), str):
            answer = one.get("answer")
            found.append(Neighbour(one["prompt"].rstrip(), answer.strip() if isinstance(answer, str) else None))
        else:
            raise RequestError(f"neighbours: expected texts or {{prompt, answer}}, got {described(one)}")
    return tuple(found)


def _of_knowedit(value: Any) -> tuple[Neighbour, ...]:
    """Return KnowEdit's locality prompts: by kind, each with a list of lists of answers."""
    if not isinstance(value, dict):
        return ()
    found = []
    for entries in value.values():
        for one in entries if isinstance(entries, list) else []:
            answers = one.get("ground_truth") or [[None]]
            first = answers[0][0] if isinstance(answers[0], list) and answers[0] else answers[0]
            found.append(Neighbour(str(one["prompt"]).rstrip(), first if isinstance(first, str) else None))
    return tuple(found)
