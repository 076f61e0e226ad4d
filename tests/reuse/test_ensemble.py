"""Ensembles of classifiers: each method against its formula, and what may and may not go in."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers as tf

import lfm
from lfm.data import DataSpec, read
from lfm.errors import AccessError, RequestError
from lfm.method import Access, methods_of
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.recipe.step import Settings
from lfm.reuse.ensemble._averaging import best_temperature, best_weights
from lfm.reuse.ensemble._contract import Ensemble
from lfm.reuse.ensemble._engine import Joined
from lfm.reuse.ensemble.average import Average
from lfm.reuse.ensemble.cascade import Cascade
from lfm.reuse.ensemble.max_model import MaxModel
from lfm.reuse.ensemble.rank_fusion import RankFusion
from lfm.reuse.ensemble.stack import Stack
from lfm.reuse.ensemble.vote import Vote

QUIET = Settings(quiet=True)
DIGITS = {"path": "sklearn:digits", "part": "held_out"}
CLASSES = {"a": 0, "b": 1, "c": 2}


@dataclass
class Says:
    """A backend that gives fixed log-probabilities for the rows that the batch names."""

    table: torch.Tensor
    offers: Access = Access.PROBS
    asked: int = 0

    def logits(self, batch):
        self.asked += len(batch["row"])
        return self.table[batch["row"]]

    def labels(self, batch):
        return self.table[batch["row"]].argmax(-1)

    def write(self, prompts, how, tell):
        raise AssertionError("nobody asks for text")


def member(table, classes=CLASSES, offers=Access.PROBS, label="m"):
    table = torch.as_tensor(table, dtype=torch.float32).log()
    return Model(
        Says(table, offers), offers, "image-classification", Encoder("image-classification", classes=classes), label
    )


def joined(method, *members, weights=None, state=None):
    return Joined(method, members, weights or [1.0] * len(members), {} if state is None else state)


def batch_of(ensemble, count):
    rows = {"row": torch.arange(count)}
    return {"members": [rows] * len(ensemble.members), "labels": torch.zeros(count).long()}


def said(ensemble, count):
    return ensemble.logits(batch_of(ensemble, count))


def random_tables(members=3, rows=40, classes=3, seed=0):
    chance = np.random.default_rng(seed)
    return [chance.dirichlet(np.ones(classes), rows) for _ in range(members)]


# --- formulas -------------------------------------------------------------------------------------------------------


def test_averages_are_those_of_their_formulas():
    tables = random_tables()
    weights = [0.5, 2.0, 1.5]
    shares = np.array(weights) / 4
    of_probabilities = sum(w * t for w, t in zip(shares, tables, strict=True))
    logits = sum(w * np.log(t) for w, t in zip(shares, tables, strict=True))
    of_logits = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for of, expected in (("probabilities", of_probabilities), ("logits", of_logits)):
        found = said(joined(Average(of=of), *map(member, tables), weights=weights), 40)
        np.testing.assert_allclose(found.exp(), expected, atol=2e-6)
        np.testing.assert_allclose(found.exp().sum(1), 1, atol=2e-6)


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_one_hot_weights_give_that_member_bit_for_bit(of):
    members = [member(table) for table in random_tables()]
    for index in range(3):
        weights = [float(i == index) for i in range(3)]
        found = said(joined(Average(of=of), *members, weights=weights), 40)
        assert torch.equal(found, members[index].log_probs({"row": torch.arange(40)}))


def test_members_may_number_their_classes_otherwise():
    table = random_tables(1)[0]
    turned = member(table[:, [2, 0, 1]], classes={"c": 0, "a": 1, "b": 2})
    ensemble = joined(Average(), member(table), turned)
    np.testing.assert_allclose(said(ensemble, 40).exp(), table, atol=1e-6)
    assert torch.equal(
        joined(Vote(), member(table), turned).labels(batch_of(ensemble, 40)), torch.tensor(table.argmax(1))
    )


ONE_HOT = np.eye(3) * 0.97 + 0.01


def voters(*votes, offers=Access.LABELS):
    """Members that vote for these classes, one list of them for each member."""
    return [member(ONE_HOT[rows], offers=offers, label=f"m{i}") for i, rows in enumerate(votes)]


def test_votes_are_counted():
    members = voters([0, 0, 1], [1, 0, 2], [2, 1, 2])
    ensemble = joined(Vote(), *members)
    assert ensemble.labels(batch_of(ensemble, 3)).tolist() == [0, 0, 2]
    np.testing.assert_allclose(said(ensemble, 3).exp(), [[1 / 3] * 3, [2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], atol=2e-6)
    np.testing.assert_allclose(said(ensemble, 3)[1:].exp(), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], atol=1e-7)
    heavy = joined(Vote(), *members, weights=[1.0, 1.0, 1.5])
    assert heavy.labels(batch_of(heavy, 3)).tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("ties", "weights", "expected"),
    [
        # members vote for 2, 0, 0, 2 (a tie of 2 and 0) and for 1, 2, 0, 0 (no tie)
        ("weight", [1.0, 1.0, 1.0, 1.0], [2, 0]),
        ("weight", [0.1, 0.1, 0.2, 0.2], [0, 0]),  # 0.1 + 0.2 twice, summed in different orders
        ("weight", [1.0, 3.0, 1.0, 3.0], [0, 0]),  # of two equally heavy ones the earlier
        ("first", [0.1, 0.1, 0.2, 0.2], [2, 0]),
        ("first", [0.0, 1.0, 0.0, 1.0], [0, 2]),  # who weighs nothing decides nothing
    ],
)
def test_ties_go_where_they_are_said_to(ties, weights, expected):
    ensemble = joined(Vote(ties=ties), *voters([2, 1], [0, 2], [0, 0], [2, 0]), weights=weights)
    assert ensemble.labels(batch_of(ensemble, 2)).tolist() == expected


def test_ties_go_to_the_most_probable_class_where_that_is_asked_for():
    first, second = [[0.5, 0.1, 0.4]], [[0.2, 0.7, 0.1]]  # vote for 0 and 1
    third, fourth = [[0.1, 0.2, 0.7]], [[0.2, 0.05, 0.75]]  # and twice for 2
    pair = [member(first), member(second)]

    def winner(members, weights=None, ties="probable"):
        ensemble = joined(Vote(ties=ties), *members, weights=weights)
        return int(ensemble.labels(batch_of(ensemble, 1)))

    assert (winner(pair), winner(pair, ties="weight")) == (1, 0)  # 0.7 of 0, and 0.8 of 1
    four, weights = [*pair, member(third), member(fourth)], [1.0, 2.0, 1.0, 1.0]
    # 1 and 2 have two votes each: 1.4 + 0.1 + 0.2 + 0.05 against 0.4 + 0.2 + 0.7 + 0.75
    assert (winner(four, weights), winner(four, weights, "weight")) == (2, 1)
    assert winner([member([[0.1, 0.8, 0.1]]), *[member([[0.3, 0.3, 0.4]])] * 2]) == 2, "more votes beat more mass"


def test_ranks_are_fused_by_their_reciprocals():
    tables = random_tables()
    found = said(joined(RankFusion(k=3.0), *map(member, tables), weights=[1.0, 2.0, 0.5]), 40)
    expected = np.zeros((40, 3))
    for table, weight in zip(tables, [1.0, 2.0, 0.5], strict=True):
        for row in range(40):
            for rank, label in enumerate(np.argsort(-table[row]), 1):
                expected[row, label] += weight / (3 + rank)
    np.testing.assert_allclose(found.exp(), expected / expected.sum(1, keepdims=True), atol=1e-6)


def test_the_surest_of_those_who_know_a_class_speaks_for_it():
    first, second = random_tables(2, classes=2)
    ensemble = joined(
        MaxModel(), member(first, classes={"a": 0, "b": 1}), member(second, classes={"b": 0, "c": 1}, label="n")
    )
    assert ensemble.classes == {"a": 0, "b": 1, "c": 2}
    expected = np.stack([first[:, 0], np.maximum(first[:, 1], second[:, 0]), second[:, 1]], 1)
    np.testing.assert_allclose(said(ensemble, 40).exp(), expected / expected.sum(1, keepdims=True), atol=1e-6)
    with pytest.raises(RequestError, match=r"m: does not know c.*max_model") as caught:
        joined(Average(), *ensemble.members)
    assert len(caught.value.problems) == 2


def test_a_class_that_no_member_knows_is_ruled_out():
    ensemble = joined(MaxModel(), member(random_tables(1)[0]), member(random_tables(1)[0][:, :2], {"a": 0, "b": 1}))
    answers = ensemble.answers(batch_of(ensemble, 40))
    assert answers.knows.tolist() == [[True] * 3, [True, True, False]]
    assert (answers.log_probs(1)[:, 2] == -torch.inf).all()


# --- learning -------------------------------------------------------------------------------------------------------


class Held:
    """Answers of members to examples whose classes are known."""

    def __init__(self, tables):
        self._said = [torch.tensor(table).log().float() for table in tables]
        self.knows = torch.ones(len(tables), tables[0].shape[1], dtype=torch.bool)

    def __len__(self):
        return len(self._said)

    def log_probs(self, index, rows=None):
        return self._said[index] if rows is None else self._said[index][rows]

    def labels(self, index):
        return self._said[index].argmax(-1)


def sample(rows=4000, seed=0):
    """Return classes, what a good, a lazy and an over-confident member say of them."""
    chance = np.random.default_rng(seed)
    truth = chance.dirichlet(np.ones(3) * 0.5, rows)
    labels = torch.tensor([chance.choice(3, p=row) for row in truth])
    noise = chance.dirichlet(np.ones(3), rows)
    sure = truth**3 / (truth**3).sum(1, keepdims=True)
    return labels, [np.clip(table, 1e-6, 1) for table in (truth, noise, sure)]


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_the_most_likely_weights_beat_a_grid_and_find_the_truth(of):
    labels, tables = sample()
    tables = tables[:2]
    stack = torch.stack([torch.tensor(table).log() for table in tables])
    found = best_weights(stack, labels, of)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()

    def loss(weight):
        pair = torch.tensor([weight, 1 - weight])[:, None, None]
        mixed = (pair * stack.exp()).sum(0).log() if of == "probabilities" else (pair * stack).sum(0).log_softmax(-1)
        return float(torch.nn.functional.nll_loss(mixed, labels))

    assert loss(float(found[0])) <= min(map(loss, np.linspace(0, 1, 101))) + 1e-4
    assert found[0] > 0.9


def test_a_temperature_undoes_what_was_sharpened():
    labels, (truth, _, sure) = sample()
    assert best_temperature(torch.tensor(truth).log(), labels) == pytest.approx(1.0, abs=0.1)
    assert best_temperature(torch.tensor(sure).log(), labels) == pytest.approx(3.0, abs=0.3)


def test_a_temperature_is_fitted_to_what_a_member_can_know():
    """Of two members that know three classes of four each: examples of the fourth say nothing of how sure to be."""
    labels, (_, _, sure) = sample()
    wider = torch.cat([torch.tensor(sure).log(), torch.full((len(labels), 1), -torch.inf)], 1)
    mixed = torch.where(torch.arange(len(labels)) % 2 == 0, labels, 3)
    half = best_temperature(wider, mixed)
    assert half == pytest.approx(best_temperature(torch.tensor(sure[::2]).log(), labels[::2]))
    assert best_temperature(wider, torch.full_like(labels, 3)) == 1


class Specialists:
    """Two members that know three classes each and share one, and are as sure of what they have never seen."""

    knows = torch.tensor([[True, True, True, False, False], [False, False, True, True, True]])

    def __init__(self, labels, seed):
        chance = np.random.default_rng(seed)
        self._said = []
        for known in self.knows.numpy():
            logits = chance.normal(size=(len(labels), 5))
            seen = known[labels.numpy()]
            logits[seen, labels.numpy()[seen]] += 4  # strangers look like some class or other, more often the second
            logits[~seen, np.flatnonzero(known)[1]] += chance.choice([0, 4], (~seen).sum())
            logits[:, ~known] = -np.inf
            self._said.append(torch.tensor(logits).float().log_softmax(-1))

    def __len__(self):
        return 2

    def log_probs(self, index, rows=None):
        return self._said[index]


def test_who_knows_an_example_is_learned_from_what_all_say_of_it():
    labels = torch.tensor(np.random.default_rng(0).integers(0, 5, 3000))
    held, test, truth = Specialists(labels[:1000], 1), Specialists(labels[1000:], 2), labels[1000:]
    method, plain = MaxModel(familiarity="learned"), MaxModel()
    state = method.learn(held, labels[:1000], [1, 1])
    learned, before = method.combine(test, [1, 1], state), plain.combine(test, [1, 1], {})
    right = [float((said.argmax(-1) == truth).double().mean()) for said in (learned, before)]
    assert right[0] > right[1] + 0.04
    assert torch.nn.functional.nll_loss(learned, truth) < torch.nn.functional.nll_loss(before, truth) - 0.05
    np.testing.assert_allclose(learned.exp().sum(1), 1, atol=1e-5)
    shared = method.learn(held, torch.full((1000,), 2), [1, 1])  # both know all of them
    np.testing.assert_allclose(method.combine(test, [1, 1], shared), before, atol=0.02)


def test_a_stack_learns_whom_to_believe_about_what():
    labels, (truth, noise, _) = sample()
    halves = slice(0, 2000), slice(2000, 4000)
    confused = truth[:, [1, 0, 2]]  # takes a for b, and b for a: worthless to an average
    method = Stack(penalty=1e-4)
    held = Held([confused[halves[0]], noise[halves[0]]])
    state = method.learn(held, labels[halves[0]], [1, 1])
    test = Held([confused[halves[1]], noise[halves[1]]])
    stacked = method.combine(test, [1, 1], state)
    average = Average().combine(test, [1, 1], {})
    right = [float((s.argmax(-1) == labels[halves[1]]).float().mean()) for s in (stacked, average)]
    best = float((torch.tensor(truth[halves[1]]).argmax(-1) == labels[halves[1]]).float().mean())
    assert right[0] > best - 0.02 > right[1]
    np.testing.assert_allclose(stacked.exp().sum(1), 1, atol=1e-5)
    assert set(state) == {"matrix", "bias"}
    heavy = Stack(penalty=1e6).learn(held, labels[halves[0]], [1, 1])
    np.testing.assert_allclose(heavy["matrix"], torch.eye(3).repeat(2, 1) / 2, atol=1e-4)


def test_the_penalty_of_a_stack_is_chosen_by_what_it_does_for_examples_left_out():
    """Few examples need a strong penalty, many where one member takes two classes for each other a weak one."""
    labels, (truth, noise, _) = sample(6000)
    few, many, test = slice(0, 40), slice(40, 2000), slice(2000, 6000)
    confused = truth[:, [1, 0, 2]]

    def loss(tables, method, part):
        state = method.learn(Held([table[part] for table in tables]), labels[part], [1, 1])
        said = method.combine(Held([table[test] for table in tables]), [1, 1], state)
        return float(torch.nn.functional.nll_loss(said, labels[test])), float(state.get("penalty", method.penalty))

    strong, weak = loss([truth, noise], Stack(folds=5), few), loss([confused, noise], Stack(folds=5), many)
    assert strong[1] > 0.01 > weak[1]
    for tables, part, (found, penalty) in (([truth, noise], few, strong), ([confused, noise], many, weak)):
        fixed = [loss(tables, Stack(penalty=10.0**power), part)[0] for power in range(-5, 2)]
        assert found < min(fixed) + 0.03 < max(fixed)
        assert loss(tables, Stack(penalty=penalty), part)[0] == pytest.approx(found, abs=1e-6)
    assert "penalty" not in Stack(folds=1).learn(Held([truth[few]]), labels[few], [1])


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.01])
def test_a_cascade_asks_the_second_only_where_the_first_is_unsure(threshold):
    small, large = random_tables(2)
    members = [member(small), member(large)]
    ensemble = joined(Cascade(threshold=threshold), *members)
    found = said(ensemble, 40)
    beyond = small.max(1) < threshold
    np.testing.assert_allclose(found.exp(), np.where(beyond[:, None], large, small), atol=1e-6)
    assert ensemble.calls == [40, beyond.sum()]


def test_a_cascade_takes_the_lowest_threshold_that_is_good_enough():
    labels, (truth, noise, _) = sample()
    mixed = 0.5 * truth + 0.5 * noise
    held = Held([mixed, truth])
    method = Cascade(quality=0.99)
    state = method.learn(held, labels, [1, 1])
    reached = float((method.combine(held, [1, 1], state).argmax(-1) == labels).double().mean())
    last = float((held.labels(1) == labels).double().mean())
    assert 0.99 * last <= reached
    assert 0 < state["threshold"] < 1
    lower = {"threshold": state["threshold"] - 0.05}
    assert float((method.combine(held, [1, 1], lower).argmax(-1) == labels).double().mean()) < 0.99 * last


def test_the_curve_of_a_cascade_is_what_it_does_at_each_threshold():
    labels, (truth, noise, sure) = sample(500)
    tables = [0.5 * truth + 0.5 * noise, sure, truth]
    curve = Cascade().curve(Held(tables), labels)
    assert (curve.examples, curve.measure, len(curve.thresholds)) == (500, "accuracy", len(curve.shares))
    for threshold, accuracy, shares in list(zip(curve.thresholds, curve.quality, curve.shares, strict=True))[::3]:
        ensemble = joined(Cascade(threshold=threshold), *map(member, tables))
        found = said(ensemble, 500)
        assert accuracy == pytest.approx(float((found.argmax(-1) == labels).double().mean()))
        assert [500, *(round(500 * share) for share in shares)] == ensemble.calls
    assert curve.shares[0] == (0.0, 0.0)
    assert curve.shares[-1] == (1.0, 1.0)
    told = dict(curve.metrics(["a", "b", "c"]))
    place = curve.thresholds.index(0.8)
    assert told["share asked of c at threshold 0.8"] == curve.shares[place][1]
    assert told["accuracy at threshold 0.8"] == curve.quality[place]
    columns = curve.as_dict(["a", "b", "c"])["columns"]
    assert columns["models asked"][place] == pytest.approx(1 + sum(curve.shares[place]))
    assert columns["asked of b, %"][place] == pytest.approx(100 * curve.shares[place][0])


# --- access ---------------------------------------------------------------------------------------------------------


def test_every_method_works_on_handles_of_the_access_that_it_names():
    labels, tables = sample(200)
    for name, card in methods_of("ensemble").items():
        if name == "route" or not issubclass(card.load(), Ensemble):
            continue  # see the tests of these
        method = card.load()()
        members = [member(table, offers=card.needs.access) for table in tables[:2]]
        state = method.learn(Held(tables[:2]), labels, [1, 1]) if method.learns else {}
        found = said(joined(method, *members, state=state), 200)
        assert found.shape == (200, 3)
        assert not found.isnan().any()
        with pytest.raises(AccessError):
            _ = members[0].module


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two image models for the digits, of which the second numbers its classes the other way round."""
    found = []
    for seed, names in enumerate([range(10), reversed(range(10))]):
        names = [str(name) for name in names]
        config = tf.ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
            initializer_range=0.5,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = tf.ViTForImageClassification(config)
        folder = tmp_path_factory.mktemp("members") / f"m{seed}"
        module.save_pretrained(folder)
        shape = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5]}
        (folder / "preprocessor_config.json").write_text(json.dumps(shape))
        found.append(str(folder))
    return found


