"""Routing: the features, the choice against an obvious search, what is unknown, what folders keep."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import lfm
from lfm.errors import RequestError
from lfm.method import Access
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.recipe.step import Settings
from lfm.reuse.ensemble._engine import Joined
from lfm.reuse.ensemble._likeness import BUCKETS, looks, rarity
from lfm.reuse.ensemble.route import Route

QUIET = Settings(quiet=True)


class Held:
    """Examples at places of a plane, and what each member says of them."""

    def __init__(self, places, tables, knows=None):
        self._places = torch.as_tensor(places, dtype=torch.float32)
        self._said = [torch.as_tensor(table, dtype=torch.float32).log() for table in tables]
        self.knows = torch.ones(len(tables), self._said[0].shape[1], dtype=torch.bool) if knows is None else knows
        self.asked = [0] * len(tables)

    def __len__(self):
        return len(self._said)

    def log_probs(self, index, rows=None):
        said = self._said[index] if rows is None else self._said[index][rows]
        self.asked[index] += len(said)
        return said

    def labels(self, index):
        return self._said[index].argmax(-1)

    def looks(self):
        return self._places


def two_tasks(rows=60, seed=0):
    """Return places, labels, a base that knows nothing and two members, each of them right in one place; the places."""
    chance = np.random.default_rng(seed)
    task = chance.integers(0, 2, rows)
    places = np.array([[5.0, 1.0, 0.1], [1.0, 5.0, 0.1]])[task] + chance.normal(0, 0.3, (rows, 3))
    labels = torch.tensor(chance.integers(0, 3, rows))
    right = np.eye(3)[labels.numpy()] * 0.9 + 0.1 / 3
    wrong = np.roll(right, 1, axis=1)
    base = np.full((rows, 3), 1 / 3)
    members = [base, np.where(task[:, None] == 0, right, wrong), np.where(task[:, None] == 1, right, wrong)]
    return places, labels, members, task


def test_the_member_that_was_right_nearby_is_asked_and_no_other():
    places, labels, tables, _ = two_tasks()
    test_places, test_labels, test_tables, test_task = two_tasks(seed=1)
    method = Route(k=5, unlike=0)
    state = method.learn(Held(places, tables), labels, [1, 1, 1])
    held = Held(test_places, test_tables)
    found = method.combine(held, [1, 1, 1], state)
    assert torch.equal(found.argmax(-1), test_labels)
    assert held.asked == [0, int((test_task == 0).sum()), int((test_task == 1).sum())]


def test_the_choice_is_that_of_an_obvious_search():
    places, labels, tables, _ = two_tasks()
    chance = np.random.default_rng(2)
    tables = [chance.dirichlet(np.ones(3), len(labels)) for _ in range(3)]
    queries = chance.normal(0, 1, (20, 3)) + 3
    said = [chance.dirichlet(np.ones(3), 20) for _ in range(3)]
    method = Route(k=7, unlike=0.2)
    found = method.combine(Held(queries, said), [1] * 3, method.learn(Held(places, tables), labels, [1] * 3))

    def direction(vector):
        moved = vector * scale - middle
        return moved / np.linalg.norm(moved)

    having = (places.astype(np.float32) != 0).sum(0)
    scale = 1 + np.log((1 + len(places)) / (1 + having))
    middle = (places * scale).mean(0)
    stored = [direction(place) for place in places]
    alone = [max(float(a @ b) for j, b in enumerate(stored) if j != i) for i, a in enumerate(stored)]
    threshold = np.quantile(alone, 0.2)
    for row, query in enumerate(queries):
        alike = [float(direction(query) @ other) for other in stored]
        nearest = np.argsort(alike)[-7:]
        scores = [sum(table[z, labels[z]] for z in nearest) for table in tables]
        who = 0 if max(alike) < threshold else int(np.argmax(scores))
        np.testing.assert_allclose(found[row].exp(), said[who][row], atol=1e-6)


def test_what_is_like_no_example_goes_to_the_first():
    places, labels, tables, _ = two_tasks()
    method = Route(unlike=0.02)
    state = method.learn(Held(places, tables), labels, [1] * 3)
    strange = Held([[-3.0, -4.0, 9.0]], [table[:1] for table in tables])
    assert torch.equal(method.combine(strange, [1] * 3, state), strange.log_probs(0))
    assert strange.asked == [2, 0, 0]


def test_members_of_different_classes_say_nothing_of_others():
    knows = torch.tensor([[True, True, False], [False, True, True]])
    tables = [np.array([[0.9, 0.1, 0.0]] * 4), np.array([[0.0, 0.2, 0.8]] * 4)]
    places = [[1.0, 0.1], [1.1, 0.0], [0.0, 1.0], [0.1, 1.2]]
    held = Held(places, tables, knows)
    method = Route(k=2, unlike=0)
    found = method.combine(held, [1, 1], method.learn(held, torch.tensor([0, 0, 2, 2]), [1, 1]))
    np.testing.assert_allclose(found.exp(), [tables[0][0]] * 2 + [tables[1][0]] * 2, atol=1e-6)
    by_answers = Route(k=2, unlike=0, by="first")
    state = by_answers.learn(held, torch.tensor([0, 0, 2, 2]), [1, 1])
    assert state["examples"].shape == (4, 2)  # of the classes that the first knows


# --- features -------------------------------------------------------------------------------------------------------


def test_images_are_compared_at_one_size_whatever_brings_them():
    grey = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    images = looks({"images": [Image.fromarray(grey), np.stack([grey] * 3, -1)]})
    assert torch.equal(images[0], images[1])
    assert images.shape == (2, 3 * 64)
    pooled = (grey / 255).reshape(8, 4, 8, 4).mean((1, 3))
    np.testing.assert_allclose(images[0].reshape(3, 8, 8)[1], pooled, atol=1e-6)
    batch = torch.from_numpy(grey / 255).float().expand(1, 3, 32, 32)
    np.testing.assert_allclose(looks({"pixel_values": batch}), images[:1], atol=1e-6)


def test_texts_are_compared_by_words_and_neighbours():
    found = looks({"texts": ["the cat sat", "The cat sat.", "a dog", ""]}).expm1().round()
    assert found.shape == (4, BUCKETS)
    assert found.sum(1).tolist() == [5, 7, 3, 0]
    assert (found[0] <= found[1]).all()
    assert (found[0] * found[2]).sum() == 0
    ids = {"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert looks(ids).expm1().round().sum(1).tolist() == [3, 5]
    np.testing.assert_allclose(rarity(torch.tensor([[1.0, 0], [2, 0], [1, 3]])), [1, 1 + np.log(2)], atol=1e-6)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(RequestError, match="examples of row, labels cannot be compared"):
        looks({"row": torch.arange(2), "labels": torch.zeros(2)})


@dataclass
class Constant:
    """A backend that gives everything one class."""

    choice: int
    offers: Access = Access.PROBS
    asked: int = 0

    def logits(self, batch):
        self.asked += len(batch["labels"])
        return torch.eye(3)[self.choice].mul(5).expand(len(batch["labels"]), -1)

    def labels(self, batch):
        return self.logits(batch).argmax(-1)

    def write(self, prompts, how, tell):
        raise AssertionError("nobody asks for text")


def test_texts_of_endpoints_are_routed_without_asking_anybody():
    encoder = Encoder("text-classification", classes={"a": 0, "b": 1, "c": 2})
    backends = [Constant(0), Constant(1), Constant(2)]
    members = [Model(backend, Access.PROBS, "text-classification", encoder, "m") for backend in backends]
    texts = ["cats and dogs"] * 6 + ["stocks fell sharply"] * 6
    labels = torch.tensor([1] * 6 + [2] * 6)

    def batch(rows):
        part = {"texts": [texts[row] for row in rows], "labels": labels[rows]}
        return {"members": [part] * 3, "labels": labels[rows]}

    method = Route(k=3)
    ensemble = Joined(method, members, [1.0] * 3, {})
    ensemble.state.update(method.learn(ensemble.answers(batch(range(12))), labels, [1] * 3))
    for backend in backends:
        backend.asked = 0
    assert torch.equal(ensemble.labels(batch([0, 7, 8])), torch.tensor([1, 2, 2]))
    assert [backend.asked for backend in backends] == [0, 1, 2]


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_router_is_learned_kept_and_needs_examples(tmp_path, tiny_digits):
    even, odd = tiny_digits
    with pytest.raises(RequestError, match="Route learns from examples here; give `data`"):
        lfm.ensemble("route", [even, odd], out=tmp_path / "out", settings=QUIET)
    data = {"path": "sklearn:digits", "part": "train", "limit": 300}
    made = lfm.ensemble(Route(k=8), [even, odd], out=tmp_path / "out", data=data, settings=QUIET)
    assert made.encoder.classes.keys() == {str(digit) for digit in range(10)}
    held_out = {"accuracy": {"path": "sklearn:digits", "part": "held_out"}}
    [accuracy, *_] = lfm.evaluate([tmp_path / "out"], held_out, settings=QUIET)
    assert next(iter(accuracy.estimates.values())).value > 80  # each knows half of the digits
    assert "held-out accuracy" in json.loads((tmp_path / "out" / "lineage.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def tiny_digits(tmp_path_factory):
    """Return classifiers of the even and of the odd digits: the nearest of class means."""
    from lfm.data import DataSpec, read

    work = tmp_path_factory.mktemp("digits")
    code = work / "means.py"
    code.write_text(
        "import torch\n"
        "class Means(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(64, 5)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x.flatten(1))\n"
        "def means():\n"
        "    return Means()\n"
    )
    refs = []
    for name, start in (("even", 0), ("odd", 1)):
        classes = list(range(start, 10, 2))
        rows = read(DataSpec.model_validate({"path": "sklearn:digits", "part": "train", "classes": classes}))
        pixels = torch.tensor(np.asarray(rows.columns["image"]) / 255).float().flatten(1)
        labels = torch.tensor(np.asarray(rows.columns["label"]).astype(int))
        means = torch.stack([pixels[labels == digit].mean(0) for digit in classes])
        folder = work / name
        folder.mkdir()
        from safetensors.torch import save_file

        save_file({"linear.weight": 4 * means, "linear.bias": -2 * means.square().sum(1)}, folder / "model.safetensors")
        names = {str(digit): index for index, digit in enumerate(classes)}
        config = {"label2id": names, "id2label": {str(index): digit for digit, index in names.items()}}
        (folder / "config.json").write_text(json.dumps(config))
        image = {"size": 8, "channels": 1, "mean": [0.0], "std": [1.0]}
        refs.append({"ref": str(folder), "module": f"{code}:means", "image": image})
    return refs
