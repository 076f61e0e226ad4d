"""Learning from answers alone: what is asked is counted, held to a budget, paid once; and a teacher that tells less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.distill import digits
from tests.serve.test_serve import served

import lfm
from lfm.cli import main
from lfm.distill._asked import Asked, Record, of_bytes, to_bytes
from lfm.distill._asking import evaluated
from lfm.distill._contract import BlackBox, Inquiry, Said, Space, Taught
from lfm.distill._losses import cross_entropy, kl
from lfm.distill._noise import smooth_noise
from lfm.distill.black_box._contest import recovered
from lfm.distill.black_box._stored import Stored
from lfm.distill.black_box.dfme import Dfme
from lfm.distill.black_box.ideal import Ideal
from lfm.distill.black_box.knockoff import Knockoff
from lfm.distill.black_box.label_only import LabelOnly
from lfm.distill.black_box.maze import Maze
from lfm.distill.black_box.noise_pool import NoisePool
from lfm.errors import BudgetError, RequestError
from lfm.method import Access, methods_of
from lfm.models.local import LocalBackend, load_model
from lfm.models.ref import ModelRef
from lfm.models.zeroth_order import ZerothOrder, estimate_rows

METHODS = {
    "noise_pool": NoisePool(queries=1000, steps=20),
    "dfme": Dfme(queries=1000, steps=1, batch_size=32, width=8),
    "maze": Maze(queries=1000, steps=1, batch_size=16, width=8),
    "ideal": Ideal(queries=1000, steps=20, width=8),
    "knockoff": Knockoff(queries=900, steps=20),
    "label_only": LabelOnly(queries=1000, steps=20),
}
SOFT = ("dfme", "maze")


def teacher(access: str = "probs") -> dict:
    return {**digits.ref("teacher", digits.trained()), "access": access}


def data(name: str) -> dict | None:
    """Unlabelled images for the method that takes them: the digits themselves, which is enough to see it run."""
    return {"path": str(digits.saved() / "train.npz")} if name == "knockoff" else None


def distilled(method: BlackBox, out: Path, access: str = "probs", **settings) -> Path:
    name = type(method).__module__.rpartition(".")[2]
    how = lfm.Settings(threads=1, quiet=True, **settings)
    lfm.distill(method, teacher(access), digits.new("student"), out=out, data=data(name), settings=how)
    return out


def metrics(out: Path) -> dict[str, float]:
    return json.loads((out / "lineage.json").read_text())["metrics"]


class Clerk:
    """Counts what really reaches a teacher that is restricted, and can stop it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, self.stop_at, self.images = 0, None, []
        run = LocalBackend.logits

        def logits(backend: LocalBackend, batch):
            if self.stop_at is not None and self.rows >= self.stop_at:
                raise KeyboardInterrupt
            self.rows += len(batch["pixel_values"])
            self.images.append(batch["pixel_values"].clone())
            return run(backend, batch)

        monkeypatch.setattr(LocalBackend, "logits", logits)


@pytest.fixture
def clerk(monkeypatch):
    return Clerk(monkeypatch)


# --- counting -------------------------------------------------------------------------------------------------------


def test_every_black_box_method_is_tested_here():
    found = {name for name, card in methods_of("distill").items() if ".black_box." in card.module}
    assert found == set(METHODS)
    assert {name: methods_of("distill")[name].needs.access for name in SOFT} == dict.fromkeys(SOFT, Access.PROBS)


