"""What was written is looked at before it gets its name: does it go with its config, and does it load?

Finite numbers are seen to while they are written, and files are read back by the writer. A merge whose tensors have the
names and shapes of a model that was there before loads as that one does; only where they differ is the model built, on
torch's meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm.checkpoint import Spec
from lfm.reuse.merge._layout import first_few


def changed(specs: Mapping[str, Spec], before: Mapping[str, Spec]) -> bool:
    """Whether there are tensors of other names or shapes than before."""
    return {name: spec.shape for name, spec in specs.items()} != {name: spec.shape for name, spec in before.items()}


def config_problems(specs: Mapping[str, Spec], config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what keeps tensors from being loaded with a config, and remarks, such as that nobody can tell."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected, tied = _expected(config)
        except Exception as error:  # whatever transformers objects to in a stranger's config
            return [], [f"not checked whether it loads: {type(error).__name__}: {str(error).splitlines()[0][:150]}"]
    missing = [f"config.json asks for {name!r}, which is not there" for name in expected if name not in {*specs, *tied}]
    extra = [f"config.json has no place for {name!r}" for name in specs if name not in expected]
    shapes = [
        f"tensor {name!r} is {list(specs[name].shape)}, config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in specs and tuple(shape) != specs[name].shape
    ]
    return [line for lines in (missing, shapes, extra) for line in first_few(lines)], []


def _expected(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the tensors that a model of this config has, and which of them need not be stored."""
    import torch
    import transformers

    made = transformers.AutoConfig.for_model(**config)
    [architecture] = config.get("architectures") or ["AutoModel"]
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind.from_config(made) if architecture == "AutoModel" else kind(made)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tied
