"""Scores against slow and obvious implementations, what must not change them, and the ranking of real models."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tests.nets import resnet20
from tests.tiny import write_llama

import lfm
from lfm.cli import main
from lfm.errors import RequestError
from lfm.evaluate.transfer import SCORES, centroid, h_score, h_score_shrunk, leep, logme, nce
from lfm.evaluate.transfer.h_score import ledoit_wolf
from lfm.models.local import byte_tokenizer

FEATURES = {"logme": logme, "h_score": h_score, "h_score_shrunk": h_score_shrunk, "centroid": centroid}
QUIET = lfm.Settings(threads=1, quiet=True)


def sample(n=60, width=5, classes=3, apart=1.0, seed=0):
    """Features around a centre for each class, and labels; apart = 0 is noise."""
    chance = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = chance.normal(size=(classes, width))
    return chance.normal(size=(n, width)) + apart * 3 * centres[labels], labels


# --- golden ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width", "apart"), [(60, 5, 0.3), (60, 5, 1.0), (20, 40, 0.5), (40, 3, 0.0)])
def test_logme_is_the_largest_evidence(n, width, apart):
    features, labels = sample(n, width, apart=apart)
    scale = np.linalg.norm(features, 2)  # as there, so that the constant that keeps fits finite has the same effect
    gram = features @ features.T / scale**2
    expected = []
    for one in range(3):
        target = (labels == one).astype(float)

        def evidence(alpha, beta, target=target):
            covariance = np.eye(n) / beta + gram / alpha
            _, determinant = np.linalg.slogdet(covariance)
            fit = target @ np.linalg.solve(covariance, target)
            return -0.5 * (n * np.log(2 * np.pi) + determinant + fit) / n

        grid = np.logspace(-3, 6, 37)
        best = max((evidence(a, b), a, b) for a in grid for b in grid)
        for step in (1.3, 1.05, 1.01):  # down from the grid's best cell to the top of it
            near = [step**k for k in range(-8, 9)]
            best = max((evidence(best[1] * i, best[2] * j), best[1] * i, best[2] * j) for i in near for j in near)
        expected.append(best[0])
    found = logme(features, labels)
    assert found == pytest.approx(np.mean(expected), abs=3e-3 if apart else 2e-2)


def test_logme_takes_the_steps_of_the_paper():
    features, labels = sample(50, 6, apart=0.5)
    unit, n = features / np.linalg.norm(features, 2), 50
    expected = []
    for one in range(3):
        target, alpha, beta = (labels == one).astype(float), 1.0, 1.0
        for _ in range(100):
            inverse = np.linalg.inv(alpha * np.eye(6) + beta * unit.T @ unit)
            mean = beta * inverse @ unit.T @ target
            gamma = 6 - alpha * np.trace(inverse)
            size, rest = mean @ mean, ((unit @ mean - target) ** 2).sum()
            ratio, alpha, beta = alpha / beta, gamma / (size + 1e-5), (n - gamma) / (rest + 1e-5)
            if abs(alpha / beta - ratio) <= 1e-4 * ratio:
                break
        matrix = alpha * np.eye(6) + beta * unit.T @ unit
        energy = beta / 2 * rest + alpha / 2 * size
        terms = n / 2 * np.log(beta) + 3 * np.log(alpha) - n / 2 * np.log(2 * np.pi) - energy
        expected.append((terms - np.linalg.slogdet(matrix)[1] / 2) / n)
    assert logme(features, labels) == pytest.approx(np.mean(expected), abs=1e-9)


def test_leep_is_the_mean_log_of_the_expected_prediction():
    chance = np.random.default_rng(0)
    probs, labels = chance.dirichlet(np.ones(4), 30), chance.integers(0, 3, 30)
    joint = np.zeros((3, 4))
    for y in range(3):
        for z in range(4):
            joint[y, z] = sum(probs[i, z] for i in range(30) if labels[i] == y) / 30
    total = 0.0
    for i in range(30):
        total += np.log(sum(joint[labels[i], z] / joint[:, z].sum() * probs[i, z] for z in range(4)))
    assert leep(probs, labels) == pytest.approx(total / 30, abs=1e-12)


def test_nce_is_the_negative_conditional_entropy():
    chance = np.random.default_rng(1)
    answers, labels = chance.integers(0, 4, 50) * 10, chance.integers(0, 3, 50)
    entropy = 0.0
    for z in set(answers):
        for y in set(labels):
            both, given = ((answers == z) & (labels == y)).mean(), (answers == z).mean()
            entropy -= both * np.log(both / given) if both else 0.0
    assert nce(answers, labels) == pytest.approx(-entropy, abs=1e-12)


def test_h_score_is_the_trace_of_the_two_covariances():
    features, labels = sample(60, 5, apart=0.4)
    means = np.stack([features[labels == y].mean(0) for y in labels])
    cov, between = np.cov(features, rowvar=False), np.cov(means, rowvar=False)
    assert h_score(features, labels) == pytest.approx(np.trace(np.linalg.inv(cov) @ between), abs=1e-9)


def test_the_shrunk_h_score_is_that_of_ledoit_and_wolfs_covariance():
    covariance = pytest.importorskip("sklearn.covariance")
    for n, width in ((60, 5), (20, 30)):
        features, labels = sample(n, width, apart=0.4)
        fitted = covariance.LedoitWolf().fit(features)
        amount, shrunk = ledoit_wolf(features - features.mean(0))
        assert amount == pytest.approx(fitted.shrinkage_, abs=1e-9)
        assert np.allclose(shrunk, fitted.covariance_)
        means = np.stack([features[labels == y].mean(0) for y in labels]) - features.mean(0)
        expected = (1 - amount) * np.trace(np.linalg.inv(shrunk) @ (means.T @ means / n))
        assert h_score_shrunk(features, labels) == pytest.approx(expected, abs=1e-9)


def test_centroids_leave_each_example_out():
    features, labels = sample(24, 3, apart=0.3)
    labels[0] = 9  # the only one of its class
    right = 0
    for i in range(24):
        distances = {}
        for y in set(labels):
            others = [features[j] for j in range(24) if j != i and labels[j] == y]
            if others:
                distances[y] = np.linalg.norm(features[i] - np.mean(others, 0))
        right += min(distances, key=distances.get) == labels[i]
    assert centroid(features, labels) == right / 24


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_separate_the_classes_score_above_noise(name):
    (apart, labels), (noise, _) = sample(90, 8), sample(90, 8, apart=0.0)
    assert FEATURES[name](apart, labels) > FEATURES[name](noise, labels) + 0.05


@pytest.mark.parametrize("name", FEATURES)
def test_scores_do_not_see_rotation_order_or_the_names_of_classes(name):
    features, labels = sample(60, 6, apart=0.4)
    score = FEATURES[name]
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]
    order = np.random.default_rng(4).permutation(60)
    expected = score(features, labels)
    for found in (
        score(features @ turn, labels),
        score(features[order], labels[order]),
        score(features, np.array([7, 3, 100])[labels]),
        score(features * 1000, labels),
    ):
        assert found == pytest.approx(expected, abs=1e-8)


def test_what_the_answers_tell_bounds_leep_and_nce():
    labels = np.arange(40) % 4
    sure = np.eye(5)[(labels + 1) % 5]
    assert leep(sure, labels) == nce(sure.argmax(1), labels) == 0.0
    blind = np.full((40, 5), 0.2)
    assert leep(blind, labels) == pytest.approx(-np.log(4))
    assert nce(np.zeros(40, int), labels) == pytest.approx(-np.log(4))
    swapped = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    assert leep(swapped[:, [3, 1, 0, 4, 2]], labels) == pytest.approx(leep(swapped, labels))


@pytest.mark.parametrize("features", [np.zeros((12, 4)), np.ones((12, 4), np.float32)])
@pytest.mark.parametrize("name", FEATURES)
def test_features_without_content_have_a_finite_score(name, features):
    assert np.isfinite(FEATURES[name](features, np.arange(12) % 3))


def test_a_perfect_fit_has_a_finite_logme():
    labels = np.arange(12) % 3
    assert np.isfinite(logme(np.eye(3)[labels], labels))


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "sample.csv"
    lines = [f"{'good nice fine' if i % 2 else 'bad poor sad'} {i},{'up' if i % 2 else 'down'}" for i in range(24)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return str(path)


@pytest.fixture
def candidates(tmp_path):
    """A language model and a classifier with three classes of its own."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        writer = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
        classifier = tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_attention_heads=2, num_labels=3))
    for name, module in (("writer", writer), ("classifier", classifier)):
        module.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "writer"), str(tmp_path / "classifier")


