"""The chat template of a merged model: how messages become the text that the model sees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm.checkpoint import read_json
from lfm.errors import RequestError, did_you_mean
from lfm.reuse.merge._tokens.files import Files, as_json
from lfm.reuse.merge._tokens.vocabulary import Alignment, Member

CONFIG, TEMPLATE, OLD_TEMPLATE = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"

# ChatML: every message between <|im_start|>role and <|im_end|>.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Stanford Alpaca: one paragraph that explains, then headings for instructions and responses.
ALPACA = """\
{%- if messages and messages[0]['role'] == 'system' %}
{{- messages[0]['content'] ~ '\\n\\n' }}
{%- else %}
{{- 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '### Instruction:\\n' ~ message['content'] ~ '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- '### Response:\\n' ~ message['content'] ~ eos_token ~ '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '### Response:\\n' }}
{%- endif %}
"""

BUILT_IN = {"chatml": (CHATML, ("<|im_start|>", "<|im_end|>")), "alpaca": (ALPACA, ())}
ELSEWHERE = ("exaone", "llama3", "mistral")  # names that mergekit has a template for


def chat_template_files(choice: str, members: Sequence[Member], alignment: Alignment) -> tuple[Files, list[str]]:
    """Return the files that give the output this chat template, over those of the alignment; and what to know about it.

    `choice` is `auto` (the commonest among the models; of equally common ones that of the first model), `chatml`,
    `alpaca`, or a template's text. Raises RequestError for other names, and for broken files.
    """
    kept = alignment.files
    donor = members[alignment.donor].folder
    notes: list[str] = []
    if choice.strip() == "auto":
        text = _commonest(members)
        if text is None:
            return {}, ["chat_template: auto: no model has a chat template, so the output has none"]
        if donor is not None and text == _template(donor):
            return {}, []
    else:
        text, tokens = _chosen(choice)
        missing = [token for token in tokens if alignment.ids and token not in alignment.ids]
        if missing:
            rules = ", ".join(f"{token!r}: {{}}" for token in missing)
            notes.append(
                f"chat_template: {choice}: {' and '.join(missing)} are no tokens of the output, so they are split like "
                f"other text; `tokenizer: {{tokens: {{{rules}}}}}` adds them"
            )
    files: dict[str, bytes | Path | None] = {TEMPLATE: text.encode()}
    if donor is not None and (donor / OLD_TEMPLATE).is_file():
        files[OLD_TEMPLATE] = None
    config = _config(donor, kept)
    if config.pop("chat_template", None) is not None:  # the file counts; two templates would be one too many
        files[CONFIG] = as_json(config)
    return files, notes


def _chosen(choice: str) -> tuple[str, tuple[str, ...]]:
    """Return a template's text, and the tokens that it is made of."""
    if "{%" in choice or "{{" in choice:
        return choice, ()
    name = choice.strip()
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in ELSEWHERE:
        raise RequestError(
            f"chat_template: {name} is not built in; give the template's text (from the tokenizer_config.json or "
            f"chat_template.jinja of a {name} model), or `auto` if one of the models has it"
        )
    names = ["auto", *BUILT_IN]
    hint = did_you_mean(name, names)
    raise RequestError(f"chat_template: {choice!r} is none of {', '.join(names)}, and no template text (Jinja){hint}")


def _commonest(members: Sequence[Member]) -> str | None:
    problems: list[str] = []
    found: list[str] = []
    for member in members:
        try:
            text = _template(member.folder) if member.folder else None
        except RequestError as error:
            problems += error.problems
            continue
        found += [text] if text else []
    if problems:
        raise RequestError(*dict.fromkeys(problems))
    if not found:
        return None
    winner = Counter(text.strip() for text in found).most_common(1)[0][0]
    return next(text for text in found if text.strip() == winner)


def _template(folder: Path) -> str | None:
    """Return the chat template in a model's folder, where transformers looks for it and in that order."""
    if (path := folder / TEMPLATE).is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: cannot be read: {error}") from None
    for name in (OLD_TEMPLATE, CONFIG):
        if (folder / name).is_file():
            value = read_json(folder / name).get("chat_template")
            if isinstance(value, list):  # several, by name
                value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            if isinstance(value, dict):
                value = value.get("default")
            if isinstance(value, str) and value.strip():
                return value
    return None


def _config(donor: Path | None, kept: Files) -> dict[str, Any]:
    """Return the tokenizer's config as it is to be written so far."""
    content = kept.get(CONFIG)
    if isinstance(content, bytes):
        found: dict[str, Any] = json.loads(content)
        return found
    path = content or (donor / CONFIG if donor is not None else None)
    return read_json(path) if path is not None and path.is_file() else {}
