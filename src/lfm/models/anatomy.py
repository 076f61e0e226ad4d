"""Where things are in any model: embeddings, blocks, attention, MLP, norms and head, read from the module graph.

No model names and no table of architectures; no weight is read and nothing is run, so that a model on the meta device
does. The evidence, strongest first:

*Order.* The order in which a module's compiled `forward` calls its children, methods it calls included. A child that
`forward` does not name stays where it was registered; so does everything in a container.

*Matrices.* Every own parameter called `...weight` with two axes, and every convolution. Its direction comes from the
layer type: `nn.Linear` and unknown types store (out, in), transformers' `Conv1D` (it has `nf`) stores (in, out), and a
bias that fits one axis only decides for an unknown type. A norm is a leaf with a one-axis `weight`.

*Blocks.* The children of the outermost `nn.ModuleList`, or of an `nn.Sequential` whose kind of child is repeated, which
hold two matrices or more and a norm (without a norm only if no other is found). A child that is almost only a list of
such children of one kind is a stage: its children are the blocks. Experts hold no norm, so they are never blocks.

*Width.* The first size in a block that is read, written again, and the size of a norm (of norms without weights: read
and written); of convolutions what the last one writes.

*Sub-layers.* The submodules of a block, loose matrices in a row taken together. The last matrix that writes the width
is the way out. Attention: three or more read the width; or two that write something else than the way out reads; or one
alone that writes more than that (fused q, k, v). MLP: one or two write exactly what the way out reads, or one alone
twice as much (fused gate and up). Of two attentions the second is cross-attention; of several MLPs the widest counts.
In a block of convolutions the longest chain, each reading what the one before wrote, is taken as MLP.

*Experts.* Three-axis parameters with the width as one of the last two axes, and lists of children without norms.

*Head.* Of what comes after the last block: the matrix that shares an embedding's weight, else the last matrix. Towers
that end in one matrix each, all into the same width, have no common head.

*Words*, only where shapes tie: `attn|attention` for one fused matrix twice as wide as the way out's input, for three
square matrices, and for a second MLP-like pair; `pool|project` for a last matrix that writes the width again.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from types import CodeType, FunctionType

from torch import nn

from lfm.errors import RequestError, did_you_mean


@dataclass(frozen=True)
class Part:
    """One weight matrix: the module that owns it, its name in the state dict, and its widths."""

    name: str
    weight: str
    input_dim: int  # of a convolution: channels per group times kernel size
    output_dim: int
    transposed: bool  # stored (in, out), as GPT-2's Conv1D does


@dataclass(frozen=True)
class Block:
    """One layer of a stack and the matrices in it by role; every matrix of it is in exactly one field."""

    index: int  # in `Anatomy.blocks`
    name: str
    stack: str  # the container that holds the layers
    width: int  # of the residual stream
    depth: float  # see `Anatomy.depth`
    attention_in: tuple[Part, ...] = ()  # q, k, v, or one fused
    attention_out: Part | None = None
    cross_attention_in: tuple[Part, ...] = ()
    cross_attention_out: Part | None = None
    mlp_in: tuple[Part, ...] = ()  # one, or gate and up; of a mixture of experts: the shared expert's
    mlp_out: Part | None = None
    experts: tuple[Part, ...] = ()  # in and out of all experts; fused ones have three axes, expert first
    others: tuple[Part, ...] = ()  # routers, shortcuts, state-space mixers, ...
    norms: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every matrix of the block, by role."""
        ways_out = (self.attention_out, self.cross_attention_out, self.mlp_out)
        attention, cross, mlp = ((part,) if part else () for part in ways_out)
        attentions = (*self.attention_in, *attention, *self.cross_attention_in, *cross)
        return (*attentions, *self.mlp_in, *mlp, *self.experts, *self.others)


