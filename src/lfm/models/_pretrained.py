"""Models of the transformers library: their config, task, classes, tokenizer and image format, and loading them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from lfm.checkpoint import (
    Checkpoint,
    MemoryWeights,
    Patched,
    open_checkpoint,
    read_json,
)
from lfm.errors import RequestError, did_you_mean
from lfm.models._surroundings import first_line, quiet_transformers, seeded
from lfm.models.anatomy import anatomy
from lfm.models.encode import Encoder
from lfm.models.ref import ImageSpec, ModelRef, Task

LOG = logging.getLogger("lfm")
AUTO_CLASSES: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
ENDINGS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}


def pretrained_model(
    ref: ModelRef, task: Task | None, classes: Mapping[str, int] | None, new_head: bool, seed: int, allow_pickle: bool
) -> tuple[nn.Module, Task, Encoder]:
    checkpoint = open_checkpoint(ref.ref, allow_pickle=allow_pickle) if ref.ref else None
    config = config_of(ref, checkpoint)
    task = task_of(task, config, ref)
    if task.endswith("classification"):
        config, own = _with_classes(config, task, classes, new_head, ref, checkpoint)
    else:
        own = None
    folder = checkpoint.folder if checkpoint else None
    tokenizer = _tokenizer(ref, folder, task)
    if task == "text-classification" and config.pad_token_id is None:
        # A decoder that classifies looks at the last token, which it finds by what padding is made of.
        ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        config.pad_token_id = next((found for found in ids if found is not None), 0)
    module = _made(ref, task, config, checkpoint, new_head, seed)
    image = (ref.image or _image_spec(config, folder)) if task == "image-classification" else None
    if tokenizer is not None and (ref.tokenizer or ref.config) and len(tokenizer) > config.vocab_size:
        raise RequestError(
            f"{ref.label}: its tokenizer has {len(tokenizer):,} tokens, and its vocab_size is {config.vocab_size:,}"
        )
    pad = getattr(config, "pad_token_id", None)
    return module, task, Encoder(task, tokenizer, image, own, context_of(module, config), pad or 0)


def context_of(module: nn.Module, config: Any) -> int | None:
    """Return how many tokens a model takes; tables of positions that begin behind padding have fewer than rows."""
    found = [
        table.num_embeddings - table.padding_idx - 1
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None
    ]
    return min([*found, *filter(None, [getattr(config, "max_position_embeddings", None)])], default=None)


def _made(
    ref: ModelRef, task: Task, config: Any, checkpoint: Checkpoint | None, new_head: bool, seed: int
) -> nn.Module:
    """Make the module of a config and fill it with the weights of a checkpoint, if there is one."""
    cls = auto_class(task)
    report: dict[str, Any] = {}
    with seeded(seed), quiet_transformers():
        try:
            if checkpoint is None:
                module: nn.Module = cls.from_config(config, dtype=torch.float32, trust_remote_code=False)
            else:
                options = {
                    "config": config,
                    "dtype": torch.float32,
                    "ignore_mismatched_sizes": new_head,
                    "output_loading_info": True,
                    "trust_remote_code": False,
                }
                if isinstance(checkpoint.weights, (Patched, MemoryWeights)):
                    tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs}
                    with torch.device("meta"):
                        made = type(cls.from_config(config, trust_remote_code=False))  # the Auto classes want a folder
                    module, report = made.from_pretrained(None, state_dict=tensors, **options)
                    _read_generation_config(module, checkpoint.folder)
                else:
                    module, report = cls.from_pretrained(checkpoint.folder, **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RequestError(
                f"{ref.label}: transformers cannot load it: {first_line(error)}{_own_code(config)}"
            ) from error
        if checkpoint is not None:
            _check_filled(module, report, ref, new_head or task not in _trained_for(config))
            if new_head and task in _trained_for(config):
                _renew_head(module, config)
    return module


def _read_generation_config(module: Any, folder: Path) -> None:
    """Do what transformers does with a folder, and not with a state dict."""
    if module.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        module.generation_config = GenerationConfig.from_pretrained(folder)


def _own_code(config: Any) -> str:
    brings = getattr(config, "auto_map", None)
    return "; it brings code of its own, which is not run" if brings else ""


def _check_filled(module: nn.Module, report: Mapping[str, Any], ref: ModelRef, head_is_new: bool) -> None:
    """Refuse what transformers fills with random numbers without a word, all but the layers of a new head.

    Weights that find no place are told; those of an old head are meant to be left behind.
    """
    drawn = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if head_is_new:
        found = anatomy(module)
        drawn = [name for name in drawn if found.block_of(name) is not None or found.depth(name) == 0]
    if drawn:
        more = f" and {len(drawn) - 8:,} more" if len(drawn) > 8 else ""
        raise RequestError(f"{ref.label}: its weights lack {', '.join(drawn[:8])}{more}, or have them in other shapes")
    stacks = tuple({f"{block.stack}." for block in anatomy(module).blocks})
    unused = [name for name in sorted(report["unexpected_keys"]) if not head_is_new or name.startswith(stacks)]
    if unused:
        more = f" and {len(unused) - 8:,} more" if len(unused) > 8 else ""
        LOG.warning("warning: %s: weights without a place in the model: %s%s", ref.label, ", ".join(unused[:8]), more)


def _renew_head(module: nn.Module, config: Any) -> None:
    """Draw the output layer anew, also where the old one has the same shape."""
    head = anatomy(module).head
    layer = module.get_submodule(head) if head else None
    if not isinstance(layer, nn.Linear):
        raise RequestError("the model has no single output layer that could be replaced")
    nn.init.normal_(layer.weight, std=getattr(config, "initializer_range", 0.02))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def auto_class(task: Task) -> Any:
    return getattr(importlib.import_module("transformers"), AUTO_CLASSES[task])


def config_of(ref: ModelRef, checkpoint: Checkpoint | None = None) -> Any:
    """Return the transformers config of a model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if checkpoint is not None:
        content = checkpoint.config
        if content is None:
            raise RequestError(
                f"{ref.label}: has weights and no config.json; if it is a plain torch module, name the code that "
                "builds it (`module: file.py:function`, or --module)"
            )
    else:
        content = ref.config if isinstance(ref.config, dict) else read_json(Path(str(ref.config)))
    settings = dict(content)
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str):
        raise RequestError(f"{ref.label}: its config names no model_type")
    if kind not in CONFIG_MAPPING:
        code = "; it brings code of its own, which is not run" if "auto_map" in settings else ""
        hint = code or did_you_mean(kind, CONFIG_MAPPING)
        raise RequestError(f"{ref.label}: transformers knows no model_type {kind!r}{hint}")
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:  # each model has checks of its own
        raise RequestError(f"{ref.label}: its config is not valid: {' '.join(str(error).split())}") from None


