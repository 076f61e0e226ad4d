"""A smaller model made from a larger one: some of its layers, the heaviest heads, MLP units and channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models._graph import Part
from lfm.models._surroundings import quiet_transformers, seeded
from lfm.models.anatomy import Block, anatomy
from lfm.models.handle import Model
from lfm.models.local import LocalBackend

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim")


def shrink(
    model: Model,
    *,
    layers: int | Sequence[int] | None = None,
    width: float = 1.0,
    weights: bool = True,
    seed: int = 0,
) -> Model:
    """Return a new model with some of the layers, and a share of the width.

    `layers` is how many, spread evenly from the first to the last, or which. `width` is the share of the heads (in the
    groups that share keys and values), of the MLP units and of the hidden channels that is kept, those of the largest
    weights; heads keep their size. With `weights` all that is kept is a copy of the model's, otherwise it is drawn
    from `seed`. Raises RequestError for what is no transformers model, for layers that it does not have, and for models
    whose width cannot be cut.
    """
    module: Any = model.module
    blocks = anatomy(module).blocks
    if not hasattr(module, "config") or not blocks:
        raise RequestError(f"{model.label}: a student is made from transformers models with layers; name one instead")
    chosen = _chosen(layers, len(blocks), model.label)
    whole = chosen == list(range(len(blocks)))
    config = copy.deepcopy(module.config) if whole else _fewer_layers(module.config, len(blocks), chosen)
    if width < 1:
        _narrow(config, width)
    with seeded(seed), quiet_transformers():
        smaller = type(module)(config)
    if weights or width < 1:  # a width that cannot be cut is found out here
        taken = _taken(module, [blocks[place] for place in chosen], [block.name for block in blocks], smaller)
        if weights:
            smaller.load_state_dict(taken)
    smaller = smaller.float().eval().to(next(module.parameters()).device)
    label = f"{model.label} ({len(chosen)} layers{f', width {width:g}' if width < 1 else ''})"
    return Model(LocalBackend(smaller, model.encoder.tokenizer), Access.WEIGHTS, model.task, model.encoder, label)


def _chosen(layers: int | Sequence[int] | None, count: int, label: str) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, int):
        if not 0 < layers <= count:
            raise RequestError(f"{label}: has {count} layers, and {layers} were asked for")
        return evenly(count, layers)
    missing = [layer for layer in layers if not 0 <= layer < count]
    if missing or not layers:
        told = f"layer {missing[0]} was" if missing else "none were"
        raise RequestError(f"{label}: has the layers 0 to {count - 1}, and {told} asked for")
    return list(layers)


def evenly(count: int, wanted: int) -> list[int]:
    """Return so many of the places 0 ... count - 1, the first and the last among them where there are two or more."""
    return torch.linspace(0, count - 1, wanted).round().int().tolist() if wanted > 1 else [0]


def _fewer_layers(config: Any, count: int, chosen: Sequence[int]) -> Any:
    """Return a config of the chosen layers; what it lists for each layer is chosen with them."""
    told = config.to_dict()
    keys = [key for key in DEPTHS if told.get(key) == count]
    if not keys:
        raise RequestError(f"its config does not say that it has {count} layers; name a student instead")
    listed = {key: [value[i] for i in chosen] for key, value in told.items() if _is_list(value, count)}
    found = copy.deepcopy(config)
    for key, value in {**dict.fromkeys(keys, len(chosen)), **listed}.items():
        setattr(found, key, value)
    return found


def _is_list(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def _narrow(config: Any, width: float) -> None:
    """Change a config to a share of the heads, the MLP units and the hidden channels; heads keep their size."""
    heads, hidden = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(hidden, int):
        raise RequestError("width: its config does not say hidden_size and num_attention_heads; name a student instead")
    groups = getattr(config, "num_key_value_heads", None) or heads
    kept = max(1, round(groups * width))
    changes: dict[str, Any] = {"num_attention_heads": heads // groups * kept, "hidden_size": hidden * kept // groups}
    for key, value in (("num_key_value_heads", kept), ("head_dim", getattr(config, "head_dim", None))):
        if getattr(config, key, None) is not None:
            changes[key] = value
    for key in INNER:
        if isinstance(getattr(config, key, None), int):
            changes[key] = max(1, round(getattr(config, key) * width))
    for key, value in changes.items():
        setattr(config, key, value)


def _taken(module: Any, blocks: Sequence[Block], names: Sequence[str], smaller: Any) -> Mapping[str, torch.Tensor]:
    """Return the state of the smaller model: that of the layer that stands in each place, and of all the rest."""
    state, shapes = module.state_dict(), {name: tensor.shape for name, tensor in smaller.state_dict().items()}
    places = {f"{names[place]}.": f"{block.name}." for place, block in enumerate(blocks)}
    source = {}
    for name in shapes:
        start = next((start for start in places if name.startswith(start)), None)
        source[name] = name if start is None else places[start] + name.removeprefix(start)
    if all(shape == state[source[name]].shape for name, shape in shapes.items()):
        return {name: state[source[name]] for name in shapes}
    cut = _Cut(state, blocks, module.config, smaller.config)
    for place, block in enumerate(blocks):
        of_place = f"{names[place]}."
        cut.add(block, {source[name]: shape for name, shape in shapes.items() if name.startswith(of_place)})
    return {name: cut(source[name], shape) for name, shape in shapes.items()}


@dataclass
class _Cut:
    """Which rows and columns of each tensor are kept: those of the heaviest heads, units and channels, in order."""

    state: Mapping[str, torch.Tensor]
    blocks: Sequence[Block]
    config: Any
    smaller: Any
    axes: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)  # by tensor and axis; else the channels
    hidden: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        for block in self.blocks:
            if block.experts or block.cross_attention_out or not block.attention_out or not block.mlp_out:
                raise RequestError(
                    f"width: {block.name} is more, or less, than an attention and an MLP; choose layers alone"
                )
        self.hidden = _heaviest(sum(self._channels()), self.smaller.hidden_size)  # type: ignore[arg-type]

    def _channels(self) -> Iterator[torch.Tensor]:
        """Yield how much of each matrix, as a share of its squares, goes to or comes from each channel."""
        width = self.config.hidden_size
        for block in self.blocks:
            for part in block.parts:
                weight = self._out_in(part)
                if part.input_dim == width:
                    yield _shares(weight, 0)
                if part.output_dim == width:
                    yield _shares(weight, 1)
        table = next((t for t in self.state.values() if t.ndim == 2 and t.shape[1] == width), None)
        if table is not None:
            yield _shares(table.float(), 0)

    def _out_in(self, part: Part) -> torch.Tensor:
        weight = self.state[part.weight].float()
        return weight.T if part.transposed else weight

    def add(self, block: Block, shapes: Mapping[str, torch.Size]) -> None:
        """Choose the heads and the units of a layer."""
        assert block.attention_out
        assert block.mlp_out
        heads, size = self._heads(block)
        for part in block.attention_in:
            self._write(part, self._rows(part, heads, size))
        self._read(block.attention_out, _spread(self._members(heads), size))
        out = self._out_in(block.mlp_out)
        inner = out.shape[1]
        if any(part.output_dim != inner for part in block.mlp_in):
            raise RequestError(
                f"width: the MLP of {block.name} has its gate and its way in in one; choose layers alone"
            )
        weight = out.square().sum(0)
        for part in block.mlp_in:
            weight = weight * self._out_in(part).square().sum(1)
        kept = shapes[block.mlp_out.weight][0 if block.mlp_out.transposed else 1]
        units = _heaviest(weight, kept)
        for part in block.mlp_in:
            self._write(part, units)
        self._read(block.mlp_out, units)

    def _groups(self) -> tuple[int, int]:
        """How many groups of heads share keys and values, and how many heads each has."""
        heads = self.config.num_attention_heads
        groups = getattr(self.config, "num_key_value_heads", None) or heads
        return groups, heads // groups

    def _heads(self, block: Block) -> tuple[torch.Tensor, int]:
        """Return the groups of heads to keep, and the size of a head."""
        assert block.attention_out
        groups, members = self._groups()
        out = self._out_in(block.attention_out)
        size = out.shape[1] // (groups * members)
        weight = out.square().sum(0).view(groups, -1).sum(1)
        values = self._out_in(block.attention_in[-1])[-groups * size :]
        weight = weight * values.square().sum(1).view(groups, -1).sum(1)
        return _heaviest(weight, self._kept_groups), size

    @property
    def _kept_groups(self) -> int:
        kept: int = getattr(self.smaller, "num_key_value_heads", None) or self.smaller.num_attention_heads
        return kept

    def _members(self, groups: torch.Tensor) -> torch.Tensor:
        """Return the heads of groups."""
        return _spread(groups, self._groups()[1])

    def _rows(self, part: Part, heads: torch.Tensor, size: int) -> torch.Tensor:
        """Return what a way into the attention writes for these heads."""
        groups, members = self._groups()
        own = _spread(self._members(heads), size)
        if part.output_dim == groups * members * size:
            return own
        if part.output_dim == groups * size:
            return _spread(heads, size)
        if part.transposed and part.output_dim == 3 * groups * members * size:  # of GPT-2: queries, keys, values
            return torch.cat([own + third * (part.output_dim // 3) for third in range(3)])
        raise RequestError(f"width: how {part.name} holds its heads is not known; choose layers alone")

    def _write(self, part: Part, kept: torch.Tensor) -> None:
        self.axes.setdefault(part.weight, {})[1 if part.transposed else 0] = kept
        self.axes.setdefault(f"{part.name}.bias", {})[0] = kept

    def _read(self, part: Part, kept: torch.Tensor) -> None:
        self.axes.setdefault(part.weight, {})[0 if part.transposed else 1] = kept

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return what is kept of a tensor."""
        tensor = self.state[name]
        for axis, size in enumerate(shape):
            if tensor.shape[axis] == size:
                continue
            kept = self.axes.get(name, {}).get(axis, self.hidden)
            if len(kept) != size or int(kept[-1]) >= tensor.shape[axis]:
                raise RequestError(f"width: which part of {name} to keep is not known; choose layers alone")
            tensor = tensor.index_select(axis, kept.to(tensor.device))
        return tensor


def _heaviest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of so many of the largest, in their order."""
    return weights.cpu().argsort(descending=True, stable=True)[:count].sort().values


def _shares(weight: torch.Tensor, axis: int) -> torch.Tensor:
    squares = weight.square().sum(axis)
    return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)


def _spread(places: torch.Tensor, size: int) -> torch.Tensor:
    """Return the places of all that lies in runs of one size."""
    return (places[:, None] * size + torch.arange(size)).flatten()