@pytest.mark.parametrize("access", ["probs", "labels"])
@pytest.mark.parametrize("name", METHODS)
def test_all_queries_are_spent_and_not_one_more(name, access, clerk, tmp_path):
    method = METHODS[name]
    if access == "labels" and name in SOFT:
        with pytest.raises(RequestError, match="offers labels"):
            distilled(method, tmp_path / "out", access)
        return
    out = distilled(method, tmp_path / "out", access)
    assert clerk.rows == metrics(out)["queries"] == method.queries
    notes = json.loads((out / "lineage.json").read_text())["notes"]
    told = "labels" if access == "labels" or name == "label_only" else "probabilities"
    assert f"made from the teacher's {told} for {method.queries:,} inputs" in notes[-1]
    points = [json.loads(line) for line in (out / "agreement.jsonl").read_text().splitlines()]
    assert points[-1]["queries"] == method.queries
    assert [point["queries"] for point in points] == sorted(point["queries"] for point in points)
    assert all(0 <= point["agreement"] <= 1 for point in points)


@pytest.mark.parametrize(("name", "queries"), [("noise_pool", 1), ("dfme", 7), ("dfme", 300), ("label_only", 290)])
def test_odd_budgets_are_met_exactly(name, queries, clerk, tmp_path):
    method = METHODS[name].model_copy(update={"queries": queries, "steps": 12})
    assert metrics(distilled(method, tmp_path / "out"))["queries"] == clerk.rows == queries


def test_a_method_that_would_ask_more_than_it_may_is_stopped_before_it_does(clerk, tmp_path, monkeypatch):
    monkeypatch.setattr(Stored, "wanted", lambda self, step: 64)
    with pytest.raises(BudgetError, match="would exceed the 300 allowed"):
        distilled(NoisePool(queries=300, steps=40), tmp_path / "out")
    assert clerk.rows == 262  # 6 of them held out


def test_the_counter_refuses_what_is_beyond_its_limit(clerk, tmp_path):
    asked = counter(tmp_path, 10)
    images = torch.zeros(6, 1, 8, 8)
    assert asked(images).shape == (6, 10)
    with pytest.raises(BudgetError, match=r"6 inputs more than the 6 .* would exceed the 10 allowed"):
        asked(images)
    assert asked.count == clerk.rows == 6
    assert asked(images[:4]).shape == (4, 10)
    with pytest.raises(BudgetError):
        asked(images[:1])
    assert clerk.rows == 10


def test_fewer_images_than_queries_are_all_asked_about_once(clerk, tmp_path):
    method = METHODS["knockoff"].model_copy(update={"queries": 5000, "steps": 60})
    out = distilled(method, tmp_path / "out")
    assert metrics(out)["queries"] == clerk.rows == 1437
    assert len(torch.cat(clerk.images).flatten(1).unique(dim=0)) == 1437


def test_the_least_sure_are_asked_about_first(tmp_path, clerk):
    method = METHODS["knockoff"].model_copy(update={"order": "unsure", "steps": 60})
    out = distilled(method, tmp_path / "out")
    assert metrics(out)["queries"] == clerk.rows == method.queries


# --- paying once ----------------------------------------------------------------------------------------------------


def counter(folder: Path, limit: int, access: Access = Access.PROBS) -> Asked:
    model = load_model(ModelRef.model_validate(digits.ref("teacher", digits.trained())), access=access)
    return Asked(model, limit, folder / "asked", space())


def space() -> Space:
    mean, std = digits.IMAGE["mean"][0], digits.IMAGE["std"][0]
    return Space((1, 8, 8), torch.full((1, 1, 1), -mean / std), torch.full((1, 1, 1), (1 - mean) / std))