def accuracy(*models):
    return lfm.evaluate(models, {"accuracy": {"path": "sklearn:digits", "part": "held_out"}}, settings=QUIET)[
        0
    ].estimates


def encoded(model):
    rows = read(DataSpec.model_validate(DIGITS))
    examples = model.encoder.encode(rows, 8)
    return examples.batch(range(50))


def test_an_ensemble_is_a_folder_that_loads_and_is_measured_as_a_model(pair, tmp_path):
    model = lfm.ensemble(Average(), pair, out=tmp_path / "both", settings=QUIET)
    assert model.access is Access.PROBS
    assert model.task == "image-classification"
    parts = [lfm.load(ref) for ref in pair]
    first, second = (part.probs(encoded(part)) for part in parts)
    np.testing.assert_allclose(model.probs(encoded(model)), (first + second.flip(1)) / 2, atol=1e-6)
    for ask in (lambda: model.module, lambda: model.logits(encoded(model)), lambda: model.features(encoded(model))):
        with pytest.raises(AccessError):
            ask()
    estimates = accuracy(str(tmp_path / "both"), *pair)
    assert len(estimates) == 3
    assert all(estimate is not None for estimate in estimates.values())
    lineage = json.loads((tmp_path / "both" / "lineage.json").read_text())
    assert [parent["role"] for parent in lineage["parents"]] == ["models", "models"]
    again = lfm.ensemble(Average(), pair, out=tmp_path / "both", settings=QUIET)  # is there already: skipped
    assert torch.equal(again.probs(encoded(again)), model.probs(encoded(model)))


