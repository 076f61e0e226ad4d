"""Every measure against the slow and obvious way to get it, and real checkpoints against published numbers."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tests.tiny import write_llama
from torch.nn import functional

import lfm
from lfm.api import measure_models
from lfm.evaluate.intervals import calibration_error, exponential, mean, percent, ratio, share
from lfm.recipe.step import Settings
from lfm.report import Estimate

DIGITS = {"path": "sklearn:digits", "part": "held_out"}
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_labels": 10,
}
LINES = ["Once upon a time.", "There was a cat, and it was grey.", "Ünïcode 🐈", "The end. " * 20]


def measured(models, **measures):
    """Return the one estimate by (metric, unit) and model."""
    found = lfm.evaluate(models, measures, settings=Settings(quiet=True))
    return {(item.metric, item.unit): item.estimates for item in found}


def notes(models, **measures):
    return measure_models(models, measures, Settings(quiet=True))[2].notes


def only(estimates):
    [estimate] = estimates.values()
    return estimate


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in LINES), encoding="utf-8")
    return str(path)


@pytest.fixture
def writer(tmp_path):
    """Return a byte-level language model: its reference, and the module and tokenizer behind it."""

    def make(seed=0, name="model"):
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 257,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "initializer_range": 0.5,
            "bos_token_id": None,
            "eos_token_id": 256,
        }
        from transformers import AutoModelForCausalLM, LlamaConfig

        from lfm.models.local import byte_tokenizer

        config.pop("model_type")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = AutoModelForCausalLM.from_config(LlamaConfig(**config)).eval()
        folder = tmp_path / f"{name}{seed}"
        module.save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder)
        return str(folder), module, tokenizer

    return make


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share_has_wilsons_interval(hits, n, low, high):
    found = share(hits, n)
    assert found.value == hits / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = share(n - hits, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_a_ratio_covers_what_it_estimates_95_times_in_100():
    chance = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        counts = chance.integers(5, 60, 200)
        sums = np.array([chance.exponential(2.0, count).sum() for count in counts])
        found = ratio(sums, counts)
        inside += found.low <= 2.0 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_mean_has_the_interval_of_its_standard_error_and_one_value_has_none():
    values = np.random.default_rng(1).normal(3.0, 2.0, 50)
    found = mean(values)
    half = 1.959963984540054 * values.std(ddof=1) / math.sqrt(50)
    middle = values.mean()
    assert (found.value, found.low, found.high) == pytest.approx((middle, middle - half, middle + half))
    assert mean(values[:1]) == Estimate(values[0], None, None, 1)


def test_intervals_shrink_with_the_square_root_of_the_size():
    values = np.random.default_rng(2).normal(0, 1, 6400)
    wide, narrow = mean(values[:400]), mean(values)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.1)
    assert (share(40, 100).high - share(40, 100).low) > 3 * (share(640, 1600).high - share(640, 1600).low)


def test_exponentials_and_percentages_carry_their_intervals():
    assert percent(Estimate(0.5, 0.25, None, 4)) == Estimate(50, 25, None, 4)
    assert exponential(Estimate(0.0, -1.0, 1.0, 4)) == Estimate(1.0, math.exp(-1), math.e, 4)
    assert math.isfinite(exponential(Estimate(1e9)).value)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_bin_by_bin():
    def error(confidence, correct, **options):
        return calibration_error(np.array(confidence), np.array(correct, dtype=float), **options)

    assert error([1.0, 1.0], [1, 1]) == 0
    assert error([1.0, 1.0], [0, 0]) == 1
    assert error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)
    assert error([0.6, 0.6, 0.9, 0.9], [0, 1, 1, 1], bins=2) == pytest.approx(0.0)  # 0.75 sure, 0.75 right
    assert error([0.6, 0.6, 0.9, 0.9], [0, 1, 1, 1], bins=10) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    assert error([0.2, 0.95], [1, 0]) == pytest.approx(0.5 * 0.8 + 0.5 * 0.95)


def test_calibration_error_agrees_with_a_loop():
    chance = np.random.default_rng(3)
    confidence, correct = chance.uniform(0.1, 1, 500), chance.integers(0, 2, 500).astype(float)
    expected = 0.0
    for place in range(15):
        inside = (confidence >= place / 15) & (confidence < (place + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct) == pytest.approx(expected)


# --- classifiers ----------------------------------------------------------------------------------------------------


def test_accuracy_nll_and_calibration_are_what_a_loop_over_the_images_finds():
    from transformers import AutoModelForImageClassification, ViTConfig

    from lfm.data import DataSpec, read

    found = measured([{"config": VIT}], accuracy=DIGITS, batch_size=7)
    rows = read(DataSpec.model_validate(DIGITS))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {key: value for key, value in VIT.items() if key != "model_type"}
        module = AutoModelForImageClassification.from_config(ViTConfig(**settings)).eval()
    hits, nll, sure = [], [], []
    for image, label in zip(rows.columns["image"], rows.columns["label"], strict=True):
        pixels = (torch.tensor(image).float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            probs = module(pixel_values=pixels[None, None]).logits[0].softmax(-1).double()
        hits.append(int(probs.argmax()) == int(label))
        nll.append(-math.log(probs[int(label)]))
        sure.append(float(probs.max()))
    accuracy = only(found["accuracy", "%"])
    assert (accuracy.value, accuracy.n) == (100 * sum(hits) / len(hits), len(hits))
    assert only(found["NLL", "nats"]).value == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    expected = calibration_error(np.array(sure), np.array(hits, dtype=float))
    assert only(found["ECE", "%"]).value == pytest.approx(100 * expected, abs=1e-3)


def test_what_cannot_be_measured_is_noted_and_the_rest_goes_on(writer, texts, tmp_path):
    folder, *_ = writer()
    silent = str(write_llama(tmp_path / "silent"))
    _, _, made = measure_models([folder, silent], {"perplexity": texts}, Settings(quiet=True))
    assert {name for item in made.measurements for name in item.estimates} == {"model0"}
    [note] = made.notes
    assert note.startswith("silent on texts: ")
    assert "text needs a tokenizer" in note


def test_measures_that_do_not_suit_a_model_are_refused_by_name(writer, texts, tmp_path):
    folder, *_ = writer()
    labelled = tmp_path / "labelled.txt"
    labelled.write_text("0 bad\n1 good\n")
    data = {"path": str(labelled), "format": "label-text"}
    assert "takes a classifier" in notes([folder], accuracy=data)[0]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    first, second, *_ = tokenizer["model"]["vocab"]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer is not that of the baseline" in notes([folder, str(other)], drift=texts)[0]


def test_drift_needs_no_labels_and_none_that_the_model_knows(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", images=images)
    np.savez(tmp_path / "foreign.npz", images=images, labels=np.full(12, 99))
    for name in ("unlabelled", "foreign"):
        found = measured([{"config": VIT}], drift=str(tmp_path / f"{name}.npz"))
        assert only(found["agreement", "%"]).n == 12


def test_what_could_not_be_measured_is_told(texts, tmp_path, caplog):
    silent = str(write_llama(tmp_path / "silent"))
    assert lfm.evaluate([silent], {"perplexity": texts}, settings=Settings(quiet=True)) == []
    assert "note: silent on texts: " in caplog.text


# --- language models ------------------------------------------------------------------------------------------------


def window_by_window(module, tokenizer, texts, length):
    """Return the NLL of each window and its number of predictions, one window at a time."""
    nats, counts = [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        starts = range(0, len(ids) - 1, length - 1)
        for window in (torch.tensor(ids[start : start + length]) for start in starts):
            with torch.no_grad():
                logits = module(input_ids=window[None]).logits[0]
            nats.append(float(functional.cross_entropy(logits[:-1].double(), window[1:], reduction="sum")))
            counts.append(len(window) - 1)
    return np.array(nats), np.array(counts)


@pytest.mark.parametrize("length", [8, 64, 256])
def test_perplexity_is_what_transformers_gives_window_by_window(writer, texts, length):
    folder, module, tokenizer = writer()
    found = measured([folder], perplexity=texts, length=length, batch_size=8)
    nats, counts = window_by_window(module, tokenizer, LINES, length)
    assert counts.sum() == sum(len(line.encode()) - 1 for line in LINES)
    per_token = only(found["perplexity", "per token"])
    assert per_token.value == pytest.approx(math.exp(nats.sum() / counts.sum()), rel=1e-4)
    assert per_token.n == len(counts)
    assert per_token.low < per_token.value < per_token.high
    characters = only(found["perplexity", "per character"]).value
    assert characters == pytest.approx(math.exp(nats.sum() / sum(map(len, LINES))), rel=1e-4)


def test_the_size_of_the_batch_does_not_change_a_measure(writer, texts):
    folder, *_ = writer()
    one, many = (measured([folder], perplexity=texts, drift=texts, length=16, batch_size=size) for size in (4, 400))
    for key, estimates in one.items():
        assert only(estimates).value == pytest.approx(only(many[key]).value, rel=1e-5, abs=1e-9), key


def test_a_model_does_not_drift_from_itself(writer, texts):
    folder, *_ = writer()
    found = measured([folder], drift=texts)
    divergence, agreement = only(found["KL from baseline", "nats"]), only(found["agreement", "%"])
    assert (divergence.value, divergence.low, divergence.high) == (0, 0, 0)
    assert agreement.value == 100


def test_drift_is_the_divergence_token_by_token(writer, texts):
    (base, before, tokenizer), (other, after, _) = writer(0), writer(1)
    found = measured([base, other], drift=texts, length=256)
    divergence, same = [], []
    for line in LINES:
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            p, q = (module(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for module in (before, after))
        divergence += [float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)]
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    name = other.rpartition("/")[2]
    assert found["KL from baseline", "nats"][name].value == pytest.approx(np.mean(divergence), rel=1e-4)
    assert found["agreement", "%"][name].value == pytest.approx(100 * np.mean(same))


def test_a_model_whose_weights_are_broken_is_noted_and_gets_no_number(writer, texts):
    folder, *_ = writer()
    broken, other, _ = writer(1)
    with torch.no_grad():
        other.model.norm.weight[0] = torch.nan
    other.save_pretrained(broken)
    for measure in ("perplexity", "drift"):
        _, _, made = measure_models([folder, broken], {measure: texts}, Settings(quiet=True))
        assert {name for item in made.measurements for name in item.estimates} == {"model0"}
        assert made.notes == ["model1 on texts: its probabilities are not numbers (NaN); its weights are broken"]


def test_what_only_the_baseline_thinks_possible_is_infinitely_far_and_the_converse_is_not(texts):
    from lfm.evaluate.measure import Measured, _drift_from
    from lfm.evaluate.spec import Evaluate
    from lfm.method import Access
    from lfm.models.encode import Encoder, Examples
    from lfm.models.handle import Model

    class Fixed:
        offers = Access.PROBS

        def __init__(self, *probs):
            self.probs = torch.tensor([probs])

        def logits(self, batch):
            return self.probs.log()

        def labels(self, batch):
            return self.probs.argmax(-1)

        def write(self, prompts, how, tell):
            return []

    class One(Examples):
        def __len__(self):
            return 1

        def batch(self, indices):
            return {"labels": torch.tensor([0])}

    def divergence(before, after):
        encoder = Encoder("image-classification", classes={"a": 0, "b": 1, "c": 2})
        models = [
            Model(Fixed(*probs), Access.PROBS, "image-classification", encoder, "fixed") for probs in (before, after)
        ]
        found = Measured()
        _drift_from(models[0])(found, "after", "data", models[1], One(), Evaluate())
        return found.measurements[0].estimates["after"].value

    assert divergence((0.5, 0.5, 0.0), (0.25, 0.75, 0.0)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence((0.5, 0.5, 0.0), (0.25, 0.5, 0.25)) == pytest.approx(0.5 * math.log(2))
    assert divergence((0.5, 0.25, 0.25), (0.5, 0.5, 0.0)) == math.inf


# --- real checkpoints -----------------------------------------------------------------------------------------------


def test_stories260k_finds_stories_easy_and_an_encyclopedia_hard(assets):
    stories = {"path": str(assets / "data" / "tinystories-600.json"), "limit": 100}
    wiki = {"path": str(assets / "data" / "wikitext-2-valid.txt"), "limit": 30}
    model = str(assets / "checkpoints" / "stories260k")
    easy = only(measured([model], perplexity=stories, length=512)["perplexity", "per token"])
    hard = only(measured([model], perplexity=wiki, length=512)["perplexity", "per token"])
    # 4.58 on these 100 stories, newlines included, which the model has hardly seen.
    assert 4.3 < easy.value < 4.9
    assert 4.0 < easy.low < easy.high < 5.2
    assert 80 < hard.value < 400


IMAGE = {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def cifar(assets, depth):
    folder = assets / "checkpoints" / f"cifar10-resnet{depth}"
    return {"ref": str(folder), "module": f"tests/nets.py:resnet{depth}", "image": IMAGE}


def test_resnet20_has_its_accuracy_on_all_of_cifars_jpeg_test_set(assets):
    data = {"path": str(assets / "data" / "cifar10-jpeg.npz"), "split": "test"}
    found = measured([cifar(assets, 20)], accuracy=data, batch_size=250)
    accuracy = only(found["accuracy", "%"])
    assert (accuracy.value, accuracy.n) == (81.03, 10_000)
    assert accuracy.low == pytest.approx(80.25, abs=0.005)
    assert accuracy.high == pytest.approx(81.79, abs=0.005)


def test_resnet56_has_its_accuracy_on_a_part_of_that_set(assets):
    data = {"path": str(assets / "data" / "cifar10-jpeg.npz"), "split": "test", "limit": 500}
    accuracy = only(measured([cifar(assets, 56)], accuracy=data)["accuracy", "%"])
    assert (accuracy.value, accuracy.n) == (pytest.approx(79.8), 500)  # 83.20 on all 10,000