def written(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "training.jsonl", "agreement.jsonl", "synthesised.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("name", "saves"),
    [("noise_pool", 0.05), ("dfme", 0.0), ("dfme", 1e9), ("ideal", 0.0), ("label_only", 1e9), ("knockoff", 0.0)],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes_and_asks_nothing_twice(name, saves, clerk, tmp_path):
    steps = METHODS[name].steps if name == "dfme" else 40
    method = METHODS[name].model_copy(update={"queries": 600, "steps": steps})
    whole = distilled(method, tmp_path / "whole")
    assert clerk.rows == 600
    clerk.rows = 0
    for stop in (1, 200, 400):
        clerk.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            distilled(method, tmp_path / "out", save_seconds=saves)
    clerk.stop_at = None
    assert written(distilled(method, tmp_path / "out", save_seconds=saves)) == written(whole)
    assert clerk.rows == 600


def test_answers_are_told_again_from_the_record(clerk, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(9, 1, 8, 8)
    first = counter(tmp_path, 100)
    said = [first(part) for part in images.split(3)]
    again = counter(tmp_path, 100)
    assert all(torch.equal(again(part), one) for part, one in zip(images.split(3), said, strict=True))
    assert clerk.rows == 9
    again(images)
    assert clerk.rows == 18
    other = counter(tmp_path, 100)
    other(images[3:6])  # not what was asked first
    assert clerk.rows == 21


def test_a_record_survives_a_kill_in_the_middle_of_a_line_and_between_two_states(tmp_path):
    record = Record(tmp_path / "r")
    answers = [torch.full((2, 3), float(i)) for i in range(4)]
    record.write(0, "a", answers[0])
    record.turn(2)  # a state is being saved
    record.write(2, "b", answers[1])
    record.turn(4)  # and another one: killed before it was whole
    record.write(4, "c", answers[2])
    with record._file.open("a") as file:
        file.write('{"after": 6, "inputs": "d", "sha')
    again = Record(tmp_path / "r")
    again.open(2)
    assert torch.equal(again.known(2, "b"), answers[1])
    assert torch.equal(again.known(4, "c"), answers[2])
    assert again.known(2, "x") is again.known(6, "d") is again.known(0, "a") is None
    again.turn(6)
    again.write(6, "d", answers[3])
    again.open(2)  # the state at 6 was not whole either
    assert torch.equal(again.known(2, "b"), answers[1])
    assert torch.equal(again.known(6, "d"), answers[3])
    again.open(6)
    again.turn(8)
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["answers-000000000006.jsonl"]


def test_images_are_what_a_file_would_hold():
    images = of_bytes(torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8), space(), torch.device("cpu"))
    assert torch.equal(to_bytes(images, space()).flatten(), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(to_bytes(images + 0.4 / 255 / 0.3761, space()), to_bytes(images, space()))
    assert to_bytes(torch.tensor([[[[-9.0, 9.0]]]]), space()).flatten().tolist() == [0, 255]


# --- how they ask ---------------------------------------------------------------------------------------------------


def test_inputs_stay_in_the_range_of_pixels_however_large_the_steps(clerk, tmp_path):
    distilled(METHODS["dfme"].model_copy(update={"mu": 5.0, "queries": 500}), tmp_path / "out")
    asked = torch.cat(clerk.images)
    assert asked.min() >= space().low.item() - 1e-5
    assert asked.max() <= space().high.item() + 1e-5


def test_every_input_of_a_pool_is_asked_about_once(clerk, tmp_path):
    distilled(METHODS["noise_pool"], tmp_path / "out")
    assert len(torch.cat(clerk.images).flatten(1).unique(dim=0)) > 990  # of smooth noise, two may be equal in 8 bits


def test_logits_are_recovered_up_to_their_mean():
    logits = torch.randn(5, 10)
    assert torch.allclose(recovered(logits.log_softmax(-1)), logits - logits.mean(-1, keepdim=True), atol=1e-5)
    none = torch.tensor([[0.0, -torch.inf]])
    assert recovered(none).isfinite().all()


def test_losses_are_nought_where_the_student_says_the_same():
    logits = torch.randn(5, 10)
    said = Said(logits.log_softmax(-1))
    centred = logits - logits.mean(-1, keepdim=True)
    assert Dfme().terms(Taught(said, Said(centred)))["l1"] == pytest.approx(0, abs=1e-5)
    assert Maze().terms(Taught(said, Said(logits)))["kl"] == pytest.approx(0, abs=1e-5)
    other = torch.randn(5, 10)
    expected = kl(said.logits, other.log_softmax(-1)).mean()
    assert Maze().terms(Taught(said, Said(other)))["kl"] == pytest.approx(float(expected))
    told = Taught(Said(torch.zeros(2, 10)), Said(logits[:2]), torch.tensor([1, 2]))
    assert NoisePool().terms(told)["labels"] == pytest.approx(float(cross_entropy(logits[:2], told.labels)))


class Line:
    """A teacher of two classes, by which side of a plane an image is on."""

    soft, classes, left = False, 2, 10**6

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((images.flatten(1).sum(1) > 0).long(), 2).float().log()


def test_halving_ends_close_to_a_boundary():
    inquiry = Inquiry(Line(), torch.nn.Identity(), space(), 4000, 64, 10, 0.5, torch.device("cpu"))
    torch.manual_seed(0)
    found = LabelOnly(boundary=0.5, halvings=5).inquirer(inquiry)
    found.ask(smooth_noise(200, space()))
    found.tensors["sources"][:200] = True
    pairs = found._pairs(40)
    assert len(pairs[0]) == len(pairs[1]) == 40
    labels = found.tensors["said"].argmax(-1)
    assert (labels[pairs[0]] != labels[pairs[1]]).all()
    found._halve(*pairs)
    assert found.count == 400
    images = of_bytes(found.tensors["inputs"], space(), torch.device("cpu")).flatten(1).sum(1).abs()
    apart = images[pairs[0]] + images[pairs[1]]
    assert (images[360:400] <= apart / 16 + 64 * 0.01).all()  # half of 1/2^4, and what 8 bits round away
    assert torch.equal(found.tensors["said"][:400], Line()(of_bytes(found.tensors["inputs"][:400], space(), "cpu")))


def test_ideal_asks_for_what_the_student_takes_for_all_classes_alike():
    torch.manual_seed(0)
    student = digits.student()
    inquiry = Inquiry(Line(), student, space(), 1000, 128, 10, 0.5, torch.device("cpu"))
    inquiry.teacher.classes = 10
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()

    def entropy(steps):
        torch.manual_seed(1)
        images = Ideal(generator_steps=steps, generator_rate=1e-2).inquirer(inquiry)._made()
        with torch.no_grad(), evaluated(student):
            return float(torch.special.entr(student(images).softmax(-1).mean(0)).sum())

    assert entropy(30) > entropy(1) - 0.05
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_rows_have_gradients_of_their_own():
    torch.manual_seed(0)
    matrix, x = torch.randn(3, 6), torch.randn(3, 6, dtype=torch.float64)

    def loss(points):
        return (matrix * points**2).sum(-1)

    how = ZerothOrder(num_directions=5, mu=1e-4, antithetic=False)
    found = estimate_rows(loss, x, how, torch.Generator().manual_seed(3))
    generator, expected = torch.Generator().manual_seed(3), torch.zeros_like(x)
    for _ in range(5):
        steps = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        for row in range(3):  # one after the other
            step = steps[row] / steps[row].norm()
            one = x.clone()
            one[row] += 1e-4 * step
            expected[row] += 6 / 5 * (loss(one)[row] - loss(x)[row]) / 1e-4 * step
    assert torch.allclose(found, expected, rtol=1e-6)
    many = ZerothOrder(num_directions=4000, mu=1e-4)
    close = estimate_rows(loss, x, many, torch.Generator().manual_seed(0))
    assert torch.nn.functional.cosine_similarity(close, 2 * matrix * x).min() > 0.98
    with pytest.raises(ValueError, match="random directions"):
        estimate_rows(loss, x, ZerothOrder(directions="coordinate"), None)


def test_parts_of_a_module_get_their_modes_back():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2).eval())
    with evaluated(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, True, False]