def task_of(asked: Task | None, config: Any, ref: ModelRef) -> Task:
    """Return what the model is for: as asked, or as the class names in its config end."""
    found = asked or next(iter(_trained_for(config)), None)
    both_halves = getattr(config, "is_encoder_decoder", False)
    if found is not None and not (both_halves and found in ("causal-lm", "masked-lm")):
        return found
    if both_halves:
        raise RequestError(
            f"{ref.label}: is an encoder-decoder ({', '.join(config.architectures or [config.model_type])}), "
            f"which can be merged but neither run nor trained; what can: {', '.join(get_args(Task))}"
        )
    raise RequestError(
        f"{ref.label}: its config does not say what it is for ({config.architectures or 'no architectures'}); "
        f"give it a task: {', '.join(get_args(Task))}"
    )


def _trained_for(config: Any) -> list[Task]:
    names = config.architectures or ()
    return [task for name in names for ending, task in ENDINGS.items() if name.endswith(ending)]


def _with_classes(
    config: Any,
    task: Task,
    classes: Mapping[str, int] | None,
    new_head: bool,
    ref: ModelRef,
    checkpoint: Checkpoint | None,
) -> tuple[Any, Mapping[str, int]]:
    """Return the config with the classes that the model will have: its own, or the given ones with a new head."""
    has_head = checkpoint is not None and task in _trained_for(config)
    if classes is not None and (new_head or not has_head):
        config.label2id = dict(classes)
        config.id2label = {index: name for name, index in classes.items()}
        return config, classes
    names = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    if set(names) == {f"LABEL_{index}" for index in range(len(names))}:  # the library's placeholder: numbers are names
        names = {str(index): index for index in range(len(names))}
    return config, names


def _image_spec(config: Any, folder: Path | None) -> ImageSpec:
    """Return the input format from preprocessor_config.json, or from the config with mean and deviation 0.5."""
    path = folder / "preprocessor_config.json" if folder else None
    saved = read_json(path) if path is not None and path.is_file() else {}
    size = saved.get("size", getattr(config, "image_size", None))
    if saved.get("do_center_crop"):
        size = saved.get("crop_size", size)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, (list, tuple)):
        size = size[0]
    channels = getattr(config, "num_channels", 3)
    if not isinstance(size, int) or channels not in (1, 3):
        raise RequestError("the size of the model's images is not in its files; give it `image: {size: ...}`")
    neutral = [0.5] * channels
    mean, std = saved.get("image_mean", neutral), saved.get("image_std", neutral)
    if saved.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    return ImageSpec(size=size, channels=channels, mean=tuple(mean), std=tuple(std))


def _tokenizer(ref: ModelRef, folder: Path | None, task: Task) -> Any:
    """Return the model's tokenizer, or None for models that read no text or bring none."""
    if task == "image-classification":
        return None
    from transformers import AutoTokenizer

    if ref.tokenizer == "bytes":
        return byte_tokenizer()
    source = ref.tokenizer or folder
    if source is None or (
        isinstance(source, Path) and not any(any(source.glob(name)) for name in ("*token*", "vocab*", "*.model"))
    ):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise RequestError(f"{ref.label}: its tokenizer cannot be loaded: {first_line(error)}") from error


def byte_tokenizer() -> Any:
    """Return a tokenizer of the 256 bytes of UTF-8, and one token that ends a text: nothing to train or load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*alphabet, end])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end)
