"""Join language models: two of different tokenizers byte by byte, and several of one vocabulary token by token.

python benchmarks/ensemble_text.py                 train the second model if need be, measure, print
python benchmarks/ensemble_text.py --write         and write benchmarks/ensemble_text.md

The second model is kept in the work folder.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm.models.local import load_model
from lfm.models.ref import ModelRef
from lfm.models.text import Sampling
from lfm.models.writing import ModuleStepper, TextModel, write, write_with
from lfm.reuse.ensemble._bytes import Speller, Spelling
from lfm.reuse.ensemble._stepping import AveragedStepper

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "ensemble_text.md"
TRAINED = 500  # of 600 stories; 6 of the others choose the weight, and others are tested on
VOCABULARY = 1024
WEIGHTS = (0.1, 0.25, 0.5, 0.75, 0.9)
OF = ("probabilities", "logits")


def open_text(folder: Path) -> TextModel:
    """Return a checkpoint as a model of text."""
    model = load_model(ModelRef(ref=str(folder)))
    return TextModel(model.module, model.encoder.tokenizer)


# --- the second model -----------------------------------------------------------------------------------------------


def second(folder: Path, first: TextModel, stories: Sequence[str], seconds: float) -> TextModel:
    """Return a model of a vocabulary of its own: the layers of the first, new embeddings, trained on a few stories."""
    if not folder.is_dir():
        tokenizer = own_tokenizer(stories)
        module = with_vocabulary(first, tokenizer)
        train(module, [tokenizer(story)["input_ids"] + [tokenizer.eos_token_id] for story in stories], seconds)
        tokenizer.save_pretrained(folder)
        module.save_pretrained(folder)
    return open_text(folder)


def own_tokenizer(stories: Sequence[str]) -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def with_vocabulary(first: TextModel, tokenizer: Any) -> Any:
    """Return a copy of the first model in which each new token begins as the mean of its old ones."""
    from copy import deepcopy

    module: Any = deepcopy(first.module)
    old = module.get_input_embeddings().weight.detach().clone()
    module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = module.get_input_embeddings().weight.detach()
    for index in range(len(tokenizer)):
        ids = first.tokenizer(tokenizer.decode([index]), add_special_tokens=False)["input_ids"]
        table[index] = old[ids].mean(0) if ids else old.mean(0)
    for config in (module.config, module.generation_config):
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return module


def train(module: Any, texts: Sequence[list[int]], seconds: float) -> None:
    """Train on windows of 128 tokens for so many seconds of processor time."""
    stream = torch.tensor([token for text in texts for token in text])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.01)
    started, module = time.process_time(), module.train()
    while (share := (time.process_time() - started) / seconds) < 1:
        places = torch.randint(len(stream) - 129, (16,), generator=generator)
        batch = torch.stack([stream[place : place + 129] for place in places.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - share)
        loss = torch.nn.functional.cross_entropy(module(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()


# --- bits per character ---------------------------------------------------------------------------------------------


def said(members: Sequence[Speller], text: str) -> list[tuple[int, list[Any]]]:
    """Return every byte of a text with what each member says of it before it has seen it."""
    spelling, found = Spelling(members, [1.0] * len(members), "probabilities", b""), []
    for byte in text.encode():
        found.append((byte, spelling.each()))
        spelling.push(byte)
    return found


def joined(stories: Sequence[list[tuple[int, list[Any]]]], weights: Sequence[float], of: str) -> float:
    """Return the bits that stories take by the average of what their members said."""
    total = 0.0
    for story in stories:
        each = np.array([members for _, members in story])  # (bytes, members, 257)
        scale = np.array(weights)[None, :, None]
        if of == "probabilities":
            mixed = (each * scale).sum(1)
        else:
            mixed = np.exp((np.log(np.maximum(each, 1e-300)) * scale).sum(1))
            mixed /= mixed.sum(-1, keepdims=True)
        total -= np.log2(mixed[np.arange(len(story)), [byte for byte, _ in story]]).sum()
    return float(total)


def measure_bits(members: Sequence[Speller], chosen: Sequence[str], tested: Sequence[str]) -> dict[str, Any]:
    """Return bits per character alone and together, the weight and the kind of mean chosen on other stories."""
    started = time.perf_counter()
    fit, test = ([said(members, story) for story in stories] for stories in (chosen, tested))
    seconds = time.perf_counter() - started
    characters = sum(map(len, tested))
    best = min(
        ((weight, of) for weight in WEIGHTS for of in OF), key=lambda one: joined(fit, [1 - one[0], one[0]], one[1])
    )
    alone = [joined(test, [float(i == j) for j in range(2)], "probabilities") / characters for i in range(2)]
    even = {of: joined(test, [0.5, 0.5], of) / characters for of in OF}
    picked = joined(test, [1 - best[0], best[0]], best[1]) / characters
    each = seconds / sum(len(text.encode()) for text in [*chosen, *tested])
    return {
        "alone": alone,
        "even": even,
        "chosen": {"weight": best[0], "of": best[1], "bits": picked},
        "stories": len(tested),
        "characters": characters,
        "ms_per_byte": 1000 * each,
    }


# --- throughput -----------------------------------------------------------------------------------------------------


def measure_speed(folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return how long k equal models take beside k times one, by turns, and one beside transformers' generate."""
    models = [open_text(folder) for _ in range(4)]
    found = []
    for prompts in (1, 8):
        asked, how = ["Once upon a time"] * prompts, Sampling(max_new_tokens=tokens)
        lanes: dict[str, Callable[[], Any]] = {
            "generate": lambda asked=asked: generate(models[0], asked, tokens),
            "one": lambda asked=asked, how=how: write(models[0], asked, how, None),
        }
        for k in (2, 4):
            lanes[str(k)] = lambda k=k, asked=asked, how=how: together(models[:k], asked, how)
        times: dict[str, list[float]] = {name: [] for name in lanes}
        for turn in range(rounds + 1):
            for name, lane in lanes.items():
                started = time.process_time()
                lane()
                if turn:  # the first warms up
                    times[name].append(time.process_time() - started)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {k: medians[k] / (int(k) * medians["one"]) for k in ("2", "4")}
        found.append({"prompts": prompts, "tokens": tokens, "seconds": medians, "ratios": ratios})
    return found


