"""What a method is, what it needs, and the registry that reads both from the method files themselves.

A *verb* (`merge`, `tune`, ...) is a folder with a `_contract.py` and an `_engine.py`. A *method* is one file in such a
folder, or in an installed package that announces it under the entry point group `lfm.methods`. The registry parses
method files and imports none of them, so asking what there is never costs an import of torch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache, cached_property
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from lfm.errors import RequestError, did_you_mean, plural

PARADIGMS = ("tune", "distill", "reuse", "meta", "edit")
ENTRY_POINTS = "lfm.methods"
LOG = logging.getLogger("lfm")


class Access(IntEnum):
    """What a model's interface offers; each level includes those below it."""

    LABELS = 0  # hard labels, or generated text
    PROBS = 1  # probabilities, or top-k log-probabilities
    LOGITS = 2  # logits and hidden states
    GRADIENTS = 3  # gradients with respect to the inputs
    WEIGHTS = 4  # the weights themselves


class Data(IntEnum):
    """What data there is; each level includes those below it."""

    NONE = 0
    STATISTICS = 1  # metadata of the training data, such as activation statistics
    UNLABELLED = 2
    FEW = 3  # a few labelled examples
    LABELLED = 4


@dataclass(frozen=True)
class Have:
    """What somebody has: the question that `Needs` answers."""

    access: Access = Access.WEIGHTS
    data: Data = Data.NONE
    trains: bool = True
    sources: int = 1
    base: bool = True
    same_architecture: bool = True
    same_tokenizer: bool = True


@dataclass(frozen=True)
class Needs:
    """What a method asks for before it can run."""

    access: Access = Access.WEIGHTS
    data: Data = Data.NONE
    trains: bool = False
    sources: tuple[int, int | None] = (1, 1)
    base: bool = False
    same_architecture: bool = False
    same_tokenizer: bool = False
    extras: tuple[str, ...] = ()

    def missing(self, have: Have) -> list[str]:
        """Return one line for every need that `have` does not meet; an empty list means the method can run."""
        low, high = self.sources
        checks = (
            (have.access >= self.access, f"needs {_name(self.access)} of the models, you have {_name(have.access)}"),
            (have.data >= self.data, f"needs {_name(self.data)} data, you have {_name(have.data)}"),
            (have.trains or not self.trains, "needs to train, and training is ruled out"),
            (
                low <= have.sources and (high is None or have.sources <= high),
                f"takes {number_of_models(low, high)}, you have {have.sources}",
            ),
            (have.base or not self.base, "needs the base, the model that the sources were tuned from"),
            (have.same_architecture or not self.same_architecture, "needs models of one architecture"),
            (have.same_tokenizer or not self.same_tokenizer, "needs models with one tokenizer"),
        )
        return [*(problem for met, problem in checks if not met), *self.absent_packages()]

    def absent_packages(self) -> list[str]:
        """Return a line for every package of `extras` that is not installed."""
        return [
            f"needs the package {name!r}, which is not installed; pip install {name}"
            for name in self.extras
            if importlib.util.find_spec(name) is None
        ]


def _name(level: IntEnum) -> str:
    return level.name.lower()


def number_of_models(low: int, high: int | None) -> str:
    """Return `"2 or more models"`, `"1 model"`, `"2 to 4 models"`."""
    if high is None:
        return f"{low} or more models"
    return plural(low, "model") if low == high else f"{low} to {high} models"


class Inputs(BaseModel):
    """What a verb takes besides the method's own parameters: models, data, requests. Each verb extends it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Method(BaseModel):
    """The hyper-parameters of one algorithm, and its mathematics.

    Fields are the constructor, the recipe's keys and the command's options in one. Methods are frozen, know no data
    and no model, and are final: contracts (`Merge`, `Tune`, ...) are the only classes in between.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    needs: ClassVar[Needs]
    paper: ClassVar[str] = ""