def test_models_are_ranked_with_cost_and_reasons(candidates, texts):
    writer, classifier = lfm.rank(candidates, texts, settings=QUIET, batch_size=7)
    if writer.model != "writer":
        writer, classifier = classifier, writer
    assert set(classifier.scores) == set(SCORES)
    assert not classifier.missing
    assert set(writer.scores) == {name for name, score in SCORES.items() if score.of == "features"}
    assert writer.missing["leep"] == "takes classes, and a causal-lm model has none"
    assert {writer.place, classifier.place} == {1, 2}
    for one, ref in ((writer, candidates[0]), (classifier, candidates[1])):
        checkpoint = lfm.open_checkpoint(ref)
        assert one.parameters == sum(spec.size for spec in checkpoint.specs.values() if spec.floating)
        assert one.bytes == checkpoint.weights.nbytes
        assert one.seconds > 0


def test_the_batch_size_changes_no_score(candidates, texts):
    one, other = (lfm.rank([candidates[1]], texts, settings=QUIET, batch_size=size)[0].scores for size in (5, 24))
    assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("access", "allowed"),
    [("labels", {"nce"}), ("probs", {"nce", "leep"}), ("logits", set(SCORES))],
)
def test_a_model_is_scored_by_what_its_access_allows(candidates, texts, access, allowed):
    full = lfm.rank([candidates[1]], texts, settings=QUIET)[0]
    [found] = lfm.rank([{"ref": candidates[1], "access": access}], texts, settings=QUIET)
    assert set(found.scores) == allowed
    assert found.access == access
    assert all(reason.endswith(f"the model offers {access}") for reason in found.missing.values())
    assert all(found.scores[name] == pytest.approx(full.scores[name]) for name in allowed)
    assert found.place == (1 if "logme" in allowed else None)


