"""A module's parts in the order in which its `forward` runs them, read from the compiled code: half of `anatomy`."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType

from torch import nn


@dataclass(frozen=True)
class Part:
    """One weight matrix: the module that owns it, its name in the state dict, and its widths."""

    name: str
    weight: str
    input_dim: int  # of a convolution: channels per group times kernel size
    output_dim: int
    transposed: bool  # stored (in, out), as GPT-2's Conv1D does


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def ancestors(tensor_name: str) -> Iterator[str]:
    """The module that holds a tensor and the modules around it, inside out; the model itself only if it holds it."""
    path = tensor_name.rpartition(".")[0]
    yield path
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


# --- order ---------------------------------------------------------------------------------------------------------


@cache
def _calls(code: CodeType) -> tuple[str, ...]:
    """The attributes a function uses, in the order in which it calls them: `f(g(x))` gives g, f."""
    called: dict[str, int] = {}
    mentioned: dict[str, int] = {}
    callee: dict[tuple[int, int], str] = {}
    for i, instruction in enumerate(dis.get_instructions(code)):
        where = instruction.positions
        if where is None or where.lineno is None or where.col_offset is None:
            continue  # made by the compiler, or compiled without positions
        start = where.lineno, where.col_offset
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            mentioned.setdefault(instruction.argval, i)
            callee.setdefault(start, instruction.argval)  # of `self.a.b(x)` it is `a` that runs
        elif instruction.opname.startswith("CALL") and start in callee:
            # A call spans its callee, so that both start at the same character; the innermost comes first.
            called.setdefault(callee.pop(start), i)
    order = mentioned | called
    return tuple(sorted(order, key=order.__getitem__))


def _uses(kind: type, function: str, seen: set[str]) -> Iterator[str]:
    """The attributes that a method of a class uses, the methods it calls opened in place."""
    seen.add(function)
    method = inspect.unwrap(getattr(kind, function, None))  # type: ignore[arg-type]
    if not isinstance(method, FunctionType):
        return
    for name in _calls(method.__code__):
        yield name
        if name not in seen and not hasattr(nn.Module, name) and hasattr(kind, name):
            yield from _uses(kind, name, seen)


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_OWN = ""  # stands for a module's own tensors among its children


def _execution_order(module: nn.Module, uses: Mapping[str, int]) -> list[str]:
    """A module's children, and `_OWN`, as its `forward` reaches them."""
    own = min((uses[name] for name in (*module._parameters, *module._buffers) if name in uses), default=-1)
    if not module._modules or isinstance(module, CONTAINERS):
        return [_OWN, *module._modules]
    ranks, last = {_OWN: own}, -1
    for name in module._modules:
        last = ranks[name] = uses.get(name, last)
    return sorted(ranks, key=ranks.__getitem__)


# --- graph ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    part: Part
    reads: int
    writes: int
    conv: bool = False
    dense: bool = True  # a linear map of single positions; False for wider or grouped convolutions


def _axes(module: nn.Module, weight: nn.Parameter) -> tuple[int, int, bool]:
    """Input width, output width, and whether the weight is stored (in, out)."""
    first, second = weight.shape
    if isinstance(module, nn.Linear):
        # Not the shape: quantised layers pack theirs.
        return module.in_features, module.out_features, False
    bias = getattr(module, "bias", None)
    fits_second = isinstance(bias, nn.Parameter) and bias.shape == (second,) and first != second
    return (first, second, True) if hasattr(module, "nf") or fits_second else (second, first, False)


def _matrices(path: str, module: nn.Module) -> list[Matrix]:
    if isinstance(module, nn.modules.conv._ConvNd):
        size = module.weight.numel() // module.out_channels
        part = Part(path, join(path, "weight"), size, module.out_channels, module.transposed)
        dense = module.groups == 1 and set(module.kernel_size) == {1}
        return [Matrix(part, module.in_channels, module.out_channels, True, dense)]
    found = []
    for name, weight in module._parameters.items():
        if weight is not None and "weight" in name and (weight.ndim == 2 or isinstance(module, nn.Linear)):
            reads, writes, transposed = _axes(module, weight)
            found.append(Matrix(Part(path, join(path, name), reads, writes, transposed), reads, writes))
    return found


def is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not module._modules and not isinstance(module, nn.PReLU)


class Graph:
    """A model's modules in the order of execution; a subtree is one span of it."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules())
        self.order: list[str] = []
        self.span: dict[str, range] = {}
        self.children: dict[str, list[str]] = {}
        self._uses: dict[type, dict[str, int]] = {}
        self._visit("", root)
        self.position = {path: i for i, path in enumerate(self.order)}
        self.owners = [path for path in self.order if self._has_tensors(path)]
        tables = (nn.Embedding, nn.EmbeddingBag)
        # In the order of registration, which gives tied tables the name that they are saved under.
        self.embeddings = [path for path, module in self.modules.items() if isinstance(module, tables)]
        self.norms = [path for path in self.owners if is_norm(self.modules[path])]
        no_matrix = set(self.embeddings)
        self.matrices = {path: _matrices(path, self.modules[path]) for path in self.owners if path not in no_matrix}
        self._counts = self._running(len(self.matrices.get(path, ())) for path in self.order)
        norms = set(self.norms)
        self._norm_counts = self._running(path in norms for path in self.order)

    def _visit(self, path: str, module: nn.Module) -> None:
        kind = type(module)
        if kind not in self._uses:
            self._uses[kind] = {name: i for i, name in reversed(list(enumerate(_uses(kind, "forward", set()))))}
        start, inside = len(self.order), []
        for name in _execution_order(module, self._uses[kind]):
            child = join(path, name)
            if name == _OWN:
                self.order.append(path)
            elif child in self.modules:  # a module that has two places is kept at its first
                inside.append(child)
                self._visit(child, self.modules[child])
        self.children[path] = inside
        self.span[path] = range(start, len(self.order))

    def _has_tensors(self, path: str) -> bool:
        module = self.modules[path]
        return any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))

    def _running(self, counts: Iterable[int]) -> list[int]:
        sums = [0]
        for count in counts:
            sums.append(sums[-1] + count)
        return sums

    def count(self, path: str) -> int:
        """How many matrices a subtree holds."""
        return self._counts[self.span[path].stop] - self._counts[self.span[path].start]

    def has_norm(self, path: str) -> bool:
        return self._norm_counts[self.span[path].stop] > self._norm_counts[self.span[path].start]

    def own_parameters(self, path: str) -> list[tuple[str, nn.Parameter]]:
        """A module's own parameters by name, in the order in which its `forward` uses them."""
        module = self.modules[path]
        uses = self._uses[type(module)]
        own = [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
        return sorted(own, key=lambda item: uses.get(item[0], -1))

    def below(self, path: str) -> list[str]:
        """A module and all in it, in order."""
        return self.order[self.span[path].start : self.span[path].stop]

    def matrices_in(self, path: str) -> list[Matrix]:
        return [matrix for owner in self.below(path) for matrix in self.matrices.get(owner, ())]

    def kind(self, path: str) -> object:
        """What makes siblings repeat: their class; of plain sequences what they hold."""
        module = self.modules[path]
        if isinstance(module, CONTAINERS):
            return (type(module), tuple(name for name, _ in module.named_parameters()))
        return type(module)

    def members(self, path: str) -> list[str]:
        """The children of a container that could be blocks."""
        if not isinstance(self.modules[path], (nn.ModuleList, nn.Sequential)):
            return []
        return [child for child in self.children[path] if self.count(child) > 1]