@dataclass(frozen=True)
class Verb:
    """One thing to do with models: the contract its methods fulfil and the engine that runs them."""

    name: str
    paradigm: str
    package: str

    @cached_property
    def contract(self) -> ModuleType:
        return importlib.import_module(f"{self.package}._contract")

    @property
    def summary(self) -> str:
        return first_line(self.contract.__doc__)

    @property
    def inputs(self) -> type[Inputs]:
        """The verb's inputs: `Inputs` of its contract module."""
        inputs: type[Inputs] = self.contract.Inputs
        return inputs

    def engine(self) -> ModuleType:
        """Import the engine; this is where torch comes in."""
        return importlib.import_module(f"{self.package}._engine")


@dataclass(frozen=True)
class Card:
    """A method as its file describes it, known without importing it."""

    name: str
    class_name: str
    verb: Verb
    module: str
    path: Path
    summary: str
    doc: str
    paper: str
    needs: Needs
    parameters: type[BaseModel]

    def load(self) -> type[Method]:
        """Import the method's class."""
        method: type[Method] = getattr(importlib.import_module(self.module), self.class_name)
        return method


@cache
def verbs() -> dict[str, Verb]:
    """Return every verb by name, in the order of the survey's paradigms."""
    root = Path(__file__).parent
    found = {}
    for paradigm in PARADIGMS:
        for contract in sorted((root / paradigm).rglob("_contract.py")):
            package = ".".join(("lfm", *contract.parent.relative_to(root).parts))
            found[contract.parent.name] = Verb(contract.parent.name, paradigm, package)
    return found


@cache
def cards() -> dict[tuple[str, str], Card]:
    """Return every method by (verb, name): those of the package, then those of installed plug-ins.

    A plug-in that cannot be read as a method, or takes a name that is in use, is left out with a warning.
    """
    found = {(card.verb.name, card.name): card for card in (read_card(*file) for file in _own_files())}
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for point in sorted(points, key=lambda point: (point.name, point.value)):
        try:
            card = _plugin_card(point)
            other = found.setdefault((card.verb.name, card.name), card)
            if other.module != card.module:
                raise RequestError(f"{card.verb.name} {card.name} is the name of {other.module} already")
        except Exception as error:  # whatever a stranger's package provokes must not take the rest away
            why = first_line(str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}")
            LOG.warning("warning: the plug-in method %r (%s) is left out: %s", point.name, point.value, why)
    return found


def card(verb: str, name: str) -> Card:
    """Return one method's card, or raise RequestError with the nearest name."""
    if verb not in verbs():
        raise RequestError(f"unknown verb {verb!r}{did_you_mean(verb, verbs())}")
    known = methods_of(verb)
    if name not in known:
        raise RequestError(
            f"unknown method {verb} {name!r}{did_you_mean(name, known)} (known: {', '.join(known) or 'none'})"
        )
    return known[name]


def methods_of(verb: str) -> dict[str, Card]:
    """Return the cards of one verb by method name."""
    return {name: card for (its_verb, name), card in cards().items() if its_verb == verb}


def _own_files() -> Iterator[tuple[str, Path]]:
    root = Path(__file__).parent
    for verb in verbs().values():
        folder = root.joinpath(*verb.package.split(".")[1:])
        for path in sorted(folder.rglob("*.py")):
            if not any(part.startswith("_") for part in path.relative_to(folder).parts):  # what is private is no method
                yield ".".join(("lfm", *path.relative_to(root).with_suffix("").parts)), path


def _plugin_card(point: EntryPoint) -> Card:
    """Read a plug-in's card. Its packages are not imported either, as `find_spec` would do for a dotted name."""
    first, *rest = point.module.split(".")
    spec = importlib.util.find_spec(first)
    for part in rest:
        folders = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(folders)) if spec is not None and folders else None
    if spec is None or spec.origin is None:
        raise RequestError(f"there is no module {point.module!r}")
    return replace(read_card(point.module, Path(spec.origin)), name=point.name)