# --- what comes out -------------------------------------------------------------------------------------------------


def accuracy(out: Path) -> float:
    return digits.accuracy(load_model(ModelRef.model_validate({**digits.new("student"), "ref": str(out)})).module)


def test_noise_teaches_digits_and_proxy_images_more(tmp_path):
    noise = distilled(NoisePool(queries=4000, steps=200), tmp_path / "noise")
    assert accuracy(noise) > 0.25
    assert metrics(noise)["agreement_after_4000_queries"] > 0.25
    proxy = distilled(Knockoff(queries=1400, steps=200), tmp_path / "proxy")
    assert accuracy(proxy) > 0.9


def test_what_was_asked_is_kept_to_be_looked_at(tmp_path):
    out = distilled(METHODS["noise_pool"], tmp_path / "out")
    assert set(metrics(out)) >= {"synthesised_confidence", "synthesised_diversity", "queries", "final_loss"}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("noise_pool", {"data": {"path": "x.npz"}}, "makes its own inputs and reads no data"),
        ("knockoff", {"data": None}, "give `data`"),
        ("knockoff", {"validation": "TRAIN"}, "measures agreement on a part of its queries"),
        ("noise_pool", {"student": {**digits.new("student"), "image": {"size": 16, "channels": 1}}}, "another size"),
    ],
)
def test_what_cannot_work_is_refused(name, changes, message, tmp_path, clerk):
    train = {"path": str(digits.saved() / "train.npz")}
    given = {"student": digits.new("student"), "data": data(name), "out": tmp_path / "out"}
    given |= {key: train if value == "TRAIN" else value for key, value in changes.items()}
    with pytest.raises(RequestError, match=message):
        lfm.distill(METHODS[name], teacher(), settings=lfm.Settings(quiet=True), **given)
    assert clerk.rows == 0