def test_ensembles_are_members_too(pair, tmp_path):
    lfm.ensemble("average", pair, out=tmp_path / "both", settings=QUIET)
    nested = lfm.ensemble("cascade", [pair[0], tmp_path / "both"], out=tmp_path / "nested", settings=QUIET)
    assert nested.probs(encoded(nested)).shape == (50, 10)


def test_what_is_learned_is_kept(pair, tmp_path):
    for number, (method, calibrate) in enumerate(
        [(Average(choose="likelihood"), "members"), (Stack(), "no"), (Cascade(quality=0.9), "ensemble")]
    ):
        out = tmp_path / str(number)
        model = lfm.ensemble(method, pair, out=out, data=DIGITS, calibrate=calibrate, settings=QUIET)
        metrics = json.loads((out / "lineage.json").read_text())["metrics"]
        assert metrics["held-out accuracy"] * 100 == pytest.approx(next(iter(accuracy(str(out)).values())).value)
        assert torch.equal(lfm.load(out).probs(encoded(model)), model.probs(encoded(model)))
    assert metrics["temperature"] > 0
    assert metrics[f"share asked of {pair[1]} at threshold 0"] == 0


def test_the_curve_of_a_cascade_lies_in_the_folder_and_is_drawn(pair, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
lfm: 1
models: {{small: {pair[0]}, large: {pair[1]}}}
steps:
  cheap: {{ensemble: cascade, models: [small, large, small], data: {{path: "sklearn:digits", part: held_out}}}}
  plain: {{ensemble: cascade, models: [small, large]}}
out: {tmp_path / "out"}
"""
    )
    lfm.run(recipe, settings=QUIET)
    told = json.loads((tmp_path / "out" / "cheap" / "curve.json").read_text())
    assert list(told["columns"]) == [
        *("threshold", "accuracy, %", "models asked", "asked of large, %", "asked of small (3), %")
    ]
    assert told["columns"]["accuracy, %"][-1] == pytest.approx(told["columns"]["accuracy, %"][0])  # the small one again
    metrics = json.loads((tmp_path / "out" / "cheap" / "lineage.json").read_text())["metrics"]
    assert metrics["accuracy at threshold 0"] * 100 == pytest.approx(told["columns"]["accuracy, %"][0])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "cheap: what asking more models brings" in page
    assert "cheap: what a threshold costs" in page
    assert "plain: what" not in page
    assert not (tmp_path / "out" / "plain" / "curve.json").exists()


def test_members_beside_the_folder_move_with_it_and_copies_need_nothing_else(pair, tmp_path):
    for index, folder in enumerate(pair):
        shutil.copytree(folder, tmp_path / "project" / f"m{index}")
    refs = [tmp_path / "project" / f"m{index}" for index in range(2)]
    lfm.ensemble("average", refs, out=tmp_path / "project" / "both", settings=QUIET)
    lfm.ensemble("average", refs, out=tmp_path / "alone", copy_members=True, settings=QUIET)
    expected = lfm.load(tmp_path / "project" / "both")
    expected = expected.probs(encoded(expected))
    (tmp_path / "project").rename(tmp_path / "moved")
    for place in (tmp_path / "moved" / "both", tmp_path / "alone"):
        model = lfm.load(place)
        assert torch.equal(model.probs(encoded(model)), expected)


def test_a_member_that_changed_or_is_gone_is_refused_by_name(pair, tmp_path):
    refs = [tmp_path / "m0", tmp_path / "m1"]
    for source, ref in zip(pair, refs, strict=True):
        shutil.copytree(source, ref)
    lfm.ensemble("average", refs, out=tmp_path / "both", settings=QUIET)
    shutil.copyfile(f"{pair[1]}/model.safetensors", refs[0] / "model.safetensors")
    shutil.rmtree(refs[1])
    with pytest.raises(RequestError) as caught:
        lfm.load(tmp_path / "both")
    assert "m0: is not what it was" in caught.value.problems[0]
    assert "m1" in caught.value.problems[1]


def test_an_ensemble_has_no_weights_to_merge_or_tune(pair, tmp_path):
    lfm.ensemble("average", pair, out=tmp_path / "both", settings=QUIET)
    with pytest.raises(RequestError, match="both: offers probs, and merge linear needs weights"):
        lfm.merge("linear", [tmp_path / "both", pair[0]], out=tmp_path / "out")
    with pytest.raises(RequestError, match="both: offers probs, and tune full needs weights"):
        lfm.tune("full", tmp_path / "both", DIGITS, out=tmp_path / "out")


def test_every_problem_is_told_at_once_before_a_model_is_loaded(pair, tmp_path):
    with pytest.raises(RequestError) as caught:
        lfm.ensemble(Stack(), [pair[0], tmp_path / "nowhere"], out=tmp_path / "out", weights=[1.0], calibrate="members")
    text = "\n".join(caught.value.problems)
    assert "Stack takes no weights" in text
    assert "give `data`" in text
    assert "nowhere" in text
    for weights, message in (([1.0], "2 models and 1 weight"), ([-1.0, 2.0], "0 or more"), ([0.0, 0.0], "above 0")):
        with pytest.raises(RequestError, match=message):
            lfm.ensemble("average", pair, out=tmp_path / "out", weights=weights)
    restricted = [{"ref": ref, "access": "labels"} for ref in pair]
    with pytest.raises(RequestError, match="offers labels, and ensemble average needs probs"):
        lfm.ensemble("average", restricted, out=tmp_path / "out")
    with pytest.raises(RequestError) as caught:
        lfm.ensemble(Vote(ties="probable"), [restricted[0], pair[1]], out=tmp_path / "out", settings=QUIET)
    assert len(caught.value.problems) == 1
    assert "m0: offers labels, and `ties: probable` compares probabilities; use `ties: weight`" in str(caught.value)
    voted = lfm.ensemble("vote", restricted, out=tmp_path / "votes", settings=QUIET)
    assert voted.labels(encoded(voted)).shape == (50,)


def test_a_step_of_a_recipe_makes_one_of_what_earlier_steps_made(pair, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
lfm: 1
models: {{a: {pair[0]}, b: {pair[1]}}}
steps:
  half: {{merge: linear, models: [a, a]}}
  joined: {{ensemble: average, models: [half, b], weights: [2, 1]}}
evaluate: {{accuracy: {{digits: {{path: "sklearn:digits", part: held_out}}}}}}
out: {tmp_path / "out"}
"""
    )
    runs = lfm.run(recipe, settings=QUIET)
    assert [run.skipped for run in runs] == [False, False]
    assert [run.skipped for run in lfm.run(recipe, settings=QUIET)] == [True, True]
    model = lfm.load(tmp_path / "out" / "joined")
    assert model.probs(encoded(model)).sum(1) == pytest.approx(np.ones(50), abs=1e-5)
