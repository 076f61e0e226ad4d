"""A smaller model made from a larger one: some of its layers, a part of its width."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lfm.errors import RequestError
from lfm.method import Access
from lfm.models._surroundings import quiet_transformers, seeded
from lfm.models.anatomy import anatomy
from lfm.models.handle import Model
from lfm.models.local import LocalBackend

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def shrink(model: Model, *, layers: int | None = None, weights: bool = True, seed: int = 0) -> Model:
    """Return a new model with so many of the layers, spread evenly from the first to the last.

    Its other parts, and with `weights` its layers, are copies of the model's; otherwise they are drawn from `seed`.
    Raises RequestError for what is no transformers model, and for more layers than there are.
    """
    module: Any = model.module
    names = [block.name for block in anatomy(module).blocks]
    if not hasattr(module, "config") or not names:
        raise RequestError(f"{model.label}: a student is made from transformers models with layers; name one instead")
    if layers is None or not 0 < layers <= len(names):
        raise RequestError(f"{model.label}: has {len(names)} layers, and {layers} were asked for")
    chosen = evenly(len(names), layers)
    config = _fewer_layers(module.config, len(names), chosen)
    with seeded(seed), quiet_transformers():
        smaller = type(module)(config)
    if weights:
        smaller.load_state_dict(_taken(module, names, chosen, smaller))
    smaller = smaller.float().eval().to(next(module.parameters()).device)
    label = f"{model.label} ({layers} layers)"
    return Model(LocalBackend(smaller, model.encoder.tokenizer), Access.WEIGHTS, model.task, model.encoder, label)


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


def _taken(
    module: nn.Module, names: Sequence[str], chosen: Sequence[int], smaller: nn.Module
) -> Mapping[str, torch.Tensor]:
    """Return the state of the smaller model: that of the layer that stands in each place, and of all the rest."""
    state, found = module.state_dict(), {}
    places = {f"{names[place]}.": f"{names[layer]}." for place, layer in enumerate(chosen)}
    for name in smaller.state_dict():
        place = next((place for place in places if name.startswith(place)), None)
        found[name] = state[name if place is None else places[place] + name.removeprefix(place)]
    return found