@pytest.mark.parametrize("values", [{"queries": 0}, {"measured": 1.0}, {"asking": 0}, {"halvings": 0}])
def test_parameters_have_ranges(values):
    with pytest.raises(ValueError, match=r"greater|less"):
        LabelOnly(**values)


def test_the_command_runs(tmp_path, capsys):
    command = ["distill", "noise_pool", json.dumps(teacher()), "--student", json.dumps(digits.new("student"))]
    command += ["--queries", "200", "--steps", "5", "-o", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "asks the teacher about 200 inputs" in told.out + told.err
    assert main(command) == 0
    assert metrics(tmp_path / "out")["queries"] == 200


# --- through an endpoint, and against a defence ---------------------------------------------------------------------


def test_an_endpoint_of_images_is_a_teacher_too(tmp_path):
    model = load_model(ModelRef.model_validate(digits.ref("teacher", digits.trained())))
    local = distilled(NoisePool(queries=120, steps=6), tmp_path / "local")
    with served({"digits": model}) as port:
        ref = {"ref": f"http://127.0.0.1:{port}/v1#digits", "access": "probs"}
        settings = lfm.Settings(quiet=True, threads=1, max_queries=120, ledger=tmp_path / "ledger.sqlite")
        out = tmp_path / "out"
        lfm.distill(NoisePool(queries=120, steps=6), ref, digits.new("student"), out=out, settings=settings)
    assert metrics(out)["queries"] == 120
    one, other = (load_file(folder / "model.safetensors") for folder in (local, out))
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def test_a_teacher_can_be_asked_through_a_defence(tmp_path, clerk):
    told = []
    answer = Asked._answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Asked, "_answers", lambda self, images: told.append(answer(self, images)) or told[-1])
        lfm.distill(
            NoisePool(queries=200, steps=5),
            {**teacher(), "defence": {"round": 1}},
            digits.new("student"),
            out=tmp_path / "out",
            settings=lfm.Settings(quiet=True, threads=1),
        )
    probs = torch.cat(told).exp()
    assert clerk.rows == len(probs) == 200
    assert torch.allclose(probs * 10, (probs * 10).round(), atol=1e-4)
