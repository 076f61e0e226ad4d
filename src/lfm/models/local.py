"""Models in this process: any transformers model, and any torch module with a state dict."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lfm.checkpoint import (
    Checkpoint,
    MemoryWeights,
    OutputFolder,
    Patched,
    Spec,
    Weights,
    dtype_name,
    open_checkpoint,
    read_json,
    torch_dtype,
)
from lfm.errors import LfmError, RequestError, did_you_mean
from lfm.method import Access
from lfm.models.anatomy import anatomy
from lfm.models.encode import Batch, Encoder, inputs_of
from lfm.models.handle import Model
from lfm.models.ref import ImageSpec, ModelRef, Task
from lfm.recipe.step import Outline

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


class LocalBackend:
    """A module in memory."""

    offers = Access.WEIGHTS

    def __init__(self, module: nn.Module, tokenizer: Any) -> None:
        self.module = module
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def logits(self, batch: Batch) -> torch.Tensor:
        self.module.eval()
        with torch.no_grad():  # not inference_mode: a student may learn from what comes out
            inputs = {name: value.to(self.device) for name, value in inputs_of(batch).items()}
            return forward(self.module, inputs).float()

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        if self._tokenizer is None or not hasattr(self.module, "generate"):
            raise RequestError("this model does not write text")
        self.module.eval()
        generate: Any = self.module.generate
        answers = []
        for prompt in prompts:
            ids = torch.tensor([self._tokenizer(prompt, verbose=False)["input_ids"]], dtype=torch.long)
            if not ids.numel():
                raise RequestError("an empty prompt is nothing to go on from: the tokenizer marks no beginning")
            ids = ids.to(self.device)
            with torch.inference_mode(), _quiet_transformers():
                made = generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
                )
            answers.append(self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return answers


def forward(module: nn.Module, inputs: Batch) -> torch.Tensor:
    """Return a module's logits: a transformers model takes named inputs, a plain module its one input."""
    if hasattr(module, "save_pretrained"):
        logits: torch.Tensor = module(**inputs).logits
        return logits
    made = module(next(iter(inputs.values())))
    plain: torch.Tensor = made if isinstance(made, torch.Tensor) else made.logits
    return plain


# --- loading --------------------------------------------------------------------------------------------------------