@dataclass(frozen=True)
class Anatomy:
    """A model's modules by role, in the order of execution; `""` is the name of the model itself."""

    embeddings: tuple[str, ...]  # token, position and patch embeddings, or the convolutions before the blocks
    blocks: tuple[Block, ...]  # several stacks one after another
    final_norms: tuple[str, ...]
    head: str | None  # None as well where several towers end in one each
    tied_head: bool  # the head's weight is an embedding's
    outside: Mapping[str, float] = field(repr=False)  # depth of every module outside the blocks that has tensors

    @cached_property
    def _index(self) -> dict[str, int]:
        return {block.name: block.index for block in self.blocks}

    def block_of(self, tensor_name: str) -> int | None:
        """The index of the block that holds a tensor, or None."""
        return next((self._index[path] for path in _ancestors(tensor_name) if path in self._index), None)

    def depth(self, tensor_name: str) -> float:
        """How deep a tensor sits: 0.0 embeddings, (i + 1) / (n + 1) block i of n, 1.0 head.

        An encoder and its decoder are one chain; towers that do not feed each other are measured each on its own.
        Without blocks the matrices are counted instead. What an adapter adds has the depth of its module.
        """
        index = self.block_of(tensor_name)
        if index is not None:
            return self.blocks[index].depth
        for path in _ancestors(tensor_name):
            if path in self.outside:
                return self.outside[path]
        raise RequestError(f"no module of this model holds {tensor_name!r}{did_you_mean(tensor_name, self.outside)}")