def test_models_without_the_deciding_score_follow(candidates, texts):
    black_box = {"ref": candidates[1], "access": "labels"}
    found = lfm.rank([black_box, candidates[0]], texts, scores=["h_score", "nce"], settings=QUIET)
    assert [one.place for one in found] == [1, None]
    assert found[1].scores.keys() == {"nce"}


def test_a_model_that_cannot_take_the_sample_says_why(candidates, texts, tmp_path):
    bare = str(write_llama(tmp_path / "bare"))  # no tokenizer
    found = {one.model: one for one in lfm.rank([candidates[0], bare], texts, settings=QUIET)}
    assert not found["bare"].scores
    assert "tokenizer" in found["bare"].missing["logme"]
    assert found["writer"].place == 1


def test_requests_that_cannot_be_served(candidates, texts, tmp_path):
    with pytest.raises(RequestError) as error:
        lfm.rank([candidates[0]], texts, scores=["logmee"], batch_size=0)
    assert "did you mean 'logme'?" in str(error.value)
    assert "give 1 or more" in str(error.value)
    with pytest.raises(RequestError) as error:
        lfm.rank([str(tmp_path / "nowhere"), candidates[0]], str(tmp_path / "none.csv"))
    assert len(error.value.problems) == 2
    for content, complaint in (("text,label\na,1\nb,1\n", "one class"), ("text,label\na,1\nb,2\nc,3\n", "two or more")):
        (tmp_path / "few.csv").write_text(content)
        with pytest.raises(RequestError, match=complaint):
            lfm.rank([candidates[0]], str(tmp_path / "few.csv"))
    (tmp_path / "plain.csv").write_text("text\na\nb\n")
    with pytest.raises(RequestError, match="no label column"):
        lfm.rank([candidates[0]], str(tmp_path / "plain.csv"))


def test_the_command(candidates, texts, capsys):
    assert main(["rank", *candidates, "--data", texts, "-q"]) == 0
    out, _ = capsys.readouterr()
    assert "ms/example" in out
    assert "writer: no leep, nce: takes classes" in out
    assert main(["rank", *candidates, "--data", texts, "--scores", "h_score,nce", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["place"] for one in found] == [1, 2]
    assert {"model", "scores", "missing", "parameters", "bytes", "seconds", "access"} <= found[0].keys()
    assert main(["rank", "--scores", "nce"]) == 2
    assert "which models?" in capsys.readouterr().err
    assert main(["rank", candidates[0], "--data", texts, "--scores", "nce", "-q"]) == 1
    assert "no model could be scored" in capsys.readouterr().err


def test_real_features_rank_above_noised_and_random_ones(assets, tmp_path):
    """Of a CIFAR-10 network and copies with more and more noise, every score finds the order on CIFAR-10."""
    from safetensors.torch import load_file, save_file

    source = load_file(assets / "checkpoints" / "cifar10-resnet20" / "model.safetensors")
    image = {"size": 32, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    build = f"{resnet20.__code__.co_filename}:resnet20"
    models = []
    for name, amount in (("much", 1.0), ("none", 0.0), ("some", 0.5)):
        (tmp_path / name).mkdir()
        noise = torch.Generator().manual_seed(0)
        tensors = {
            key: tensor + amount * tensor.std() * torch.randn(tensor.shape, generator=noise)
            if tensor.ndim == 4
            else tensor
            for key, tensor in source.items()
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
        models.append({"ref": str(tmp_path / name), "module": build, "image": image})
    data = {"path": _some_images(assets, tmp_path / "sample.npz"), "split": "test"}
    found = lfm.rank(models, data, settings=QUIET)
    assert [one.model for one in found] == ["none", "some", "much"]
    for name in SCORES.keys() - {"h_score"}:  # 160 images of 64 features: the plain one sees little
        values = [one.scores[name] for one in found]
        assert values == sorted(values, reverse=True), name


def _some_images(assets, path):
    """Write 160 CIFAR-10 test images, 16 of each class; the file has them sorted by class."""
    from PIL import Image

    with np.load(assets / "data" / "cifar10-jpeg.npz") as file:
        content, offsets, labels = file["jpeg_test"].tobytes(), file["offsets_test"], file["y_test"]
    chosen = np.linspace(0, len(labels) - 1, 160).astype(int)
    images = [np.array(Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]]))) for i in chosen]
    np.savez(path, x_test=np.stack(images), y_test=labels[chosen])
    return str(path)


def test_the_benchmark_correlates_ranks_as_others_do(monkeypatch):
    stats = pytest.importorskip("scipy.stats")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from rank import kendall, spearman

    chance = np.random.default_rng(0)
    one, other = chance.integers(0, 6, 12), chance.normal(size=12)
    assert kendall(one, other) == pytest.approx(stats.kendalltau(one, other).statistic)
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
