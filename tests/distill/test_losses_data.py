"""The numerical contract of the losses: zero where nothing is left to learn, the formulas, the peers' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.golden.repdistiller.make import inputs
from torch import nn
from torch.nn import functional as F

from lfm.distill._contract import Said, Taught
from lfm.distill._features import projections
from lfm.distill._losses import divergence, jensen_shannon, kl
from lfm.distill._watching import matched
from lfm.distill.affinity import Affinity, _difference
from lfm.distill.attention_transfer import AttentionTransfer
from lfm.distill.born_again import BornAgain
from lfm.distill.crd import Crd, _contrast
from lfm.distill.dkd import Dkd, _decoupled
from lfm.distill.fitnets import Fitnets
from lfm.distill.g2sd import G2sd
from lfm.distill.mutual import Mutual
from lfm.distill.response import Response
from lfm.distill.rkd import Rkd
from lfm.distill.similarity import Similarity
from lfm.distill.simkd import Simkd
from lfm.errors import RequestError

PEERS = json.loads((Path(__file__).parents[1] / "golden" / "repdistiller" / "results.json").read_text())
X = inputs()


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (6, 7)), generator=torch.Generator().manual_seed(seed)) * 3


def turned(state: torch.Tensor) -> torch.Tensor:
    """Return hidden states in a space that is turned: channels are mixed by an orthogonal matrix."""
    width = state.shape[1]
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))
    return (state.movedim(1, -1) @ turn).movedim(-1, 1)


def taught(teacher, student, extras=None, labels=None, mask=None, progress=1.0) -> Taught:
    said = logits(0)
    return Taught(Said(said, tuple(teacher), mask), Said(said, tuple(student), mask), labels, extras, progress)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_logits_give_nothing_to_learn(kind, temperature):
    student = logits(1).requires_grad_()
    loss = divergence(logits(1) + 5, student, kind=kind, temperature=temperature)  # a constant changes nothing
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert student.grad.abs().max() < 1e-5


def test_gradients_keep_their_size_when_the_temperature_rises():
    sizes = []
    for temperature in (20.0, 50.0, 200.0):
        student = logits(1).requires_grad_()
        divergence(logits(2), student, temperature=temperature).backward()
        sizes.append(student.grad)
    centred = [rows - rows.mean(-1, keepdim=True) for rows in (logits(1), logits(2))]
    limit = (centred[0] - centred[1]) / 7 / 6  # (s - t) / N, mean over 6 rows
    assert torch.allclose(sizes[-1], limit, rtol=0.05, atol=2e-3)
    assert sizes[0].norm() / sizes[-1].norm() == pytest.approx(1, abs=0.15)


def test_jensen_shannon_tends_to_the_two_divergences():
    teacher, student = logits(1).double(), logits(2).double()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for beta, limit in ((1e-5, kl(p, q)), (1 - 1e-5, kl(q, p))):
        found = jensen_shannon(teacher, student, beta=beta)
        assert float(found / (beta * (1 - beta))) == pytest.approx(float(limit.mean()), rel=1e-3)


def test_the_divergence_is_the_decoupled_sum():
    teacher, student, labels = logits(1).double(), logits(2).double(), X["labels"]
    tckd, nckd = _decoupled(teacher, student, labels)
    right = teacher.softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert torch.allclose(tckd + (1 - right) * nckd, kl(teacher.log_softmax(-1), student.log_softmax(-1)))


def test_dkd_is_the_papers_formula_written_slowly():
    method = Dkd(temperature=2.0, alpha=0.7, beta=3.0, labels=0.5, ramp=0.5)
    teacher, student, labels = logits(1), logits(2), X["labels"]
    tckd = nckd = 0.0
    for t, s, c in zip(teacher / 2, student / 2, labels.tolist(), strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        tckd += float(p[c] * (p[c] / q[c]).log() + (1 - p[c]) * ((1 - p[c]) / (1 - q[c])).log()) / 6
        for i in range(7):
            if i != c:
                first, second = p[i] / (1 - p[c]), q[i] / (1 - q[c])
                nckd += float(first * (first / second).log()) / 6
    found = method.terms(Taught(Said(teacher), Said(student), labels, None, 0.25))
    assert float(found["target"]) == pytest.approx(4 * 0.7 * tckd * 0.5, rel=1e-3)
    assert float(found["others"]) == pytest.approx(4 * 3.0 * nckd * 0.5, rel=1e-3)
    assert float(found["labels"]) == pytest.approx(0.5 * float(F.cross_entropy(student, labels)))


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_dkd_stays_finite_where_the_teacher_is_sure_and_takes_its_choice_without_labels():
    teacher = torch.zeros(2, 4)
    teacher[:, 1] = 200.0
    student = torch.zeros(2, 4).requires_grad_()
    found = Dkd().terms(Taught(Said(teacher), Said(student)))
    sum(found.values()).backward()
    assert student.grad.isfinite().all()
    assert set(found) == {"target", "others"}
    same = Dkd().terms(Taught(Said(teacher), Said(student), torch.tensor([1, 1])))
    assert float(same["target"]) == float(found["target"])


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("dkd")])
def test_dkd_is_mdistillers(name):
    temperature, beta = map(float, name.split()[1:])
    method = Dkd(temperature=temperature, beta=beta, labels=0, ramp=0)
    found = method.terms(Taught(Said(X["teacher"]), Said(X["student"]), X["labels"]))
    assert float(sum(found.values())) == pytest.approx(PEERS[name], rel=1e-4)


def test_answers_without_labels_have_their_whole_weight():
    for method in (Response(), Rkd(), BornAgain()):
        features = (X["teacher_features"],)
        found = method.terms(taught(features, features))
        assert "labels" not in found
    some, all_of_it = (
        float(method.terms(Taught(Said(logits(1)), Said(logits(2)), labels))["answers"])
        for method, labels in ((BornAgain(alpha=0.25), X["labels"]), (BornAgain(alpha=0.25), None))
    )
    assert some == pytest.approx(all_of_it / 4)


# --- relations and hidden states ------------------------------------------------------------------------------------


def test_relations_are_repdistillers():
    features = ([X["teacher_features"]], [X["student_features"]])
    found = Rkd().terms(taught(*features))
    assert float(found["distances"]) == pytest.approx(PEERS["rkd_distance"], rel=1e-4)
    assert float(found["angles"]) == pytest.approx(PEERS["rkd_angle"], rel=1e-4)
    maps = taught([X["teacher_maps"]], [X["student_maps"]])
    assert float(Similarity(weight=1.0).terms(maps)["similarity"]) == pytest.approx(PEERS["similarity"], rel=1e-4)
    attention = AttentionTransfer(weight=1.0).terms(maps)["attention"]
    assert float(attention) / 16 == pytest.approx(PEERS["attention"], rel=1e-4)  # theirs is the mean over 4 x 4 places


def test_the_contrast_is_repdistillers():
    found = _contrast(X["exponents"], X["exponents"].mean(), None)
    assert float(found) == pytest.approx(PEERS["contrast"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "shape"),
    [(Rkd(), (6, 12)), (Similarity(), (6, 8, 4, 4)), (Affinity(projections=None), (6, 8, 4, 4)), (Affinity(), (6, 12))],
)
def test_relations_do_not_change_when_the_students_space_is_turned(method, shape):
    teacher, student = logits(1, *shape), logits(2, *shape)
    torch.manual_seed(0)
    before = method.terms(taught([teacher], [student]))
    torch.manual_seed(0)
    after = method.terms(taught([teacher], [turned(student)]))
    for name, value in before.items():
        assert float(after[name]) == pytest.approx(float(value), rel=1e-3)
        if name != "answers":
            assert float(value) > 0.01


def test_the_estimate_of_the_affinity_tends_to_the_exact_value():
    teacher, student = (F.normalize(logits(seed, 4, 30, 8), dim=-1) for seed in (1, 2))
    exact = float(_difference(teacher, student, None))
    torch.manual_seed(0)
    assert float(_difference(teacher, student, 20_000)) == pytest.approx(exact, rel=0.05)
    few = torch.stack([_difference(teacher, student, 4) for _ in range(500)])
    assert float(few.mean()) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("shape", [(6, 8, 4, 4), (6, 5, 8), (6, 8)])
@pytest.mark.parametrize(
    "method", [Fitnets(), AttentionTransfer(), Similarity(), Affinity(), G2sd(), Simkd(), Rkd(), BornAgain(), Mutual()]
)
@torch.no_grad()
def test_a_student_that_is_the_teacher_has_nothing_to_learn(method, shape):
    if (isinstance(method, AttentionTransfer) and len(shape) == 2) or (isinstance(method, Rkd) and len(shape) > 2):
        return
    state = logits(1, *shape)
    extras = projections([shape[1:]], [shape[1:]]) if isinstance(method, (Fitnets, G2sd, Simkd)) else None
    for progress in (0.0, 1.0):
        found = method.terms(taught([state], [state], extras, progress=progress))
        assert float(sum(found.values())) == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_padding_takes_no_part():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    teacher, student = logits(1, 2, 3, 8), logits(2, 2, 3, 8)
    other = [state.clone() for state in (teacher, student)]
    for state in other:
        state[1, 1:] = 100.0
    extras = projections([(3, 8)], [(3, 8)])
    for method in (Fitnets(), AttentionTransfer(), Similarity(), Affinity(projections=None), G2sd(generic=1.0)):
        values = [
            float(sum(method.terms(taught([one], [two], extras, mask=mask, progress=0.5)).values()))
            for one, two in ((teacher, student), other)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_one_example_alone_gives_numbers():
    for method in (Rkd(), Similarity(), Affinity()):
        student = logits(2, 1, 12).requires_grad_()
        loss = sum(method.terms(taught([logits(1, 1, 12)], [student])).values())
        loss.backward()
        assert loss.isfinite()
        assert student.grad is None or student.grad.isfinite().all()


def test_shapes_that_cannot_be_matched_are_refused():
    with pytest.raises(RequestError, match="no places"):
        AttentionTransfer().terms(taught([logits(1, 6, 8)], [logits(1, 6, 8)]))
    extras = projections([(8,)], [(8, 4, 4)])
    with pytest.raises(RequestError, match="cannot be matched"):
        Fitnets().terms(taught([logits(1, 6, 8)], [logits(1, 6, 8, 4, 4)], extras))


# --- a memory -------------------------------------------------------------------------------------------------------


def test_the_memory_holds_the_latest_and_leaves_out_the_same_label():
    method = Crd(negatives=8, size=4)
    torch.manual_seed(0)
    extras = method.connectors([(5,)], [(3,)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batch = taught([logits(1, 6, 5)], [logits(2, 6, 3)], extras, labels)
    extras.eval()
    method.terms(batch)
    assert extras.labels.tolist() == [-1] * 8  # it learns nothing while it is only measured
    extras.train()
    method.terms(batch)
    assert extras.labels.tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    method.terms(batch)
    assert extras.labels.tolist() == [2, 0, 1, 2, 1, 2, 0, 1]
    exponents = torch.ones(2, 3)
    other = torch.tensor([[True, False], [True, True]])
    one, both = (float(_contrast(exponents[row : row + 1], torch.tensor(1.0), other[row : row + 1])) for row in (0, 1))
    assert both - one == pytest.approx(float(torch.log1p(torch.tensor(0.5))))


# --- layers ---------------------------------------------------------------------------------------------------------


def test_layers_are_matched_evenly_or_by_a_map():
    assert matched(4, 12, "last") == [(3, 11)]
    assert matched(4, 12, "all") == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert matched(6, 3, "all") == [(1, 0), (3, 1), (5, 2)]
    assert matched(3, 3, "all") == [(0, 0), (1, 1), (2, 2)]
    assert matched(4, 12, {0: 1, -1: -1}) == [(0, 1), (3, 11)]
    with pytest.raises(RequestError, match="the student has no layer 4"):
        matched(4, 12, {4: 0})
    with pytest.raises(RequestError, match="without layers"):
        matched(0, 12, "all")


def test_a_folded_output_layer_is_the_projection_and_the_teachers():
    extras = projections([(12,)], [(5,)])
    teacher = nn.Linear(12, 7)
    head = Simkd().head(extras, teacher)
    features = X["student_features"]
    assert torch.allclose(head(features), teacher(extras[0](features)), atol=1e-5)