def anatomy(module: nn.Module) -> Anatomy:
    """Find the embeddings, blocks, norms and head of any module; what is not there is empty or None.

    Look before adapters go in: their low-rank matrices read the width too and would be taken for ways in.
    """
    graph = _Graph(module)
    blocks = _blocks(graph, _find_stacks(graph))
    outline = _Outline(graph, blocks)
    head, tied = _head(graph, outline)
    return Anatomy(
        embeddings=_embeddings(graph, outline),
        blocks=blocks,
        final_norms=tuple(path for path in graph.norms if outline.is_final_norm(path)),
        head=head,
        tied_head=tied,
        outside={path: outline.depth(path) for path in graph.owners if not outline.in_block(path)},
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _ancestors(tensor_name: str) -> Iterator[str]:
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


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_OWN = ""  # stands for a module's own tensors among its children


def _execution_order(module: nn.Module, uses: Mapping[str, int]) -> list[str]:
    """A module's children, and `_OWN`, as its `forward` reaches them."""
    own = min((uses[name] for name in (*module._parameters, *module._buffers) if name in uses), default=-1)
    if not module._modules or isinstance(module, _CONTAINERS):
        return [_OWN, *module._modules]
    ranks, last = {_OWN: own}, -1
    for name in module._modules:
        last = ranks[name] = uses.get(name, last)
    return sorted(ranks, key=ranks.__getitem__)


# --- graph ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
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


def _matrices(path: str, module: nn.Module) -> list[_Matrix]:
    if isinstance(module, nn.modules.conv._ConvNd):
        size = module.weight.numel() // module.out_channels
        part = Part(path, _join(path, "weight"), size, module.out_channels, module.transposed)
        dense = module.groups == 1 and set(module.kernel_size) == {1}
        return [_Matrix(part, module.in_channels, module.out_channels, True, dense)]
    found = []
    for name, weight in module._parameters.items():
        if weight is not None and "weight" in name and (weight.ndim == 2 or isinstance(module, nn.Linear)):
            reads, writes, transposed = _axes(module, weight)
            found.append(_Matrix(Part(path, _join(path, name), reads, writes, transposed), reads, writes))
    return found


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not module._modules and not isinstance(module, nn.PReLU)


class _Graph:
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
        self.norms = [path for path in self.owners if _is_norm(self.modules[path])]
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
            child = _join(path, name)
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

    def matrices_in(self, path: str) -> list[_Matrix]:
        return [matrix for owner in self.below(path) for matrix in self.matrices.get(owner, ())]

    def kind(self, path: str) -> object:
        """What makes siblings repeat: their class; of plain sequences what they hold."""
        module = self.modules[path]
        if isinstance(module, _CONTAINERS):
            return (type(module), tuple(name for name, _ in module.named_parameters()))
        return type(module)

    def members(self, path: str) -> list[str]:
        """The children of a container that could be blocks."""
        if not isinstance(self.modules[path], (nn.ModuleList, nn.Sequential)):
            return []
        return [child for child in self.children[path] if self.count(child) > 1]


# --- blocks --------------------------------------------------------------------------------------------------------

_Stack = tuple[str, list[str]]


def _find_stacks(graph: _Graph) -> list[_Stack]:
    sequences = [path for path, module in graph.modules.items() if isinstance(module, nn.Sequential)]
    repeated = Counter(graph.kind(child) for path in sequences for child in graph.members(path))
    kinds = {kind for kind, times in repeated.items() if times > 1}
    return list(_walk(graph, "", kinds, norms=True)) or list(_walk(graph, "", kinds, norms=False))


def _walk(graph: _Graph, path: str, kinds: set[object], *, norms: bool) -> Iterator[_Stack]:
    members = graph.members(path)
    if isinstance(graph.modules[path], nn.Sequential):
        members = [child for child in members if graph.kind(child) in kinds]
    if members and (not norms or any(graph.has_norm(child) for child in members)):
        yield path, [block for child in members for block in _open_stage(graph, child)]
        return
    for child in graph.children[path]:
        yield from _walk(graph, child, kinds, norms=norms)


def _open_stage(graph: _Graph, path: str) -> list[str]:
    """The blocks of a stage, or the module itself if it is a block."""
    for inner in graph.below(path):
        members = graph.members(inner)
        same = len({graph.kind(child) for child in members}) == 1
        if same and all(graph.has_norm(child) for child in members):
            inside = sum(graph.count(child) for child in members)
            # Besides its blocks a stage has a down-sampling at most; a block with a list in it has much more.
            if 2 * (graph.count(path) - inside) <= inside:
                return [block for child in members for block in _open_stage(graph, child)]
    return [path]


def _blocks(graph: _Graph, stacks: Sequence[_Stack]) -> tuple[Block, ...]:
    plain = [_block(graph, stack, name) for stack, names in stacks for name in names]
    depths: list[float] = []
    for chain in _chains(plain):
        depths += [(i + 1) / (len(chain) + 1) for i in range(len(chain))]
    return tuple(
        replace(block, index=i, depth=depth) for i, (block, depth) in enumerate(zip(plain, depths, strict=True))
    )


def _chains(blocks: Iterable[Block]) -> list[list[Block]]:
    """Stacks that feed each other: those beside each other, and a decoder with what it attends to."""
    chains: list[list[Block]] = []
    for block in blocks:
        last = chains[-1][-1].stack if chains else None
        beside = last is not None and last.rpartition(".")[0] == block.stack.rpartition(".")[0]
        if last is not None and (last == block.stack or beside or block.cross_attention_out):
            chains[-1].append(block)
        else:
            chains.append([block])
    return chains


# --- roles inside a block ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sublayer:
    attends: bool
    ins: tuple[_Matrix, ...]
    out: _Matrix

    @property
    def inner(self) -> int:
        """How wide it is between its way in and its way out."""
        return max(matrix.writes for matrix in self.ins)


def _block(graph: _Graph, stack: str, name: str) -> Block:
    listed = _listed_experts(graph, name)
    routed = tuple(m.part for m in graph.matrices_in(name) if m.part.name in listed)
    matrices = [m for m in graph.matrices_in(name) if m.part.name not in listed]
    width = _width(graph, name, matrices)
    experts = (*routed, *_fused_experts(graph, name, width))
    attentions, mlps = _sublayers(graph, name, matrices, width, {part.name for part in experts})
    attention, cross, *_ = (*attentions, None, None)
    mlp = mlps[0] if mlps else None
    placed = {m.part.weight for layer in (attention, cross, mlp) if layer for m in (*layer.ins, layer.out)}
    return Block(
        index=0,
        name=name,
        stack=stack,
        width=width,
        depth=0.0,
        attention_in=_ins(attention),
        attention_out=attention.out.part if attention else None,
        cross_attention_in=_ins(cross),
        cross_attention_out=cross.out.part if cross else None,
        mlp_in=_ins(mlp),
        mlp_out=mlp.out.part if mlp else None,
        experts=experts,
        others=tuple(m.part for m in matrices if m.part.weight not in placed),
        norms=tuple(path for path in graph.below(name) if _is_norm(graph.modules[path])),
    )


def _ins(layer: _Sublayer | None) -> tuple[Part, ...]:
    return tuple(matrix.part for matrix in layer.ins) if layer else ()


def _width(graph: _Graph, block: str, matrices: Sequence[_Matrix]) -> int:
    """The width of the residual stream: what goes in and comes back."""
    sizes = [graph.modules[path].weight.numel() for path in graph.below(block) if _is_norm(graph.modules[path])]
    if not matrices:
        return sizes[0] if sizes else 0
    if all(m.conv for m in matrices):
        return matrices[-1].writes
    written = {m.writes for m in matrices if m.dense}
    back = [m.reads for m in matrices if m.dense and m.reads in written]
    return next((size for size in back if size in sizes), back[0] if back else matrices[-1].writes)


def _listed_experts(graph: _Graph, block: str) -> set[str]:
    """The modules with matrices in lists of two or more alike children that hold no norm."""
    owners: set[str] = set()
    for path in graph.below(block):
        if isinstance(graph.modules[path], (nn.ModuleList, nn.ModuleDict)):
            members = [child for child in graph.children[path] if graph.count(child) > 1]
            alike = len(members) > 1 and len({graph.kind(child) for child in members}) == 1
            if alike and not any(graph.has_norm(child) for child in members):
                owners.update(owner for child in members for owner in graph.below(child) if owner in graph.matrices)
    return owners


def _fused_experts(graph: _Graph, block: str, width: int) -> list[Part]:
    """Three-axis parameters, expert first; the last one used is the way out."""
    found = [
        (path, name, weight.shape)
        for path in graph.below(block)
        if not isinstance(graph.modules[path], nn.modules.conv._ConvNd)
        for name, weight in graph.own_parameters(path)
        if weight.ndim == 3 and min(weight.shape) > 1 and width in weight.shape[1:]
    ]
    parts = []
    for i, (path, name, (_, first, second)) in enumerate(found):
        leaves = i == len(found) - 1
        # The way in reads the width and the way out writes it, whichever axis that is.
        transposed = first != width if leaves else second != width
        reads, writes = (first, second) if transposed else (second, first)
        parts.append(Part(path, _join(path, name), reads, writes, transposed))
    return parts


def _sublayers(
    graph: _Graph, block: str, matrices: Sequence[_Matrix], width: int, experts: set[str]
) -> tuple[list[_Sublayer], list[_Sublayer]]:
    """The attentions in order, and the MLPs, the widest first."""
    if all(m.conv for m in matrices):
        return [], _longest_chain(matrices, width)
    runs = [(run, [m for m in run if m.dense]) for run in _runs(graph, block, experts)]
    found = [layer for run, dense in runs for layer in _read(dense, width, alone=len(dense) == len(run))]
    attentions = [layer for layer in found if layer.attends]
    mlps = sorted((layer for layer in found if not layer.attends), key=lambda layer: -layer.inner)
    if not attentions:
        attentions = [layer for layer in mlps[1:] if _says_attention(layer.out)][:1]
    return attentions, mlps


def _runs(graph: _Graph, path: str, experts: set[str]) -> Iterator[list[_Matrix]]:
    """Matrices that work together: those of one submodule, or loose ones in a row."""
    loose = list(graph.matrices.get(path, ()))
    for child in graph.children[path]:
        inside = [m for m in graph.matrices_in(child) if m.part.name not in experts]
        if len(inside) < 2:
            loose += inside
            continue
        yield loose
        loose = []
        if isinstance(graph.modules[child], _CONTAINERS) or not experts.isdisjoint(graph.below(child)):
            yield from _runs(graph, child, experts)
        else:
            yield inside
    yield loose


def _read(dense: Sequence[_Matrix], width: int, *, alone: bool) -> list[_Sublayer]:
    """The sub-layers in matrices in order of execution; `alone` if no convolution works among them."""
    ends = [i for i, m in enumerate(dense) if m.writes == width]
    if not ends:
        return []
    before, out = dense[: ends[-1]], dense[ends[-1]]
    reading = [m for m in before if m.reads == width]
    pair = _matching(before, width, out.reads)
    if 0 < len(pair) < 3:
        earlier = _read(before[: -len(pair)], width, alone=alone)
        if any(layer.attends for layer in earlier):
            return [*earlier, _Sublayer(False, tuple(pair), out)]
    if not reading:
        return []
    fused = len(before) == 1 and alone
    attends = _attends(reading, pair, out, fused=fused)
    return [_Sublayer(attends, tuple(reading), out)] if attends is not None else _widest_pair(dense, width)


def _attends(reading: list[_Matrix], pair: list[_Matrix], out: _Matrix, *, fused: bool) -> bool | None:
    """Whether what reads the width and the way out are attention or MLP, or None if they are neither."""
    if len(reading) > 2:
        return True
    if len(pair) == len(reading):
        three_squares = len(reading) == 2 and out.reads == out.writes
        return three_squares and _says_attention(out)
    if len(reading) == 2:
        return True
    ratio = reading[0].writes / out.reads
    if not fused or ratio <= 1:
        return None
    return ratio != 2 or _says_attention(out)


def _matching(before: Sequence[_Matrix], width: int, inner: int) -> list[_Matrix]:
    """The matrices right before a way out that read the width and write exactly what it reads."""
    found: list[_Matrix] = []
    for matrix in reversed(before):
        if (matrix.reads, matrix.writes) != (width, inner):
            break
        found.insert(0, matrix)
    return found


def _widest_pair(dense: Sequence[_Matrix], width: int) -> list[_Sublayer]:
    pairs = [
        _Sublayer(False, (first,), second)
        for i, first in enumerate(dense)
        for second in dense[i + 1 :]
        if first.reads == width == second.writes and first.writes == second.reads != width
    ]
    return [max(pairs, key=lambda layer: layer.inner)] if pairs else []


def _longest_chain(matrices: Sequence[_Matrix], width: int) -> list[_Sublayer]:
    """The most convolutions in a row that each read what the one before wrote."""
    best: list[_Matrix] = []
    run: list[_Matrix] = []
    for matrix in matrices:
        run = [*run, matrix] if run and run[-1].writes == matrix.reads else [matrix]
        if matrix.writes == width and len(run) > len(best):
            best = run
    return [_Sublayer(False, (best[0],), best[-1])] if len(best) > 1 else []


def _says_attention(matrix: _Matrix) -> bool:
    return re.search("attn|attention", matrix.part.name, re.IGNORECASE) is not None


# --- outside the blocks --------------------------------------------------------------------------------------------


class _Outline:
    """Where the modules outside the blocks are, as seen from the stacks nearest to them in the tree."""

    def __init__(self, graph: _Graph, blocks: tuple[Block, ...]) -> None:
        self.graph = graph
        self.blocks = blocks
        self._names = {block.name for block in blocks}
        self._stacks = {stack: stack.split(".") for stack in dict.fromkeys(block.stack for block in blocks)}
        self._tables = set(graph.embeddings)
        following = (*(block.depth for block in blocks[1:]), 0.0)
        self._ends = {block.name for block, after in zip(blocks, following, strict=False) if after <= block.depth}
        self.matrices = [m for path, found in graph.matrices.items() if not self.in_block(path) for m in found]

    @property
    def towers(self) -> int:
        """How many chains of stacks there are that do not feed each other."""
        return len(self._ends)

    def in_block(self, path: str) -> bool:
        return any(ancestor in self._names for ancestor in _ancestors(f"{path}."))

    def nearest(self, path: str) -> list[Block]:
        """The blocks of the stacks that share most of a module's path."""
        shared = {stack: _shared(path.split("."), parts) for stack, parts in self._stacks.items()}
        return [block for block in self.blocks if shared[block.stack] == max(shared.values())]

    def runs_before(self, block: Block, path: str) -> bool:
        return self.graph.span[block.name].stop <= self.graph.position[path]

    def before(self, path: str) -> list[Block]:
        """The nearest blocks that run before a module."""
        return [block for block in self.nearest(path) if self.runs_before(block, path)]

    def is_final_norm(self, path: str) -> bool:
        """Whether a norm comes right after all the blocks near it: no matrix between them."""
        before = self.before(path)
        if self.in_block(path) or not before or len(before) < len(self.nearest(path)):
            return False
        between = range(self.graph.span[before[-1].name].stop, self.graph.position[path])
        return not any(self.graph.position[matrix.part.name] in between for matrix in self.matrices)

    def depth(self, path: str) -> float:
        if path in self._tables:
            return 0.0
        if not self.blocks:
            return self._depth_by_matrices(path)
        before = self.before(path)
        if not before:
            return 0.0
        return 1.0 if before[-1].name in self._ends else before[-1].depth

    def _depth_by_matrices(self, path: str) -> float:
        here = self.graph.position[path]
        earlier = sum(self.graph.position[matrix.part.name] <= here for matrix in self.matrices) - 1
        last = len(self.matrices) - 1
        return max(earlier, 0) / last if last > 0 else 1.0


def _shared(path: Sequence[str], other: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other)))


