"""Writes what the documentation says about methods, from the method files: one page each, and the table of them all.

python docs/generate.py            writes
python docs/generate.py --check    exits with 1, naming the files, if something written is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from lfm.method import Access, Card, Data, Have, cards, verbs

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
MARK = "<!-- methods: written by docs/generate.py -->\n"


def pages() -> dict[Path, str]:
    """Return every generated file with its content."""
    found = {DOCS / "methods" / card.verb.name / f"{card.name}.md": page(card) for card in cards().values()}
    found[DOCS / "methods" / "README.md"] = "# Methods\n\n" + tables("")
    before, _, rest = README.read_text(encoding="utf-8").partition(MARK)
    _, _, after = rest.partition(MARK)
    found[README] = before + MARK + table("docs/methods/") + MARK + after
    return found


def page(card: Card) -> str:
    """Return one method's page."""
    summary, _, body = card.doc.partition("\n")
    schema = card.parameters.model_json_schema().get("properties", {})
    rows = [
        f"| `{name}` | {'required' if field.is_required() else f'`{field.default}`'} | {limits(schema[name])} "
        f"| {field.description} |"
        for name, field in card.parameters.model_fields.items()
    ]
    takes = [
        f"| `{name}` | {'yes' if field.is_required() else 'no'} | {field.description} |"
        for name, field in card.verb.inputs.model_fields.items()
    ]
    sections = [
        f"# {card.verb.name} {card.name}",
        summary,
        body.strip("\n"),
        f"Paper: <{card.paper}>" if card.paper else "",
        "## Needs\n\n" + "\n".join(f"- {line}" for line in needs(card)),
        "## Takes\n\n| input | required | meaning |\n|---|---|---|\n" + "\n".join(takes),
        "## Parameters\n\n| name | default | range | meaning |\n|---|---|---|---|\n" + "\n".join(rows),
        f"## Run it\n\n```\n{example(card)}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def needs(card: Card) -> list[str]:
    """Return what a method asks for, in words: the advisor's answer to somebody who has nothing."""
    nothing = Have(
        Access.LABELS, Data.NONE, trains=False, sources=0, base=False, same_architecture=False, same_tokenizer=False
    )
    lines = [line.partition(", you have")[0].partition(", and training")[0] for line in card.needs.missing(nothing)]
    return lines or ["nothing"]


def limits(schema: dict) -> str:
    """Return a parameter's range or choices."""
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    signs = {"exclusiveMinimum": "> ", "minimum": ">= ", "exclusiveMaximum": "< ", "maximum": "<= "}
    for part in (schema, *schema.get("anyOf", ())):
        found = [f"{sign}{part[key]:g}" for key, sign in signs.items() if key in part]
        if found:
            return " and ".join(found)
    return ""


def example(card: Card) -> str:
    """Return a command that runs the method."""
    names = "A" if card.needs.sources[1] == 1 else "A B"
    if card.verb.name != "merge":
        return f"lfm {card.verb.name} {card.name} MODEL --data train.jsonl -o out"
    return f"lfm merge {card.name} {names}{' --base C' if card.needs.base else ''} -o out"


def tables(prefix: str) -> str:
    """Return a table of methods for each verb."""
    found = []
    for verb in verbs().values():
        rows = [card for card in cards().values() if card.verb is verb]
        if rows:
            lines = [f"| [{c.name}]({prefix}{verb.name}/{c.name}.md) | {c.summary} |" for c in rows]
            found.append(f"## {verb.name}\n\n{verb.summary}\n\n| method | |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join(found)


def table(prefix: str) -> str:
    """Return one table of all methods."""
    lines = [
        f"| {c.verb.name} | [{c.name}]({prefix}{c.verb.name}/{c.name}.md) | {c.summary} |" for c in cards().values()
    ]
    return "\n| verb | method | what it does |\n|---|---|---|\n" + "\n".join(lines) + "\n\n"


def main() -> int:
    """Write or check; returns the exit code."""
    wanted = pages()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in (DOCS / "methods").rglob("*.md") if path not in wanted]
    if "--check" in sys.argv[1:]:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(DOCS.parent)} is out of date; run `make docs`\n")
        return 1 if stale else 0
    for path in stale:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
