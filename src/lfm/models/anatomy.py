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

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from lfm.errors import RequestError, did_you_mean
from lfm.models._graph import CONTAINERS, Graph, Matrix, Part, ancestors, is_norm, join


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
        return next((self._index[path] for path in ancestors(tensor_name) if path in self._index), None)

    def depth(self, tensor_name: str) -> float:
        """How deep a tensor sits: 0.0 embeddings, (i + 1) / (n + 1) block i of n, 1.0 head.

        An encoder and its decoder are one chain; towers that do not feed each other are measured each on its own.
        Without blocks the matrices are counted instead. What an adapter adds has the depth of its module.
        """
        index = self.block_of(tensor_name)
        if index is not None:
            return self.blocks[index].depth
        for path in ancestors(tensor_name):
            if path in self.outside:
                return self.outside[path]
        raise RequestError(f"no module of this model holds {tensor_name!r}{did_you_mean(tensor_name, self.outside)}")


def anatomy(module: nn.Module) -> Anatomy:
    """Find the embeddings, blocks, norms and head of any module; what is not there is empty or None.

    Look before adapters go in: their low-rank matrices read the width too and would be taken for ways in.
    """
    graph = Graph(module)
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


def layers(module: nn.Module) -> tuple[str, ...]:
    """Return the modules that give the hidden states, one after the other: the blocks.

    Without blocks these are the norms; without norms, the matrices before the output layer.
    """
    found = anatomy(module)
    if found.blocks:
        return tuple(block.name for block in found.blocks)
    graph = Graph(module)
    return tuple(graph.norms) or tuple(path for path in graph.matrices if path != found.head)


# --- blocks --------------------------------------------------------------------------------------------------------

_Stack = tuple[str, list[str]]


def _find_stacks(graph: Graph) -> list[_Stack]:
    sequences = [path for path, module in graph.modules.items() if isinstance(module, nn.Sequential)]
    repeated = Counter(graph.kind(child) for path in sequences for child in graph.members(path))
    kinds = {kind for kind, times in repeated.items() if times > 1}
    return list(_walk(graph, "", kinds, norms=True)) or list(_walk(graph, "", kinds, norms=False))


def _walk(graph: Graph, path: str, kinds: set[object], *, norms: bool) -> Iterator[_Stack]:
    members = graph.members(path)
    if isinstance(graph.modules[path], nn.Sequential):
        members = [child for child in members if graph.kind(child) in kinds]
    if members and (not norms or any(graph.has_norm(child) for child in members)):
        yield path, [block for child in members for block in _open_stage(graph, child)]
        return
    for child in graph.children[path]:
        yield from _walk(graph, child, kinds, norms=norms)


def _open_stage(graph: Graph, path: str) -> list[str]:
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


def _blocks(graph: Graph, stacks: Sequence[_Stack]) -> tuple[Block, ...]:
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
    ins: tuple[Matrix, ...]
    out: Matrix

    @property
    def inner(self) -> int:
        """How wide it is between its way in and its way out."""
        return max(matrix.writes for matrix in self.ins)


def _block(graph: Graph, stack: str, name: str) -> Block:
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
        norms=tuple(path for path in graph.below(name) if is_norm(graph.modules[path])),
    )


def _ins(layer: _Sublayer | None) -> tuple[Part, ...]:
    return tuple(matrix.part for matrix in layer.ins) if layer else ()


def _width(graph: Graph, block: str, matrices: Sequence[Matrix]) -> int:
    """The width of the residual stream: what goes in and comes back."""
    sizes = [graph.modules[path].weight.numel() for path in graph.below(block) if is_norm(graph.modules[path])]
    if not matrices:
        return sizes[0] if sizes else 0
    if all(m.conv for m in matrices):
        return matrices[-1].writes
    written = {m.writes for m in matrices if m.dense}
    back = [m.reads for m in matrices if m.dense and m.reads in written]
    return next((size for size in back if size in sizes), back[0] if back else matrices[-1].writes)


def _listed_experts(graph: Graph, block: str) -> set[str]:
    """The modules with matrices in lists of two or more alike children that hold no norm."""
    owners: set[str] = set()
    for path in graph.below(block):
        if isinstance(graph.modules[path], (nn.ModuleList, nn.ModuleDict)):
            members = [child for child in graph.children[path] if graph.count(child) > 1]
            alike = len(members) > 1 and len({graph.kind(child) for child in members}) == 1
            if alike and not any(graph.has_norm(child) for child in members):
                owners.update(owner for child in members for owner in graph.below(child) if owner in graph.matrices)
    return owners


def _fused_experts(graph: Graph, block: str, width: int) -> list[Part]:
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
        parts.append(Part(path, join(path, name), reads, writes, transposed))
    return parts