def _embeddings(graph: _Graph, outline: _Outline) -> tuple[str, ...]:
    """Tables, tied ones once, and the convolutions before the blocks; if there is neither, the first matrix."""
    tables = {id(graph.modules[p]._parameters.get("weight")): p for p in reversed(graph.embeddings)}
    kept = [path for path in graph.embeddings if path in tables.values() and not outline.in_block(path)]
    early = [m for m in outline.matrices if outline.blocks and not outline.before(m.part.name)]
    stem = [m for m in early if m.conv] or ([] if kept else early[:1])
    return (*kept, *(matrix.part.name for matrix in stem))


def _head(graph: _Graph, outline: _Outline) -> tuple[str | None, bool]:
    """The output head, and whether its weight is an embedding's."""
    after = [m for m in outline.matrices if all(outline.runs_before(block, m.part.name) for block in outline.blocks)]
    tables = {id(weight) for path in graph.embeddings for _, weight in graph.own_parameters(path)}
    tied = [m for m in after if any(id(weight) in tables for _, weight in graph.own_parameters(m.part.name))]
    if tied:
        return tied[-1].part.name, True
    if not after or _one_of_several(outline, after[-1]) or _goes_back(graph, outline, after[-1]):
        return None, False
    return after[-1].part.name, False


def _goes_back(graph: _Graph, outline: _Outline, last: _Matrix) -> bool:
    """Whether a last matrix only pools or projects: it writes a width that the model has inside."""
    widths = {block.width for block in outline.blocks}
    if outline.blocks:
        widths.update(w.shape[-1] for path in graph.embeddings for _, w in graph.own_parameters(path))
    says_so = re.search("pool|project", last.part.name, re.IGNORECASE) is not None
    return last.writes in widths and (says_so or outline.towers > 1)


def _one_of_several(outline: _Outline, last: _Matrix) -> bool:
    """Whether towers that do not feed each other end in a matrix each, all into the same width."""
    return outline.towers > 1 and sum(m.writes == last.writes for m in outline.matrices) > 1
