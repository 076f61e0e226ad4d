"""Arcee Fusion against its definition in float64, where small changes are not lost in rounding."""

import numpy as np
import pytest
import torch
from tests.merging import merge, near, tensors

from lfm.reuse.merge.arcee_fusion import ArceeFusion

SHAPES = {"conv": (4, 3, 2, 5), "matrix": (33, 21), "one": (), "vector": (50,), "void": (0, 4)}
BASE = tensors(0, shapes=SHAPES)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def importance(source, base):
    """|change| times the divergence of the distributions that the rows stand for, element by element."""
    found = np.zeros(source.shape)
    for place in np.ndindex(source.shape[:-1]):
        p, q = softmax(source[place]), softmax(base[place])
        divergence = sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))
        found[place] = abs(source[place] - base[place]) * divergence
    return found


def kept(source, base, fence=1.5):
    scores = importance(source, base)
    order = sorted(scores.ravel())
    first, median, third = (order[int(share * (len(order) - 1))] for share in (0.25, 0.5, 0.75))
    return scores >= median + fence * (third - first)


@pytest.mark.parametrize("fence", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.1, 2.0])
def test_weights_of_great_importance_are_taken_over(size, dtype, fence, tmp_path):
    base, source = ({n: t.to(dtype) for n, t in model.items()} for model in (BASE, near(BASE, 1, size)))
    found = merge(ArceeFusion(fence=fence), [source], base, at=tmp_path)
    for name in ("conv", "matrix", "vector"):
        mask = torch.tensor(kept(source[name].double().numpy(), base[name].double().numpy(), fence))
        assert torch.equal(found[name], torch.where(mask, source[name], base[name]))
        assert mask.float().mean() < 0.8
        assert mask.any() or name == "vector"
    assert found["one"] == source["one"]  # one number is its own threshold
    assert found["void"].shape == (0, 4)


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_small_changes_are_ranked_by_their_divergence_and_not_by_rounding(size, tmp_path):
    """1 % of the choice may differ, where importance is equal to the threshold to within rounding of the weights."""
    base = {"w": tensors(3, shapes={"w": (200, 256)})["w"] * 0.02}
    scale = torch.linspace(0.5, 1.5, 200)[:, None]
    source = {"w": base["w"] + size * scale * tensors(4, shapes={"w": (200, 256)})["w"]}
    found = merge(ArceeFusion(), [source], base, at=tmp_path)["w"]
    expected = kept(source["w"].double().numpy(), base["w"].double().numpy())
    assert ((found != base["w"]).numpy() != expected).mean() < 0.01 * expected.mean()


def test_rows_that_changed_much_are_taken_over_before_others(tmp_path):
    base = torch.zeros(8, 16)
    source = base + 0.01 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    source[5] *= 10
    found = merge(ArceeFusion(), [{"w": source}], {"w": base}, at=tmp_path)["w"]
    taken = (found != 0).float().mean(1)
    assert taken[5] > 0.8
    assert taken[[0, 1, 2, 3, 4, 6, 7]].mean() < 0.1


def test_a_source_that_is_the_base_gives_the_base(tmp_path):
    odd = {**BASE, "odd": torch.tensor([-0.0, 0.0, 1e-40, -1e-44, 3e38, 1.0])}
    found = merge(ArceeFusion(), [odd], odd, at=tmp_path)
    assert all(torch.equal(found[name].view(torch.int32), odd[name].view(torch.int32)) for name in odd)


def test_distributions_far_apart_do_not_overflow(tmp_path):
    base = {"w": torch.tensor([[0.0, 0, 0, 0], [500.0, 0, 0, 0], [1.0, 2, 3, 4]])}
    source = {"w": torch.tensor([[0.0, 0, 0, 0.1], [0, 500.0, 0, 0], [1.0, 2, 3, 4.5]])}
    found = merge(ArceeFusion(), [source], base, at=tmp_path)["w"]
    assert found[1].tolist() == [0, 500, 0, 0]
    assert torch.isfinite(found).all()


def test_threads_and_blocks_do_not_show(tmp_path):
    base = {"w": torch.randn(900, 100, generator=torch.Generator().manual_seed(0))}
    one, two = (merge(ArceeFusion(), [near(base, 1)], base, at=tmp_path, threads=n)["w"] for n in (1, 2))
    mask = torch.tensor(kept(near(base, 1)["w"].double().numpy(), base["w"].double().numpy()))
    assert torch.equal(one, two)
    assert ((one != base["w"]) != mask).sum() <= 5  # next to the threshold, float32 decides