def load_model(
    ref: ModelRef,
    *,
    access: Access = Access.WEIGHTS,
    task: Task | None = None,
    classes: Mapping[str, int] | None = None,
    new_head: bool = False,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> Model:
    """Load a model into memory, in float32 and evaluation mode.

    `classes` gives a classifier its classes (label to index) where it has none, or in place of its own with
    `new_head`; new weights are drawn from `seed`. Raises RequestError for models that cannot be loaded or do not fit.
    """
    if ref.module:
        module, task, encoder = _plain_module(ref, task or ref.task, classes, new_head, seed, allow_pickle)
    else:
        module, task, encoder = _transformers_model(ref, task or ref.task, classes, new_head, seed, allow_pickle)
    try:
        module = module.float().eval().to(device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise RequestError(f"{ref.label}: cannot be moved to {device}: {_first_line(error)}") from None
    return Model(LocalBackend(module, encoder.tokenizer), access, task, encoder, ref.label)


def outline_new(ref: ModelRef) -> Outline:
    """Return what a model that is yet to be made will look like, without making it."""
    with torch.device("meta"), _quiet_transformers():
        if ref.module:
            module = _build_plain(ref)
            config = None
        else:
            made = _config(ref)
            module = _auto_class(_task(ref.task, made, ref)).from_config(made)
            config = made.to_dict() | {"architectures": [type(module).__name__]}
    specs = {name: Spec(dtype_name(t.dtype), tuple(t.shape)) for name, t in unique_tensors(module).items()}
    return Outline(ref, specs, config)


def unique_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's state dict with every shared (tied) tensor once, under the first of its names."""
    first: dict[int, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        first.setdefault(id(tensor), name)
    own = set(first.values())
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in own}


def _transformers_model(
    ref: ModelRef, task: Task | None, classes: Mapping[str, int] | None, new_head: bool, seed: int, allow_pickle: bool
) -> tuple[nn.Module, Task, Encoder]:
    checkpoint = open_checkpoint(ref.ref, allow_pickle=allow_pickle) if ref.ref else None
    config = _config(ref, checkpoint)
    task = _task(task, config, ref)
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
    return module, task, Encoder(task, tokenizer, image, own, _context(module, config), pad or 0)


def _context(module: nn.Module, config: Any) -> int | None:
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
    cls = _auto_class(task)
    report: dict[str, Any] = {}
    with _seeded(seed), _quiet_transformers():
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
                f"{ref.label}: transformers cannot load it: {_first_line(error)}{_own_code(config)}"
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


def _auto_class(task: Task) -> Any:
    return getattr(importlib.import_module("transformers"), AUTO_CLASSES[task])


def _config(ref: ModelRef, checkpoint: Checkpoint | None = None) -> Any:
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


def _task(asked: Task | None, config: Any, ref: ModelRef) -> Task:
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
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise RequestError(f"{ref.label}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


# --- plain modules --------------------------------------------------------------------------------------------------


def _plain_module(
    ref: ModelRef, task: Task | None, classes: Mapping[str, int] | None, new_head: bool, seed: int, allow_pickle: bool
) -> tuple[nn.Module, Task, Encoder]:
    with _seeded(seed):
        module = _build_plain(ref)
    saved: dict[str, int] = {}
    if ref.ref:
        checkpoint = open_checkpoint(ref.ref, allow_pickle=allow_pickle)
        saved = (checkpoint.config or {}).get("label2id", {})
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.specs}
        if not new_head:
            _fit_head(module, tensors)
        names = set(tensors)
        _add_counters(module, tensors)
        mismatch = _state_problems(module, tensors)
        if mismatch:
            raise RequestError(f"{ref.label}: does not fit the module of {ref.module}:", *mismatch)
        module.load_state_dict(tensors)
        _drop_counters(module, names)
    head = anatomy(module).head
    if head is None:
        raise RequestError(f"{ref.label}: no output layer found in the module of {ref.module}")
    if classes is not None and new_head:
        with _seeded(seed):
            _replace_head(module, head, len(classes))
    count = _classes(module, head)
    own = classes if classes is not None and new_head else saved or {str(index): index for index in range(count)}
    task = task or "image-classification"
    return module, task, Encoder(task, None, ref.image, own)


def _counters(module: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    """Yield the batch norms by the name of their count of batches, which weights from early torch do not have."""
    for name, part in module.named_modules():
        if isinstance(part, _NormBase) and part.momentum and part.num_batches_tracked is not None:
            yield f"{name}.num_batches_tracked".lstrip("."), part


def _add_counters(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, _ in _counters(module):
        tensors.setdefault(name, torch.tensor(0))


def _drop_counters(module: nn.Module, names: Set[str]) -> None:
    """Let batch norms do without a count that was not in the file: what is saved merges with what was loaded."""
    for name, part in list(_counters(module)):
        if name not in names:
            part.num_batches_tracked = None


def _fit_head(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the module the number of classes that its weights have: a head may have been replaced when it was tuned."""
    head = anatomy(module).head
    weight = tensors.get(f"{head}.weight")
    if head and weight is not None and weight.shape[0] != _classes(module, head):
        _replace_head(module, head, weight.shape[0])


def _classes(module: nn.Module, head: str) -> int:
    weight = module.get_submodule(head).weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _replace_head(module: nn.Module, head: str, count: int) -> None:
    old = module.get_submodule(head)
    if not isinstance(old, nn.Linear):
        raise RequestError(f"the output layer {head} is a {type(old).__name__}; only a Linear can be replaced")
    parent, _, name = head.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Linear(old.in_features, count, bias=old.bias is not None))


def _build_plain(ref: ModelRef) -> nn.Module:
    """Run the code that the user named; it is the only code of theirs that is ever run."""
    place, _, name = str(ref.module).rpartition(":")
    if not place:
        raise RequestError(f"module: {ref.module}: write `path/file.py:function` or `package.module:function`")
    if place.endswith(".py") and not Path(place).is_file():
        raise RequestError(f"module: {place}: no such file")
    try:
        found = _run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever their code raises
        raise RequestError(f"module: {place}: {type(error).__name__}: {_first_line(error)}") from error
    build = getattr(found, name, None)
    if not callable(build):
        raise RequestError(f"module: {place} has no {name!r}{did_you_mean(name, vars(found))}")
    try:
        inspect.signature(build).bind(**ref.arguments)
    except TypeError as error:
        raise RequestError(f"module: {ref.module}: {error}; say so under `arguments`") from None
    try:
        module = build(**ref.arguments)
    except Exception as error:  # whatever their code raises
        raise RequestError(f"module: {ref.module}: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise RequestError(f"module: {ref.module} returned {type(module).__name__}, not a torch module")
    return module


def _run_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, which dataclasses and their kind look up while it is run."""
    name = f"lfm_module_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _state_problems(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    state = module.state_dict()
    problems = [f"the weights lack {name!r}" for name in state if name not in tensors]
    problems += [f"the module has no {name!r}" for name in tensors if name not in state]
    problems += [
        f"{name!r} is {list(tensors[name].shape)} in the weights and {list(tensor.shape)} in the module"
        for name, tensor in state.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    rest = len(problems) - 8
    return problems[:8] + ([f"and {rest:,} more"] if rest > 0 else [])


# --- saving ---------------------------------------------------------------------------------------------------------


def save_model(model: Model, folder: OutputFolder, dtype: torch.dtype | None) -> tuple[str, dict[str, str]]:
    """Write a model with everything that it needs into an output folder; returns digest and tensor digests.

    Floating-point weights are cast to `dtype` where one is given; the model itself stays as it is.
    """
    module, own = model.module, hasattr(model.module, "save_pretrained")
    weights: Weights = _renamed(module, folder, dtype) if own else MemoryWeights(unique_tensors(module))
    specs = {
        name: Spec(dtype_name(dtype), spec.shape) if dtype is not None and spec.floating else spec
        for name, spec in weights.specs.items()
    }
    writer = folder.tensors(specs)
    for name, spec in specs.items():
        for _, part in weights.chunks(name, 1 << 20):
            cast = part.to(torch_dtype(spec.dtype))
            if spec.floating and not torch.isfinite(cast).all():
                raise LfmError(f"tensor {name!r} holds NaN or Inf after training; lower the learning rate")
            writer.write(name, cast)
    digest = writer.finish()
    encoder = model.encoder
    if encoder.tokenizer is not None:
        encoder.tokenizer.save_pretrained(folder.partial)
    if encoder.image is not None and own:
        folder.write_json("preprocessor_config.json", _preprocessor(encoder.image))
    classes = dict(encoder.classes or {})
    if not own and classes != {str(index): index for index in range(len(classes))}:
        names = {str(index): name for name, index in classes.items()}
        folder.write_json("config.json", {"id2label": names, "label2id": classes})
    return digest, writer.digests()


def _renamed(module: Any, folder: OutputFolder, dtype: torch.dtype | None) -> Weights:
    """Let transformers save, which knows how its names in memory map to those on disk; only the weights are left."""
    draft = folder.resume / "saved"
    shutil.rmtree(draft, ignore_errors=True)
    with _quiet_transformers():
        module.save_pretrained(draft)
    for path in sorted(draft.glob("*config.json")):
        content = read_json(path)
        if dtype is not None and "dtype" in content:
            content["dtype"] = str(dtype).removeprefix("torch.")
        folder.write_json(path.name, content)
    return open_checkpoint(draft).weights


def _preprocessor(image: ImageSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*image.mean] * (image.channels // len(image.mean)),
        "image_std": [*image.std] * (image.channels // len(image.std)),
    }


# --- surroundings ---------------------------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from `seed`, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the library's bars and remarks off stderr; what matters of them is said by us."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


__all__ = ["LocalBackend", "forward", "load_model", "outline_new", "save_model", "unique_tensors"]
