"""What the updates do to matrices that are drawn, and equality with what the authors' code does to a tiny model."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.golden.rome_memit import make as golden

from lfm.edit._contract import Layer, LeastSquares
from lfm.edit._least_squares import Editor, layers_of
from lfm.edit._statistics import Statistics
from lfm.edit.alpha_edit import AlphaEdit
from lfm.edit.emmet import Emmet
from lfm.edit.ft_l import FtL
from lfm.edit.memit import Memit
from lfm.edit.rome import Rome

WIDTH, OUTPUTS = 24, 10
seeds = st.integers(0, 2**31)


def layer(seed: int, count: int, *, earlier: int = 0) -> tuple[torch.Tensor, Layer]:
    """Return a matrix, and what an update of it is made of."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    text = drawn(WIDTH, 3 * WIDTH) * torch.logspace(0, -2, WIDTH, dtype=torch.float64)[:, None]
    old = drawn(WIDTH, earlier)
    return drawn(OUTPUTS, WIDTH), Layer(
        drawn(WIDTH, count), drawn(OUTPUTS, count), text @ text.T / text.shape[1], old @ old.T
    )


def rank(change: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(change, rtol=1e-9))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, keys=st.sampled_from(["averaged", "bare"]))
def test_rome_gives_the_value_for_the_key_by_a_change_of_rank_one(seed, keys):
    before, given_ = layer(seed, 1)
    change = given_.residuals @ Rome(keys=keys).rows(given_)
    torch.testing.assert_close((before + change) @ given_.keys, before @ given_.keys + given_.residuals)
    assert rank(change) == 1


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_rome_with_both_keys_gives_the_value_for_each_of_them(seed):
    before, given_ = layer(seed, 2)
    change = given_.residuals @ Rome(keys="both").rows(given_)
    torch.testing.assert_close((before + change) @ given_.keys, before @ given_.keys + given_.residuals)
    assert rank(change) == 2


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_no_other_change_that_gives_the_value_is_seen_less_by_ordinary_text(seed):
    _, given_ = layer(seed, 1)
    rows = Rome(keys="averaged").rows(given_)
    aside = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    aside -= (aside @ given_.keys) / (given_.keys.T @ given_.keys) @ given_.keys.T  # so that the key gives it still
    seen = [float(torch.trace(one @ given_.covariance @ one.T)) for one in (rows, rows + 0.1 * aside)]
    assert seen[0] <= seen[1]


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_memit_of_one_edit_is_rome_where_nothing_is_held_against_it(seed):
    _, given_ = layer(seed, 1)
    rome, memit = Rome(keys="averaged").rows(given_), Memit(knowledge=1e-4).rows(given_)
    assert (memit - rome).norm() < 1e-4 * rome.norm()


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(1, 8))
def test_emmet_gives_each_key_its_value_and_memit_falls_short(seed, count):
    before, given_ = layer(seed, count)
    wanted = before @ given_.keys + given_.residuals
    exact = before + given_.residuals @ Emmet().rows(given_)
    torch.testing.assert_close(exact @ given_.keys, wanted, rtol=1e-6, atol=1e-6)
    near = before + given_.residuals @ Memit(knowledge=1e4).rows(given_)
    assert (near @ given_.keys - wanted).norm() > 1e-3


def test_two_edits_of_one_key_share_it():
    _, given_ = layer(0, 1)
    twice = Layer(given_.keys.repeat(1, 2), torch.eye(2, dtype=torch.float64), given_.covariance, given_.earlier)
    torch.testing.assert_close(
        twice.residuals @ Emmet().rows(twice) @ given_.keys, torch.full((2, 1), 0.5, dtype=torch.float64)
    )


@settings(deadline=None, max_examples=25)
@given(seed=seeds, count=st.integers(1, 4), share=st.floats(0.01, 0.2))
def test_alpha_edit_leaves_the_space_of_ordinary_text_alone(seed, count, share):
    _, given_ = layer(seed, count)
    values, vectors = torch.linalg.eigh(given_.covariance)
    kept = vectors[:, values.cumsum(0) > share * values.sum()]
    rows = AlphaEdit(null_space=share).rows(given_)
    assert rows.norm() > 0
    torch.testing.assert_close(rows @ kept, torch.zeros(count, kept.shape[1], dtype=torch.float64), rtol=0, atol=1e-9)


def test_alpha_edit_and_memit_hold_on_to_earlier_edits():
    _, given_ = layer(3, 2, earlier=2)
    old = torch.linalg.eigh(given_.earlier)[1][:, -2:]
    heavy = Layer(given_.keys, given_.residuals, given_.covariance, 1e6 * given_.earlier)
    for method in (AlphaEdit(null_space=0.3), Memit(knowledge=1.0)):
        free = Layer(given_.keys, given_.residuals, given_.covariance, torch.zeros_like(given_.earlier))
        assert (method.rows(heavy) @ old).norm() < 0.1 * (method.rows(free) @ old).norm()


def test_the_bound_of_ft_l_holds_wherever_a_step_ends():
    before = [torch.zeros(3, 4)]
    now = [torch.randn(3, 4, generator=torch.Generator().manual_seed(0))]
    FtL(epsilon=0.25).bound(before, now)
    assert float(now[0].abs().max()) <= 0.25
    torch.testing.assert_close(now[0], now[0].clamp(-0.25, 0.25))


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """The tiny model of tests/golden/rome_memit, what was put into the authors' code, and what came out."""
    import lfm

    folder = tmp_path_factory.mktemp("tiny")
    golden.model_and_words(str(folder))
    covariances, values = golden.given()
    names = {n: f"transformer.h.{n}.mlp.c_proj" for n in covariances}
    known = Statistics({names[n]: c.double() for n, c in covariances.items()}, 1)
    return lfm.load(folder), known, values.double(), json.loads((golden.HERE / "results.json").read_text())


def changes(authors, method: LeastSquares, count: int, monkeypatch) -> list[torch.Tensor]:
    """Return what our engine adds to each matrix, as it is stored, for the values that the authors' code was given."""
    from lfm.data.requests import Request
    from lfm.edit import _least_squares
    from lfm.edit._targets import Values

    model, known, values, _ = authors
    found = Values(values[:count], torch.zeros(count), 1)
    monkeypatch.setattr(_least_squares, "find_values", lambda *_: found)
    before = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    editor = Editor(method, model, layers_of(method, model), known, golden.CONTEXTS)
    update = editor.update([Request(p, target, subject) for p, subject, target in golden.FACTS[:count]])
    after = dict(model.module.named_parameters())
    added = [after[name].detach() - before[name] for name in update.changes]
    model.module.load_state_dict(before, strict=False)
    return added


def test_rome_as_published_is_the_authors_update(authors, monkeypatch):
    [ours] = changes(authors, Rome(layers=[1], keys="published", ridge=0), 1, monkeypatch)
    theirs = torch.tensor(authors[3]["rome"])
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_memit_is_the_authors_update_block_by_block(authors, monkeypatch):
    method = Memit(layers=list(golden.LAYERS), knowledge=golden.LAMBDA, ridge=0)
    for ours, theirs in zip(changes(authors, method, 2, monkeypatch), authors[3]["memit"], strict=True):
        wanted = torch.tensor(theirs)  # (keys, outputs), as Conv1D stores it
        assert (ours - wanted).norm() < 1e-4 * wanted.norm()
