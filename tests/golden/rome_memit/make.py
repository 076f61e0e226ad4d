"""Writes results.json: an update each by the authors' ROME and MEMIT, for keys, values and statistics from a seed.

Run as `python make.py ROME MEMIT`, with checkouts of kmeng01/rome (0874014) and kmeng01/memit (80426fd). Their code is
run as it stands, on the CPU instead of CUDA; what it searches, samples and downloads is put in from outside: contexts,
values, C. Tokens of the tiny model are words, so that nothing depends on a downloaded tokenizer.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).parent
FACTS = [("Ada Byron was born in", "Ada Byron", "Rome"), ("The home of Alan Turing is", "Alan Turing", "Paris")]
CONTEXTS = ["It is said . ", "Paris was born . "]
WIDTH, INNER, SEED, LAYERS, LAMBDA = 16, 64, 5, (1, 2), 7.0


def model_and_words(folder: str):
    """Save a random GPT-2 of three blocks, whose tokens are the words of the facts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    texts = [*CONTEXTS, *(f"{prompt} {target} is a" for prompt, _, target in FACTS)]
    words = sorted({word for text in texts for word in text.split()})
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *words])}, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(SEED)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=len(words) + 1, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32, **ends)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that subjects differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def given() -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Return C (64, 64) of each block, and a value (16,) for each fact."""
    generator = torch.Generator().manual_seed(SEED)
    roots = {layer: torch.randn(INNER, 3 * INNER, generator=generator) for layer in LAYERS}
    return {n: r @ r.T / r.shape[1] for n, r in roots.items()}, 3 * torch.randn(len(FACTS), WIDTH, generator=generator)


def _authors(folder: str, name: str):
    """Make a copy of a checkout that runs on the CPU importable."""
    import shutil

    place = Path(tempfile.mkdtemp()) / name
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("notebooks", ".git"))
    for file in place.rglob("*.py"):
        file.write_text(file.read_text().replace('"cuda"', '"cpu"'))
    for module in [one for one in sys.modules if one.split(".")[0] in ("rome", "memit", "util")]:
        del sys.modules[module]
    # Downloads, plots and settings files, none of which an update takes.
    sys.modules["datasets"] = SimpleNamespace(load_dataset=None)
    sys.modules["matplotlib"] = SimpleNamespace(style=None)
    sys.modules["matplotlib.style"] = SimpleNamespace(context=None)
    sys.modules["util.globals"] = SimpleNamespace(STATS_DIR=place)
    sys.modules["util.generate"] = SimpleNamespace(generate_fast=None)
    sys.modules["rome.layer_stats"] = SimpleNamespace(layer_stats=None)
    sys.path.insert(0, str(place))
    return place


class _Given:
    """Stands where the authors' Adam does: its first step goes to the given value."""

    def __init__(self, parameters, lr):
        [self._delta] = parameters

    def zero_grad(self):
        pass

    def step(self):
        self._delta.data.copy_(_Given.delta)


def _settings(**more):
    return SimpleNamespace(
        fact_token="subject_last", rewrite_module_tmp="transformer.h.{}.mlp.c_proj",
        layer_module_tmp="transformer.h.{}", mlp_module_tmp="transformer.h.{}.mlp",
        mom2_adjustment=True, mom2_dataset="", mom2_n_samples=0, mom2_dtype="",
        v_loss_layer=2, v_lr=0.5, v_num_grad_steps=2, kl_factor=0.0, v_weight_decay=0.5, clamp_norm_factor=1e9,
        context_template_length_params=[], **more,
    )  # fmt: skip


def _requests():
    return [
        {"prompt": prompt.replace(subject, "{}"), "subject": subject, "target_new": {"str": " " + target}}
        for prompt, subject, target in FACTS
    ]


def _rome(folder, model, tokenizer, covariances, values):
    _authors(folder, "rome_code")
    from rome import rome_main

    sys.modules["rome.compute_u"].get_inv_cov = lambda *_: torch.inverse(covariances[1])
    rome_main.get_context_templates = lambda *_: ["{}", *(one + "{}" for one in CONTEXTS)]
    compute = sys.modules["rome.compute_v"]
    names = {name: getattr(torch, name) for name in dir(torch)}
    compute.torch = SimpleNamespace(**names | {"optim": SimpleNamespace(Adam=_Given)})
    place = [len(tokenizer(FACTS[0][1])["input_ids"]) - 1]
    with torch.no_grad():
        seen = []
        handle = model.transformer.h[1].mlp.register_forward_hook(lambda _, __, out: seen.append(out[0, place[0]]))
        model(**tokenizer(FACTS[0][0], return_tensors="pt"))
        handle.remove()
    _Given.delta = values[0] - seen[0]
    [(u, v)] = rome_main.execute_rome(model, tokenizer, _requests()[0], _settings(layers=[1])).values()
    return torch.outer(u, v)


def _memit(folder, model, tokenizer, covariances, values):
    _authors(folder, "memit_code")
    from memit import memit_main

    memit_main.get_cov = lambda m, t, name, *_, **__: covariances[int(name.split(".")[2])]
    memit_main.get_context_templates = lambda *_: [["{}"], [one + "{}" for one in CONTEXTS]]
    rows = iter(values)
    memit_main.compute_z = lambda *_: next(rows)
    model.config._name_or_path = "tiny"
    settings = _settings(layers=list(LAYERS), mom2_update_weight=LAMBDA)
    deltas = memit_main.execute_memit(model, tokenizer, _requests(), settings)
    return [(keys @ residuals.T) for keys, residuals in deltas.values()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = model_and_words(folder)
    covariances, values = given()
    model.requires_grad_(True)
    rome = _rome(sys.argv[1], model, tokenizer, covariances, values)
    memit = _memit(sys.argv[2], model, tokenizer, covariances, values)
    rounded = [[[round(x, 7) for x in row] for row in one.tolist()] for one in (rome, *memit)]
    found = {"rome": rounded[0], "memit": rounded[1:]}
    (HERE / "results.json").write_text(json.dumps(found) + "\n")
