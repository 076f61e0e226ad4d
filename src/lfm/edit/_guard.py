"""Updates are looked at before they count: how far they move a matrix, what they do to other text and earlier edits.

An update that goes too far is refused, or tried again at half the size; the model in memory is then what it was before.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lfm.checkpoint import Change, Delta, Dense, LowRank
from lfm.data.requests import Request
from lfm.edit._contract import Guard
from lfm.edit._least_squares import Update
from lfm.edit._locate import padded
from lfm.edit._score import listen
from lfm.errors import LfmError, plural
from lfm.models.handle import Model
from lfm.models.local import forward
from lfm.models.samples import sampled_tokens

RETENTION = "retention.json"  # of an edited folder: which edits were in force after which update
HEAT_MAPS = "heat_maps.json"  # pictures of it for the report
CANARIES, LENGTH = 32, 32  # texts that the model makes up, and tokens of each
HALVINGS = 3
CELLS = 24  # rows and columns of the picture at most
OVERLAP = 0.5  # cosine of two keys, under C^-1, from which edits get in each other's way
COMPARED = 1000  # edits of which each is compared with each other, for conflicts; more take too long
TOLD = 5  # of conflicts and refusals, how many are named


@dataclass
class Look:
    """What an update did, as measured before it counts."""

    norm: float
    spectrum: float
    perplexity: float
    kept: float | None  # share of the earlier edits in force that still are; None without any
    in_force: tuple[bool, ...]  # all edits so far, those of this update last
    own: int  # of its own edits in force

    def against(self, guard: Guard) -> list[str]:
        """Return what speaks against it; the comparisons are such that what is no number is refused."""
        found = []
        if not math.isfinite(self.norm):
            found.append("makes a matrix infinite")
        elif guard.norm is not None and self.norm > guard.norm:
            found.append(f"moves a matrix by {self.norm:.3g} of its length (limit {guard.norm:g})")
        if guard.spectrum is not None and not self.spectrum <= guard.spectrum:
            found.append(f"largest singular value x{self.spectrum:.3g} (limit {guard.spectrum:g})")
        if not self.perplexity <= guard.perplexity:
            found.append(f"perplexity of other text x{self.perplexity:.3g} (limit {guard.perplexity:g})")
        if self.kept is not None and self.kept < guard.retention:
            found.append(f"leaves {self.kept:.0%} of earlier edits in force (limit {guard.retention:.0%})")
        if not self.own:
            found.append("none of its own edits holds")
        return found


@dataclass
class Watch:
    """Watches over updates of one module, and keeps the books."""

    guard: Guard
    model: Model
    stored: Callable[[str], torch.Tensor]  # a matrix as it was before any update, by its name in the module
    seed: int = 0
    edits: list[Request] = field(default_factory=list)
    force: list[bool] = field(default_factory=list)  # which of them are in force now
    log: list[dict[str, Any]] = field(default_factory=list)
    _held: dict[str, torch.Tensor] = field(default_factory=dict)
    _first: dict[str, float] = field(default_factory=dict)
    _canaries: list[list[int]] = field(default_factory=list)
    _surprise: float = 0.0

    def __post_init__(self) -> None:
        """Let the model make up text while it is still what it was."""
        texts = sampled_tokens(self.model, CANARIES, LENGTH, seed=self.seed + 1)
        self._canaries = [text.tolist() for text in texts if len(text) > 1]
        self._surprise = self._surprised()

    def judge(self, update: Update) -> Update | None:
        """Return the update as it may count, or None; then the module is as it was before it."""
        module = self.model.module
        names = list(update.changes)
        before = {name: self._before(name) for name in names}
        moved = {name: module.get_parameter(name).detach().clone() for name in names}
        self.edits += [_bare(request) for request in update.requests]
        factors = [0.5**halving for halving in range(HALVINGS + 1)] if self.guard.mode == "shrink" else [1.0]
        first: list[str] = []
        for factor in factors:
            if factor < 1:
                self._put({name: before[name] + factor * (moved[name] - before[name]) for name in names})
            look, surprise = self._look(before, len(update.requests))
            against = look.against(self.guard)
            first = first or against
            if not against:
                self._held |= {name: module.get_parameter(name).detach().clone() for name in names}
                self._surprise, self.force = surprise, list(look.in_force)
                self._note(update, look, f"shrunk to {factor:g}" if factor < 1 else "kept", first)
                return update if factor == 1 else replace(update, changes=_scaled(update.changes, factor))
        self._put(before)
        self.force += self._in_force(self.edits[-len(update.requests) :])
        self._note(update, look, "refused", first)
        return None

    def notes(self) -> Iterator[str]:
        """Yield what became of updates that did not pass."""
        for verdict in ("refused", "shrunk"):
            rows = [row for row in self.log if row["verdict"].startswith(verdict)]
            for row in rows[:TOLD]:
                asked = ", ".join(row["prompts"][:2]) + (", ..." if len(row["prompts"]) > 2 else "")
                yield f"update {row['update']} ({asked}) {row['verdict']}: {'; '.join(row['against'])}"
            if len(rows) > TOLD:
                yield f"{plural(len(rows) - TOLD, 'more update')} {verdict}; see {RETENTION}"

    def metrics(self) -> dict[str, float]:
        refused = sum(row["verdict"] == "refused" for row in self.log)
        shrunk = sum(row["verdict"].startswith("shrunk") for row in self.log)
        return {"updates_refused": float(refused), "updates_shrunk": float(shrunk)}

    def as_json(self) -> str:
        """Return the books: each update, and which edits were in force behind it."""
        told = {
            "guard": self.guard.model_dump(mode="json"),
            "edits": [{"id": one.id, "prompt": one.prompt, "target": one.target} for one in self.edits],
            "updates": self.log,
        }
        return json.dumps(told, ensure_ascii=False, indent=1) + "\n"

    # --- measuring ---

    def _look(self, before: Mapping[str, torch.Tensor], own: int) -> tuple[Look, float]:
        module = self.model.module
        now = {name: module.get_parameter(name).detach() for name in before}
        norm = max(float((now[name] - old).norm() / old.norm().clamp_min(1e-30)) for name, old in before.items())
        spectrum = max(largest_value(now[name]) / max(self._first[name], 1e-30) for name in before)
        surprise = self._surprised()
        in_force = self._in_force(self.edits)
        had = [index for index, value in enumerate(self.force) if value]
        kept = sum(in_force[index] for index in had) / len(had) if had else None
        growth = float(torch.tensor(surprise - self._surprise).exp())
        return Look(norm, spectrum, growth, kept, tuple(in_force), sum(in_force[-own:])), surprise

    def _in_force(self, requests: Sequence[Request]) -> list[bool]:
        return [said.target.exact for said in listen(self.model, requests, answers=0)]

    def _surprised(self) -> float:
        """Return the mean negative log-likelihood of a token of the texts that the model made up."""
        if not self._canaries:
            return 0.0
        device = next(self.model.module.parameters()).device
        batch = padded(self._canaries, device)
        with torch.no_grad():
            said = forward(self.model.module, batch)[:, :-1].float().log_softmax(-1)
        kept = batch["attention_mask"][:, 1:].bool()
        return float(-said.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][kept].mean())

    def _before(self, name: str) -> torch.Tensor:
        if name not in self._held:
            parameter = self.model.module.get_parameter(name)
            self._held[name] = self.stored(name).to(parameter)
            self._first[name] = largest_value(self._held[name])
        return self._held[name]

    def _put(self, matrices: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, matrix in matrices.items():
                self.model.module.get_parameter(name).copy_(matrix)

    def _note(self, update: Update, look: Look, verdict: str, against: Sequence[str]) -> None:
        self.log.append(
            {
                "update": len(self.log) + 1,
                "verdict": verdict,
                "against": list(against),
                "requests": [request.id for request in update.requests],
                "prompts": [request.prompt for request in update.requests],
                "norm": _rounded(look.norm),
                "spectrum": _rounded(look.spectrum),
                "perplexity": _rounded(look.perplexity),
                "kept": look.kept,
                "in_force": list(self.force),
            }
        )


def _bare(request: Request) -> Request:
    return replace(request, paraphrases=(), neighbours=(), old=None)


def _rounded(value: float) -> float | None:
    """Return four significant digits; None for what JSON has no number for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _scaled(changes: Mapping[str, Change], factor: float) -> dict[str, Change]:
    """Return changes of another size."""
    found: dict[str, Change] = {}
    for name, change in changes.items():
        if isinstance(change, LowRank):
            found[name] = LowRank(change.u * factor, change.v)
        elif isinstance(change, Dense):
            found[name] = Dense(change.values * factor)
        else:
            raise LfmError(f"{name}: a {change.kind} change cannot be made smaller; use `guard: refuse`")
    return found