def _sublayers(
    graph: Graph, block: str, matrices: Sequence[Matrix], width: int, experts: set[str]
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


def _runs(graph: Graph, path: str, experts: set[str]) -> Iterator[list[Matrix]]:
    """Matrices that work together: those of one submodule, or loose ones in a row."""
    loose = list(graph.matrices.get(path, ()))
    for child in graph.children[path]:
        inside = [m for m in graph.matrices_in(child) if m.part.name not in experts]
        if len(inside) < 2:
            loose += inside
            continue
        yield loose
        loose = []
        if isinstance(graph.modules[child], CONTAINERS) or not experts.isdisjoint(graph.below(child)):
            yield from _runs(graph, child, experts)
        else:
            yield inside
    yield loose


def _read(dense: Sequence[Matrix], width: int, *, alone: bool) -> list[_Sublayer]:
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


def _attends(reading: list[Matrix], pair: list[Matrix], out: Matrix, *, fused: bool) -> bool | None:
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


def _matching(before: Sequence[Matrix], width: int, inner: int) -> list[Matrix]:
    """The matrices right before a way out that read the width and write exactly what it reads."""
    found: list[Matrix] = []
    for matrix in reversed(before):
        if (matrix.reads, matrix.writes) != (width, inner):
            break
        found.insert(0, matrix)
    return found


def _widest_pair(dense: Sequence[Matrix], width: int) -> list[_Sublayer]:
    pairs = [
        _Sublayer(False, (first,), second)
        for i, first in enumerate(dense)
        for second in dense[i + 1 :]
        if first.reads == width == second.writes and first.writes == second.reads != width
    ]
    return [max(pairs, key=lambda layer: layer.inner)] if pairs else []


def _longest_chain(matrices: Sequence[Matrix], width: int) -> list[_Sublayer]:
    """The most convolutions in a row that each read what the one before wrote."""
    best: list[Matrix] = []
    run: list[Matrix] = []
    for matrix in matrices:
        run = [*run, matrix] if run and run[-1].writes == matrix.reads else [matrix]
        if matrix.writes == width and len(run) > len(best):
            best = run
    return [_Sublayer(False, (best[0],), best[-1])] if len(best) > 1 else []


def _says_attention(matrix: Matrix) -> bool:
    return re.search("attn|attention", matrix.part.name, re.IGNORECASE) is not None


# --- outside the blocks --------------------------------------------------------------------------------------------


class _Outline:
    """Where the modules outside the blocks are, as seen from the stacks nearest to them in the tree."""

    def __init__(self, graph: Graph, blocks: tuple[Block, ...]) -> None:
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
        return any(ancestor in self._names for ancestor in ancestors(f"{path}."))

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


def _embeddings(graph: Graph, outline: _Outline) -> tuple[str, ...]:
    """Tables, tied ones once, and the convolutions before the blocks; if there is neither, the first matrix."""
    tables = {id(graph.modules[p]._parameters.get("weight")): p for p in reversed(graph.embeddings)}
    kept = [path for path in graph.embeddings if path in tables.values() and not outline.in_block(path)]
    early = [m for m in outline.matrices if outline.blocks and not outline.before(m.part.name)]
    stem = [m for m in early if m.conv] or ([] if kept else early[:1])
    return (*kept, *(matrix.part.name for matrix in stem))


def _head(graph: Graph, outline: _Outline) -> tuple[str | None, bool]:
    """The output head, and whether its weight is an embedding's."""
    after = [m for m in outline.matrices if all(outline.runs_before(block, m.part.name) for block in outline.blocks)]
    tables = {id(weight) for path in graph.embeddings for _, weight in graph.own_parameters(path)}
    tied = [m for m in after if any(id(weight) in tables for _, weight in graph.own_parameters(m.part.name))]
    if tied:
        return tied[-1].part.name, True
    if not after or _one_of_several(outline, after[-1]) or _goes_back(graph, outline, after[-1]):
        return None, False
    return after[-1].part.name, False


def _goes_back(graph: Graph, outline: _Outline, last: Matrix) -> bool:
    """Whether a last matrix only pools or projects: it writes a width that the model has inside."""
    widths = {block.width for block in outline.blocks}
    if outline.blocks:
        widths.update(w.shape[-1] for path in graph.embeddings for _, w in graph.own_parameters(path))
    says_so = re.search("pool|project", last.part.name, re.IGNORECASE) is not None
    return last.writes in widths and (says_so or outline.towers > 1)


def _one_of_several(outline: _Outline, last: Matrix) -> bool:
    """Whether towers that do not feed each other end in a matrix each, all into the same width."""
    return outline.towers > 1 and sum(m.writes == last.writes for m in outline.matrices) > 1