# --- reading a method file's header ---------------------------------------------------------------------------------


def read_card(module: str, path: Path) -> Card:
    """Return the card of a method file: its docstring, `needs`, `paper` and fields, read without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    doc = ast.get_docstring(tree) or ""
    verb, base, node = _method_class(tree, module)
    assigned = {
        target.id: statement.value
        for statement in node.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    if not doc or "needs" not in assigned:
        raise RequestError(
            f"{module}: a method file starts with a docstring, and its class states `needs = Needs(...)`"
        )
    return Card(
        name=module.rpartition(".")[2],
        class_name=node.name,
        verb=verb,
        module=module,
        path=path,
        summary=first_line(doc),
        doc=doc,
        paper=_literal(assigned["paper"], module) if "paper" in assigned else "",
        needs=_literal(assigned["needs"], module),
        parameters=_parameters(node, getattr(verb.contract, base), module),
    )


def _method_class(tree: ast.Module, module: str) -> tuple[Verb, str, ast.ClassDef]:
    """Find the one class whose base is imported from a verb's `_contract`: that import says which verb it serves."""
    packages = {f"{verb.package}._contract": verb for verb in verbs().values()}
    contracts = {
        alias.asname or alias.name: (packages[node.module], alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module in packages
        for alias in node.names
    }
    found = [
        (*contracts[base.id], node)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in contracts
    ]
    if len(found) != 1:
        raise RequestError(
            f"{module}: a method file holds one class that extends a contract, for example "
            f"`from lfm.reuse.merge._contract import Merge`; found {len(found)}"
        )
    return found[0]


_NAMES: dict[str, Any] = {
    "Access": Access,
    "Annotated": Annotated,
    "Data": Data,
    "Field": Field,
    "Literal": Literal,
    "Needs": Needs,
    **{kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)},
}
_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Attribute, ast.Call, ast.keyword, ast.Tuple, ast.List, ast.Dict),
    *(ast.Subscript, ast.BinOp, ast.BitOr, ast.UnaryOp, ast.USub, ast.Load),
)


def _literal(node: ast.expr, module: str) -> Any:
    """Evaluate a header expression made of literals, `Needs`, `Field` and plain types, and nothing else."""
    for part in ast.walk(node):
        strange = isinstance(part, ast.Name) and part.id not in _NAMES
        private = isinstance(part, ast.Attribute) and part.attr.startswith("_")
        if not isinstance(part, _NODES) or strange or private:
            raise RequestError(
                f"{module}: line {node.lineno}: `{ast.unparse(node)}` must be literal, to be read unimported"
            )
    return eval(compile(ast.Expression(node), module, "eval"), {"__builtins__": {}}, _NAMES)


def _parameters(node: ast.ClassDef, contract: type[Method], module: str) -> type[BaseModel]:
    """Build the pydantic model of a method's fields, those of its contract first."""
    parameters: dict[str, Any] = {name: (info.annotation, info) for name, info in contract.model_fields.items()}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            default = _literal(statement.value, module) if statement.value is not None else ...
            parameters[statement.target.id] = (_literal(statement.annotation, module), default)
    return create_model(node.name, __config__=Method.model_config, **parameters)


def first_line(doc: str | None) -> str:
    """Return a docstring's first line."""
    return (doc or "").strip().partition("\n")[0].strip()


def level(kind: type[Access] | type[Data], word: str) -> Access | Data:
    """Return the level called `word` (`probs`, `unlabelled`, ...), or raise RequestError with the list."""
    names = [member.name.lower() for member in kind]
    if word.lower() not in names:
        raise RequestError(f"unknown {kind.__name__.lower()} level {word!r}: use one of {', '.join(names)}")
    return kind[word.upper()]


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal` annotation, or an empty tuple."""
    return get_args(annotation) if getattr(annotation, "__origin__", None) is Literal else ()