def largest_value(matrix: torch.Tensor, rounds: int = 24) -> float:
    """Return the largest singular value of a matrix, by power iteration from a fixed start."""
    values = matrix.float()
    if not bool(values.isfinite().all()):
        return float("inf")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(values.shape[1], generator=generator).to(values)
    for _ in range(rounds):
        direction = values.T @ (values @ direction)
        direction = direction / direction.norm().clamp_min(1e-30)
    return float((values @ direction).norm())


# --- the picture ----------------------------------------------------------------------------------------------------


def heat_map(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the share of edits in force: those of some updates (rows) behind later ones (columns)."""
    sizes = [len(row["requests"]) for row in log]
    owner = [index for index, size in enumerate(sizes) for _ in range(size)]
    wide = -(-len(log) // CELLS)
    groups = [range(start, min(start + wide, len(log))) for start in range(0, len(log), wide)]
    names = tuple(str(g[0] + 1) if len(g) == 1 else f"{g[0] + 1}-{g[-1] + 1}" for g in groups)
    values = [[_share(log[behind[-1]]["in_force"], owner, of) for behind in groups] for of in groups]
    return {
        "title": "Edits in force over time",
        "rows": [f"edits of update {name}" for name in names],
        "columns": [f"after {name}" for name in names],
        "values": values,
        "unit": "share in force",
        "note": "An edit is in force where its target is what the model says to its prompt, token by token.",
    }


def _share(in_force: Sequence[bool], owner: Sequence[int], of: range) -> float | None:
    mine = [value for value, update in zip(in_force, owner, strict=False) if update in of]
    return sum(mine) / len(mine) if mine else None


# --- conflicts ------------------------------------------------------------------------------------------------------


def conflicts(requests: Sequence[Request], patches: Sequence[Delta], overlap: torch.Tensor | None) -> Iterator[str]:
    """Yield which edits will get in each other's way, and why, before any is made."""
    about: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        if request.subject is not None:
            about[request.subject].append(request)
    several = {subject: found for subject, found in about.items() if len(found) > 1}
    if several:
        names = ", ".join(f"{subject!r} ({len(found)})" for subject, found in list(several.items())[:TOLD])
        yield (
            f"{plural(len(several), 'subject')} with several edits: {names}; their keys are nearly the same, so that "
            "one update takes their mean: give them in different batches, or use a method by gradient steps"
        )
    yield from _asked_twice(requests)
    yield from _patched_already(requests, patches)
    if overlap is not None:
        yield from _overlapping(requests, overlap)


def _asked_twice(requests: Sequence[Request]) -> Iterator[str]:
    targets = {request.prompt: request for request in requests}
    for request in requests:
        for other in (targets.get(text) for text in request.paraphrases):
            if other is not None and other.target != request.target:
                yield (
                    f"{request.where}: a paraphrase of {request.prompt!r} (to {request.target!r}) is the prompt of "
                    f"{other.where} (to {other.target!r}): both cannot hold"
                )


def _patched_already(requests: Sequence[Request], patches: Sequence[Delta]) -> Iterator[str]:
    earlier = {one["prompt"]: (patch, one) for patch in patches for one in patch.provenance.get("requests", ())}
    for request in requests:
        patch, one = earlier.get(request.prompt, (None, None))
        if patch is not None and one is not None:
            same = "to the same target" if one["target"] == request.target else f"to {one['target']!r}"
            yield f"{request.prompt!r} was edited by patch {patch.id[:12]} {same}; revert that one to start afresh"


def _overlapping(requests: Sequence[Request], overlap: torch.Tensor) -> Iterator[str]:
    pairs = [
        (float(overlap[i, j]), requests[i], requests[j])
        for i in range(len(requests))
        for j in range(i)
        if requests[i].subject != requests[j].subject and abs(float(overlap[i, j])) > OVERLAP
    ]
    pairs.sort(key=lambda pair: -abs(pair[0]))
    if pairs:
        names = "; ".join(
            f"{one.subject or one.prompt!r} and {two.subject or two.prompt!r} {cosine:.2f}"
            for cosine, one, two in pairs[:TOLD]
        )
        yield f"{plural(len(pairs), 'pair')} of edits of different subjects share most of their keys: {names}"
