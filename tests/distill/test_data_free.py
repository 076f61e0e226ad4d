"""Learning without data: what inputs are made by, what must not change, and what students learn."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.distill import digits
from torch import nn
from torch.nn import functional as F

import lfm
from lfm.distill._contract import Scene, Space
from lfm.distill._picture import save_sheet
from lfm.distill._synthesis import Sealed, Synthesised
from lfm.distill.data_free._generator import Generator, latents
from lfm.distill.data_free._inversion import (
    Norms,
    agreement,
    balanced_classes,
    disagreement,
    moved,
    variation,
)
from lfm.distill.data_free.boundary import Boundary
from lfm.distill.data_free.contrastive_inversion import ContrastiveInversion, close_up
from lfm.distill.data_free.impressions import alike
from lfm.distill.data_free.inversion import Inversion
from lfm.distill.data_free.meta_generator import MetaGenerator
from lfm.errors import AccessError, LfmError, RequestError
from lfm.method import Access, methods_of
from lfm.models.open import open_model
from lfm.models.ref import ModelRef

QUIET = lfm.Settings(quiet=True)
SPACE = Space((1, 8, 8), torch.full((1, 1, 1), -0.8), torch.full((1, 1, 1), 1.8))
SMALL = {"steps": 6, "batch_size": 16}
ROUNDS = {"rounds": 2, "round_size": 20}
# the smallest run of each method
RUNS: dict[str, dict] = {
    "noise": {"pool": 40},
    "inversion": {**ROUNDS, "inversion_steps": 2, "tv": 1e-3, "l2": 1e-3, "flip": True},
    "meta_generator": {**ROUNDS, "inner_steps": 2, "warm_up": 1},
    "contrastive_inversion": {**ROUNDS, "inversion_steps": 2},
    "impressions": {**ROUNDS, "inversion_steps": 2},
    "boundary": {**ROUNDS, "walk_steps": 2, "tv": 1e-3},
    "adversarial": {"turn": 2, "one_hot": 1.0, "balance": 1.0},
    "generator": {"turn": 2},
    "retain": {"turn": 2},
}


def teacher(builder: str = "teacher") -> dict:
    return digits.ref(builder, digits.trained())


def distilled(method, out: Path, seed: int = 0, of: dict | None = None, settings=QUIET) -> nn.Module:
    lfm.distill(method, of or teacher(), digits.new("student"), out=out, seed=seed, settings=settings)
    return open_model(ModelRef(**digits.ref("student", out))).module


def scene(model, method, space: Space = SPACE, classes: int = 10) -> Scene:
    torch.manual_seed(0)
    return Scene(model, digits.student(), space, classes, method.batch_size, method.steps, torch.device("cpu"))


def opened(access: Access = Access.WEIGHTS):
    return open_model(ModelRef(**teacher()), access=access)


# --- what inputs are made by ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_statistics_equal_to_the_running_ones_are_no_distance_away() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)
    )
    images = torch.randn(16, 2, 6, 6)
    module.train()
    for norm in (module[1], module[5]):
        norm.momentum = 1.0
    module(images)
    for norm, count in ((module[1], 16 * 16), (module[5], 16)):
        norm.running_var *= (count - 1) / count  # it keeps the unbiased variance
    module.eval()
    # the second norm saw what the first one's batch statistics made, and in use sees what its running ones make
    norms = Norms.of(module)
    with norms.watched():
        module(images)
    assert float(norms.distance()) == pytest.approx(0, abs=1e-3)
    with norms.watched():
        module(2 * images + 1)
    assert float(norms.distance()) > 1
    assert norms.features().shape == (16, 3 + 4)
    assert not module[1]._forward_pre_hooks


def test_distance_is_the_sum_of_norms_that_are_not_squared() -> None:
    norm = nn.BatchNorm2d(2).eval()
    images = torch.randn(5, 2, 3, 3) * 3 + 1
    norms = Norms.of(norm)
    with norms.watched():
        norm(images)
    flat = images.transpose(0, 1).flatten(1).double().numpy()
    mean, variance = flat.mean(1), flat.var(1)
    expected = np.linalg.norm(mean) + np.linalg.norm(variance - 1)
    assert float(norms.distance()) == pytest.approx(expected, rel=1e-5)
    assert float(norms.distance(first=10.0)) == pytest.approx(10 * expected, rel=1e-5)
    past = [(torch.zeros(2), torch.ones(2))]  # as the running ones are: with all weight on them nothing is left
    assert float(norms.distance(past=past, momentum=0.9)) == pytest.approx(0.1 * expected, rel=1e-4)


def test_variation_of_a_constant_is_zero_and_has_no_slope() -> None:
    images = torch.full((2, 3, 5, 4), 0.7, requires_grad=True)
    loss = variation(images)
    loss.backward()
    assert float(loss.detach()) == 0
    assert images.grad is not None
    assert not images.grad.any()
    edge = torch.zeros(1, 1, 2, 2)
    edge[..., 1] = 1.0  # right: 2 differences of 1, down: none, the diagonals: one each
    assert float(variation(edge)) == pytest.approx(2**0.5 + 1 + 1, abs=1e-4)


def test_agreement_and_disagreement() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 4)
    assert float(agreement(logits, logits)) == pytest.approx(1)
    assert float(agreement(logits, -3 * logits)) < 1
    assert float(disagreement(logits, logits)) == pytest.approx(0, abs=1e-6)
    other = logits.flip(1)
    apart = F.kl_div(other.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="none").sum(1)
    same = logits.argmax(1) == other.argmax(1)
    assert float(disagreement(logits, other)) == pytest.approx(float((apart * same).mean()), abs=1e-6)
    assert float(disagreement(logits, other, agreed=False)) == pytest.approx(float(apart.mean()), rel=1e-5)


@pytest.mark.parametrize("count", [7, 10, 23])
def test_classes_are_balanced(count: int) -> None:
    found = balanced_classes(count, 10).bincount(minlength=10)
    assert int(found.sum()) == count
    assert int(found.max() - found.min()) <= 1


def test_images_are_moved_and_not_changed() -> None:
    images = torch.arange(32.0).view(2, 1, 4, 4)
    for _ in range(5):
        found = moved(images, 2, flip=True)
        assert torch.equal(found.flatten(1).sort().values, images.flatten(1))
    assert moved(images, 0) is images
    assert close_up(images).shape == images.shape


@pytest.mark.parametrize("end", ["range", "free", "norm"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (4, 1, 3), (3, 32, 30)])
def test_generators_make_images_of_any_size_in_range(shape: tuple[int, int, int], end: str) -> None:
    space = Space(shape, torch.full((shape[0], 1, 1), -1.5), torch.full((shape[0], 1, 1), 2.0))
    made = Generator(space, 6, 4, end)
    images = made(latents(5, made, torch.device("cpu"))).detach()
    assert images.shape == (5, *shape)
    assert float(images.min()) >= -1.5
    assert float(images.max()) <= 2.0


def test_likeness_of_classes() -> None:
    weights = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(alike(weights), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_sheet_of_images(tmp_path: Path) -> None:
    images = torch.stack([SPACE.low.expand(1, 8, 8), SPACE.high.expand(1, 8, 8), SPACE.low.expand(1, 8, 8)])
    save_sheet(images, SPACE, tmp_path / "sheet.png")
    found = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert found.shape == (2 * 34, 2 * 34, 3)
    assert (found[:32, :32] == 0).all()
    assert (found[:32, 34:66] == 255).all()
    assert (found[34:, 34:] == 255).all()  # where there is no image


# --- what must hold for every method --------------------------------------------------------------------------------


def test_every_method_is_run_here() -> None:
    here = {name for name, card in methods_of("distill").items() if ".data_free." in card.module}
    assert here == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_runs_and_leaves_the_teacher_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students = import_module("lfm.distill._students")  # `lfm.distill` is the function
    kept = []
    real = students.open_in

    def watched(*args, **named):
        kept.append(real(*args, **named))
        return kept[-1]

    monkeypatch.setattr(students, "open_in", watched)
    method = methods_of("distill")[name].load()(**SMALL, **RUNS[name])
    student = distilled(method, tmp_path / "out")
    [handle] = kept
    assert handle.access == type(method).needs.access
    module = handle._Model__backend.module  # what the handle hides
    known = load_file(digits.trained() / "model.safetensors")
    assert all(torch.equal(tensor, known[key]) for key, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())
    made = load_file(tmp_path / "out" / "synthesised.safetensors")
    assert made["images"].shape[1:] == (1, 8, 8)
    assert (tmp_path / "out" / "synthesised.png").is_file()
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert {"synthesised_confidence", "synthesised_diversity"} <= set(lineage["metrics"])


@pytest.mark.parametrize("name", ["inversion", "meta_generator", "contrastive_inversion", "adversarial", "retain"])
def test_killed_and_taken_up_again_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {"spread": 1.0} if "rounds" in RUNS[name] else {}  # the second one is made at step 3
    method = methods_of("distill")[name].load()(**SMALL, **RUNS[name], **rounds)
    distilled(method, tmp_path / "whole")
    real = Synthesised.batch

    def killed(self, number):
        if number == 4:
            raise KeyboardInterrupt
        return real(self, number)

    often = lfm.Settings(quiet=True, save_seconds=0)
    with monkeypatch.context() as patched:
        patched.setattr(Synthesised, "batch", killed)
        with pytest.raises(KeyboardInterrupt):
            distilled(method, tmp_path / "killed", settings=often)
    seen = []

    def counted(self, number):
        seen.append(number)
        return real(self, number)

    monkeypatch.setattr(Synthesised, "batch", counted)
    distilled(method, tmp_path / "killed", settings=often)
    assert seen == [4, 5]
    for file in ("model.safetensors", "synthesised.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_asking_for_data_is_a_fault() -> None:
    with pytest.raises(LfmError, match="data was asked for where there is to be none"):
        Sealed(None).rows(lfm.DataSpec(path="digits.npz"))  # type: ignore[arg-type]


def test_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="makes its own inputs and reads no data"):
        lfm.distill(
            "inversion", teacher(), digits.new("student"), out=tmp_path / "out", data=digits.saved() / "train.npz"
        )


def test_boundary_runs_on_gradients_alone_and_inversion_does_not() -> None:
    handle = opened(Access.GRADIENTS)
    method = Boundary(rounds=1, round_size=8, walk_steps=2)
    assert method.synthesiser(scene(handle, method)).images(0).shape == (method.batch_size, 1, 8, 8)
    with pytest.raises(AccessError, match="its module cannot be had"):
        Inversion().synthesiser(scene(handle, Inversion()))


def test_without_batch_norms_inversion_says_so_and_others_refuse() -> None:
    torch.manual_seed(0)
    handle = open_model(ModelRef(**digits.new("plain_student")))
    method = Inversion(rounds=1, round_size=10, inversion_steps=2)
    made = method.synthesiser(scene(handle, method))
    assert "no batch norms" in made.notes[0]
    assert made.images(0).isfinite().all()
    for other in (MetaGenerator(), ContrastiveInversion()):
        with pytest.raises(RequestError, match="has no batch norms"):
            other.synthesiser(scene(handle, other))


# --- what is learned ------------------------------------------------------------------------------------------------


def test_inverted_images_are_what_the_teacher_was_asked_for() -> None:
    """And their statistics come closer to the running ones than those of noise."""
    handle = opened()
    method = Inversion(rounds=1, round_size=100, inversion_steps=60, compete=0.0)
    made = method.synthesiser(scene(handle, method))
    torch.manual_seed(0)
    made.images(0)
    pool = made.tensors["pool"]
    said = handle.logits({"pixel_values": pool}).argmax(1)
    assert said.bincount(minlength=10).min() >= 4
    norms = Norms.of(handle.module)
    distances = []
    for images in (pool, torch.randn_like(pool)):
        with norms.watched(), torch.no_grad():
            handle.module(images)
        distances.append(float(norms.distance()))
    assert distances[0] < 0.4 * distances[1]


def test_students_learn_digits_without_seeing_one(tmp_path: Path) -> None:
    """The same steps on noise bring far less."""
    same = {"steps": 300, "batch_size": 96}
    noise = digits.accuracy(distilled(methods_of("distill")["noise"].load()(**same), tmp_path / "noise"))
    made = Inversion(**same, rounds=2, round_size=200, inversion_steps=80)
    inverted = digits.accuracy(distilled(made, tmp_path / "inversion"))
    assert inverted >= 0.82
    assert inverted >= noise + 0.04