def together(models: Sequence[TextModel], prompts: Sequence[str], how: Sampling) -> None:
    stepper = AveragedStepper([ModuleStepper(model.module) for model in models], [1.0] * len(models))
    write_with(stepper, models[0].wording, prompts, how, None)


def generate(model: TextModel, prompts: Sequence[str], tokens: int) -> None:
    inputs = model.tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
    module: Any = model.module
    module.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)


# --- the page -------------------------------------------------------------------------------------------------------


def page(bits: dict[str, Any], speed: Sequence[dict[str, Any]], seconds: float) -> str:
    chosen = bits["chosen"]
    lines = [
        "# Joining language models",
        "",
        "Written by `benchmarks/ensemble_text.py`. One thread.",
        "",
        "## Two tokenizers, byte by byte",
        "",
        f"Bits per character on {bits['stories']} held-out stories ({bits['characters']:,} characters), lower is "
        "better. The first model is stories260k (vocabulary 512). The second has a byte-level vocabulary of "
        f"{VOCABULARY:,} of its own: the first's layers with new embeddings, trained on {TRAINED} stories for "
        f"{seconds:.0f} s of processor time. All numbers sum over tokenisations (8 hypotheses). stories260k was "
        "trained on this kind of stories, perhaps on these.",
        "",
        "| | bits per character |",
        "|---|---|",
        f"| stories260k alone | {bits['alone'][0]:.4f} |",
        f"| second alone | {bits['alone'][1]:.4f} |",
        *(f"| both, equal weights, mean of {of} | {value:.4f} |" for of, value in bits["even"].items()),
        f"| both, second's weight {chosen['weight']} and mean of {chosen['of']}, chosen on other stories | "
        f"{chosen['bits']:.4f} |",
        "",
        f"Reading a byte takes both members {bits['ms_per_byte']:.1f} ms.",
        "",
        "## One vocabulary, token by token",
        "",
        "k copies of stories260k averaged at each token, beside k times one alone: medians of processor time, measured "
        "by turns. `generate` is that of transformers, one model.",
        "",
        "| prompts | tokens | generate, s | one, s | 2, s | 4, s | 2 / (2 x one) | 4 / (4 x one) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in speed:
        times = " | ".join(f"{row['seconds'][name]:.3f}" for name in ("generate", "one", "2", "4"))
        ratios = " | ".join(f"{row['ratios'][name]:.2f}" for name in ("2", "4"))
        lines.append(f"| {row['prompts']} | {row['tokens']} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--assets", type=Path, default=Path(os.environ.get("LFM_ASSETS", ROOT / "../shared/assets")))
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmarks")
    options.add_argument("--seconds", type=float, default=150, help="processor time to train the second model")
    options.add_argument("--stories", type=int, default=20, help="held-out stories that are tested on")
    options.add_argument("--characters", type=int, default=500, help="first characters of each that are read")
    options.add_argument("--rounds", type=int, default=9, help="measurements of each speed")
    options.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    asked = options.parse_args()
    torch.set_num_threads(1)
    base = asked.assets / "checkpoints" / "stories260k"
    stories = json.loads((asked.assets / "data" / "tinystories-600.json").read_text())
    texts = [story if isinstance(story, str) else story["text"] for story in stories]
    first = open_text(base)
    speed = measure_speed(base, 64, asked.rounds)
    print(json.dumps(speed), flush=True)
    other = second(asked.work / f"stories-bpe-{asked.seconds:.0f}", first, texts[:TRAINED], asked.seconds)
    held = [text.strip()[: asked.characters] for text in texts[TRAINED:]]
    bits = measure_bits([Speller(first), Speller(other)], held[:6], held[20 : 20 + asked.stories])
    made = page(bits, speed, asked.seconds)
    print(made)
    if asked.write:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
