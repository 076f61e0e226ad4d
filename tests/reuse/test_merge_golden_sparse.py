"""Merges of task vectors made sparse by size, against slow float64 references written element by element."""

import numpy as np
import pytest
import torch
import yaml
from tests.merging import load, merge, near, save, tensors

import lfm
from lfm.reuse.merge.breadcrumbs import Breadcrumbs
from lfm.reuse.merge.breadcrumbs_ties import BreadcrumbsTies
from lfm.reuse.merge.dare_linear import DareLinear
from lfm.reuse.merge.dare_ties import DareTies
from lfm.reuse.merge.della import Della
from lfm.reuse.merge.della_linear import DellaLinear
from lfm.reuse.merge.magmax import Magmax
from lfm.reuse.merge.ram import Ram
from lfm.reuse.merge.ramplus import Ramplus
from lfm.reuse.merge.sce import Sce
from lfm.reuse.merge.ties import Ties

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "embed.weight": (16, 5),
    "layers.0.conv": (4, 3, 2, 2),
    "layers.0.bias": (7,),
    "layers.1.weight": (6, 6),
    "none": (0, 4),
    "scale": (),
}
LAYERS = [["embed.weight"], ["layers.0.conv", "layers.0.bias"], ["layers.1.weight"], ["none", "scale"]]
BASE = tensors(0, shapes=SHAPES)
SOURCES = [near(BASE, seed) for seed in (1, 2, 3)]
WEIGHTS = [0.5, 2.0, -0.75]
ALL = [Ties, Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, Della, DellaLinear, Magmax, Ram, Ramplus, Sce]


def cast(model, dtype):
    return {name: tensor.to(dtype) for name, tensor in model.items()}


def sparse(model, seed, share=0.5):
    """What reinforcement learning could have made of a model: a share of its weights is as it was."""
    generator = torch.Generator().manual_seed(100 + seed)
    tuned = near(model, seed)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=generator) < share, tuned[name], tensor)
        for name, tensor in model.items()
    }


def flat(model, names):
    return np.concatenate([model[name].double().numpy().ravel() for name in names])


def changes(base, sources, names):
    """The task vectors of some tensors, rounded to float32 as the arithmetic of merging is."""
    return [(flat(source, names).astype("f4") - flat(base, names).astype("f4")).astype("f8") for source in sources]


def agrees(found, base, sources, reference, scope="tensor"):
    """Whether base + reference(task vectors) came out, to within the rounding of its type and of sums in float32."""
    dtype = base["scale"].dtype
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        name: (dtype, shape) for name, shape in SHAPES.items()
    }
    groups = {"tensor": [[name] for name in SHAPES], "layer": LAYERS, "global": [list(SHAPES)]}[scope]
    for names in groups:
        if flat(base, names).size:
            expected = flat(base, names) + reference(changes(base, sources, names))
            np.testing.assert_allclose(flat(found, names), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)
    return True


# --- the papers


def trimmed(tau, density):
    """Keep the largest, and all that are as large as the smallest one kept."""
    count = max(int(density * len(tau)), 1) if density else 0
    least = sorted(abs(tau), reverse=True)[count - 1] if count else np.inf
    return np.where(abs(tau) >= least, tau, 0)


def middle(tau, density, outliers):
    """Keep what lies between the small and the very large, and all that are as large as the smallest or largest."""
    count = int(density * len(tau))
    skipped = min(int(outliers * len(tau)), len(tau) - count)
    sizes = sorted(abs(tau), reverse=True)[skipped : skipped + count]
    return np.where((abs(tau) >= sizes[-1]) & (abs(tau) <= sizes[0]), tau, 0) if sizes else 0 * tau


def restored(tau, kept):
    return kept * abs(tau).sum() / abs(kept).sum() if kept.any() else kept


def added(taus, weights, divide=False):
    return sum(weight * tau for weight, tau in zip(weights, taus, strict=True)) / (sum(weights) if divide else 1)


def elected(taus, weights, divide=True, rules="paper"):
    merged = np.zeros_like(taus[0])
    for i in range(len(merged)):
        weighted = [weight * tau[i] for weight, tau in zip(weights, taus, strict=True)]
        sign = np.sign(sum(weighted)) or (1 if rules == "mergekit" else 0)
        agreeing = [j for j, value in enumerate(weighted) if value != 0 and np.sign(value) == sign]
        if agreeing:
            by = sum(weights[j] if rules == "mergekit" else abs(weights[j]) for j in agreeing) if divide else 1
            merged[i] = sum(weighted[j] for j in agreeing) / by
    return merged


def ram(taus, epsilon, factors):
    merged = np.zeros_like(taus[0])
    for i in range(len(merged)):
        changed = [j for j, tau in enumerate(taus) if abs(tau[i]) > epsilon]
        if len(changed) == 1:
            merged[i] = factors[changed[0]] * taus[changed[0]][i]
        elif changed:
            merged[i] = sum(taus[j][i] for j in changed) / len(changed)
    return merged


def ramplus(taus, r, alpha, epsilon):
    changed = np.array([abs(tau) > epsilon for tau in taus])
    factors = []
    for own in changed:
        shared, unique = (own & (changed.sum(0) > 1)).sum(), (own & (changed.sum(0) == 1)).sum()
        factors.append(1 + r * min(shared / unique, alpha) if unique else 1)
    return ram(taus, epsilon, factors)


def sce(taus, share, rules="paper"):
    variance = np.var(taus, axis=0)
    count = int(share * np.count_nonzero(variance))
    if share < 1:
        least = sorted(variance, reverse=True)[count - 1] if count else np.inf
        taus = [np.where(variance >= least, tau, 0) for tau in taus]
    energies = [np.square(tau).mean() for tau in taus]
    if sum(energies) < (1e-6 if rules == "mergekit" else 1e-300):
        energies = [1] * len(taus)
    merged = np.zeros_like(taus[0])
    for i in range(len(merged)):
        values = [tau[i] for tau in taus]
        sign = np.sign(sum(values)) or (1 if rules == "mergekit" else 0)
        left = [j for j, value in enumerate(values) if value != 0 and np.sign(value) == sign]
        if left:
            merged[i] = sum(energies[j] * values[j] for j in left) / sum(energies[j] for j in left)
    return merged


# --- TIES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.77, 1])
@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_ties_trims_elects_and_averages(scope, density, weights, dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(Ties(density=density, scale=1.5, scope=scope), sources, base, at=tmp_path, weights=weights)

    def reference(taus):
        return 1.5 * elected([trimmed(tau, density) for tau in taus], weights)

    assert agrees(found, base, sources, reference, scope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rules", ["paper", "mergekit"])
def test_ties_by_the_rules_of_mergekit(rules, normalize, dtype, tmp_path):
    """A negative weight and many sums of 0: bfloat16 changes are multiples of few numbers."""
    base = cast(BASE, dtype)
    sources = [{name: tensor + step for name, tensor in base.items()} for step in (0.5, -0.5, 1.0)]
    sources.append(near(base, 4))
    weights = [1.0, 1.0, -0.6, 1e-3]
    found = merge(
        Ties(density=1, normalize=normalize, rules=rules, scope="tensor"), sources, base, at=tmp_path, weights=weights
    )
    assert agrees(found, base, sources, lambda taus: elected(taus, weights, normalize, rules))


@pytest.mark.parametrize("method", [Ties, BreadcrumbsTies, DareTies, Della])
def test_where_signs_balance_nothing_is_elected_and_plus_by_the_rules_of_mergekit(method, tmp_path):
    base = {"w": torch.tensor([7.0, 7.0, 7.0])}
    sources = [{"w": torch.tensor([8.0, 9.0, 7.0])}, {"w": torch.tensor([6.0, 6.0, 7.0])}]
    ours = merge(method(density=1), sources, base, at=tmp_path)
    theirs = merge(method(density=1, rules="mergekit"), sources, base, at=tmp_path)
    assert ours["w"].tolist() == [7, 9, 7]
    assert theirs["w"].tolist() == [8, 9, 7]


def test_a_negative_weight_takes_away_and_cancels_itself_by_the_rules_of_mergekit(tmp_path):
    base, source = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -2.0])}
    ours = merge(Ties(density=1), [source], base, at=tmp_path, weights=[-0.5])
    theirs = merge(Ties(density=1, rules="mergekit"), [source], base, at=tmp_path, weights=[-0.5])
    assert ours["w"].tolist() == [-1, 2]
    assert theirs["w"].tolist() == [1, -2]


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_ties_gives_back_the_norm_of_what_it_trimmed(scope, tmp_path):
    method = Ties(density=0.3, scope=scope, rescale="norm", normalize=False)
    found = merge(method, SOURCES, BASE, at=tmp_path, weights=WEIGHTS)

    def reference(taus):
        return elected([restored(tau, trimmed(tau, 0.3)) for tau in taus], WEIGHTS, divide=False)

    assert agrees(found, BASE, SOURCES, reference, scope)


def test_ties_trims_a_model_as_a_whole(tmp_path):
    """A tensor whose changes are all small loses them all, unless every tensor is trimmed by itself."""
    base = {"small": torch.zeros(50), "large": torch.zeros(50)}
    source = {"small": torch.full((50,), 1e-3), "large": torch.ones(50)}
    whole = merge(Ties(density=0.5), [source, source], base, at=tmp_path)
    each = merge(Ties(density=0.5, scope="tensor"), [source, source], base, at=tmp_path)
    assert not whole["small"].any()
    assert whole["large"].all()
    assert each["small"].all()


def test_ties_keeps_all_that_are_as_large_as_the_smallest_kept(tmp_path):
    base = {"w": torch.zeros(6)}
    source = {"w": torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])}
    found = merge(Ties(density=0.34), [source, source], base, at=tmp_path)
    assert found["w"].tolist() == [3, -2, 2, 2, 0, 0]


@pytest.mark.parametrize("size", [1000, 100_000])
@pytest.mark.parametrize("density", [0.003, 0.37, 0.9])
def test_float64_is_trimmed_by_sizes_found_in_float32(size, density, tmp_path):
    """However a size is rounded, as many as asked for are kept, and those that float32 cannot tell from the last."""
    base = {"w": torch.zeros(size, dtype=torch.float64)}
    source = {"w": torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))}
    kept = merge(Ties(density=density), [source], base, at=tmp_path)["w"] != 0
    between = merge(Breadcrumbs(density=density, outliers=0.05, scale=1), [source], base, at=tmp_path)["w"] != 0
    sizes = np.abs(source["w"].numpy().astype("f4"))
    assert (kept.numpy() == (trimmed(sizes, density) != 0)).all()
    assert (between.numpy() == (middle(sizes, density, 0.05) != 0)).all()


# --- breadcrumbs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
@pytest.mark.parametrize(("density", "outliers"), [(0.5, 0.1), (0.9, 0.2), (0.3, 0.0), (1.0, 0.4), (0.02, 0.5)])
def test_breadcrumbs_keeps_the_middle(density, outliers, scope, dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    method = Breadcrumbs(density=density, outliers=outliers, scale=0.8, scope=scope)
    found = merge(method, sources, base, at=tmp_path, weights=WEIGHTS)

    def reference(taus):
        return 0.8 * added([middle(tau, density, outliers) for tau in taus], WEIGHTS)

    assert agrees(found, base, sources, reference, scope)


def test_breadcrumbs_drops_both_ends(tmp_path):
    base, source = {"w": torch.zeros(10)}, {"w": torch.tensor([5.0, -9, 1, 8, -7, 2, 6, -4, 3, 10])}
    found = merge(Breadcrumbs(density=0.5, outliers=0.2, scale=1), [source], base, at=tmp_path)
    assert found["w"].tolist() == [5, 0, 0, 8, -7, 0, 6, -4, 0, 0]


def test_breadcrumbs_drops_fewer_outliers_where_too_little_would_be_left(tmp_path):
    base, source = {"w": torch.zeros(10)}, {"w": torch.arange(1.0, 11)}
    found = merge(Breadcrumbs(density=0.9, outliers=0.3, scale=1), [source], base, at=tmp_path)
    assert found["w"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_breadcrumbs_keeps_all_that_are_as_large_as_the_largest_or_smallest_kept(tmp_path):
    base, source = {"w": torch.zeros(10)}, {"w": torch.tensor([9.0, 5, -5, 5, 4, 3, -3, 3, 2, 1])}
    found = merge(Breadcrumbs(density=0.4, outliers=0.2, scale=1), [source], base, at=tmp_path)
    assert found["w"].tolist() == [0, 5, -5, 5, 4, 3, -3, 3, 0, 0]


def test_breadcrumbs_rescaled_and_normalized(tmp_path):
    method = Breadcrumbs(density=0.4, outliers=0.1, scale=1, rescale="norm", normalize=True)
    found = merge(method, SOURCES, BASE, at=tmp_path, weights=WEIGHTS)

    def reference(taus):
        return added([restored(tau, middle(tau, 0.4, 0.1)) for tau in taus], WEIGHTS, divide=True)

    assert agrees(found, BASE, SOURCES, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_breadcrumbs_ties_elects_in_the_middle(normalize, dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    method = BreadcrumbsTies(density=0.6, outliers=0.2, scale=0.7, normalize=normalize, rescale="norm")
    found = merge(method, sources, base, at=tmp_path, weights=WEIGHTS)

    def reference(taus):
        return 0.7 * elected([restored(tau, middle(tau, 0.6, 0.2)) for tau in taus], WEIGHTS, normalize)

    assert agrees(found, base, sources, reference)


def test_densities_and_outliers_may_differ_between_sources(tmp_path):
    shares = [(0.2, 0.0), (0.5, 0.3), (0.9, 0.05)]
    paths = {f"s{index}": str(save(tmp_path / f"s{index}", source)) for index, source in enumerate(SOURCES)}
    step = {"merge": "breadcrumbs", "models": list(paths), "base": "base", "scale": 1.0}
    step["vary"] = {
        "density": {"per_model": [density for density, _ in shares]},
        "outliers": {"per_model": [share for _, share in shares]},
    }
    models = {"base": str(save(tmp_path / "base", BASE)), **paths}
    recipe = {"lfm": 1, "models": models, "steps": {"merged": step}, "out": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run,) = lfm.run(tmp_path / "recipe.yaml", settings=lfm.Settings(threads=1, quiet=True))

    def reference(taus):
        return added([middle(tau, *share) for tau, share in zip(taus, shares, strict=True)], [1, 1, 1])

    assert agrees(load(run.folder), BASE, SOURCES, reference)


# --- MagMax, RAM, SCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_magmax_takes_the_largest_change_of_each_weight(dtype, tmp_path):
    base, *sources = (cast(model, dtype) for model in (BASE, *SOURCES))
    found = merge(Magmax(scale=0.7), sources, base, at=tmp_path, weights=WEIGHTS)

    def reference(taus):
        weighted = [weight * tau for weight, tau in zip(WEIGHTS, taus, strict=True)]
        return np.array([0.7 * max((tau[i] for tau in weighted), key=abs) for i in range(len(taus[0]))])

    assert agrees(found, base, sources, reference)


def test_magmax_takes_the_earlier_of_equally_large_changes(tmp_path):
    base, sources = {"w": torch.zeros(2)}, [{"w": torch.tensor([1.0, -2])}, {"w": torch.tensor([-1.0, 2])}]
    assert merge(Magmax(scale=1), sources, base, at=tmp_path)["w"].tolist() == [1, -2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [0, 1e-5, 0.05])
def test_ram_averages_over_the_models_that_changed_a_weight(epsilon, dtype, tmp_path):
    base = cast(BASE, dtype)
    sources = [sparse(base, seed) for seed in (1, 2, 3)]
    found = merge(Ram(epsilon=epsilon), sources, base, at=tmp_path)
    assert agrees(found, base, sources, lambda taus: ram(taus, epsilon, [1, 1, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "alpha", "epsilon"), [(0.1, 0.2, 1e-5), (0.5, 2.0, 0.05), (0.2, 1.0, 0)])
@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_ramplus_strengthens_what_one_model_alone_changed(scope, r, alpha, epsilon, dtype, tmp_path):
    base = cast(BASE, dtype)
    sources = [sparse(base, seed, share) for seed, share in ((1, 0.2), (2, 0.5), (3, 0.6))]
    found = merge(Ramplus(r=r, alpha=alpha, epsilon=epsilon, scope=scope), sources, base, at=tmp_path)
    assert agrees(found, base, sources, lambda taus: ramplus(taus, r, alpha, epsilon), scope)


def test_ramplus_goes_by_the_share_that_others_changed_too(tmp_path):
    """The first model shares 1 of its 3 changes, the second 1 of 2; those that are shared are averaged."""
    base = {"w": torch.zeros(5)}
    sources = [{"w": torch.tensor([1.0, 1, 1, 0, 0])}, {"w": torch.tensor([0.0, 0, 3, 4, 0])}]
    found = merge(Ramplus(r=0.5, alpha=0.75), sources, base, at=tmp_path)
    assert found["w"].tolist() == [1.25, 1.25, 2, 4 * 1.375, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0, 0.05, 0.4, 0.99, 1])
def test_sce_selects_calculates_and_erases(share, dtype, tmp_path):
    base = cast(BASE, dtype)
    sources = [sparse(base, 1), cast(near(BASE, 2, 0.3), dtype), sparse(base, 3, 0.2)]
    found = merge(Sce(select_topk=share), sources, base, at=tmp_path)
    assert agrees(found, base, sources, lambda taus: sce(taus, share))


@pytest.mark.parametrize("rules", ["paper", "mergekit"])
@pytest.mark.parametrize("size", [2e-4, 0.1])
def test_sce_weighs_by_energy_and_small_changes_alike_by_the_rules_of_mergekit(size, rules, tmp_path):
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    sources = [near(base, 1, size), near(base, 2, 3 * size)]
    found = merge(Sce(rules=rules), sources, base, at=tmp_path)
    for name, shape in SHAPES.items():
        if 0 not in shape:
            expected = sce(changes(base, sources, [name]), 1, rules)
            np.testing.assert_allclose(flat(found, [name]), expected, rtol=1e-5, atol=1e-9)


def test_the_energies_of_sce_are_sums_of_squares(tmp_path):
    base, sources = {"w": torch.zeros(2)}, [{"w": torch.tensor([1.0, 1])}, {"w": torch.tensor([3.0, -1])}]
    found = merge(Sce(), sources, base, at=tmp_path)
    assert found["w"].tolist() == [pytest.approx((2 * 1 + 10 * 3) / 12), 0]


def test_a_model_of_hardly_any_energy_is_damped_by_the_rules_of_mergekit(tmp_path):
    """Its share is 1e-8, and mergekit divides by 1e-6 at least."""
    base, sources = {"w": torch.zeros(2)}, [{"w": torch.tensor([1000.0, 0])}, {"w": torch.tensor([0.0, 0.1])}]
    ours, theirs = (merge(Sce(rules=rules), sources, base, at=tmp_path)["w"] for rules in ("paper", "mergekit"))
    assert ours.tolist() == pytest.approx([1000, 0.1])
    assert theirs.tolist() == pytest.approx([1000, 0.001])


def test_sce_selects_nothing_where_models_agree(tmp_path):
    """Changes that all models share have no variance, in float32 too; those of one model alone have none."""
    shared = near(BASE, 1)
    sources = [{**shared, "layers.0.bias": source["layers.0.bias"]} for source in SOURCES]
    found = merge(Sce(select_topk=0.999), sources, BASE, at=tmp_path)
    alone = merge(Sce(select_topk=0.999), SOURCES[:1], BASE, at=tmp_path)
    assert {name for name in SHAPES if not torch.equal(found[name], BASE[name])} == {"layers.0.bias"}
    assert all(torch.equal(alone[name], BASE[name]) for name in SHAPES)


# --- all of them


def whole(method):
    """Nothing dropped, nothing scaled."""
    return method(**{name: 1 for name in ("density", "scale") if name in method.model_fields})


@pytest.mark.parametrize("method", [Ties, BreadcrumbsTies, Ram, Ramplus, Sce])
def test_equal_sources_come_back(method, tmp_path):
    found = merge(whole(method), [SOURCES[0]] * 3, BASE, at=tmp_path)
    assert agrees(found, BASE, SOURCES[:1], lambda taus: taus[0])


@pytest.mark.parametrize("method", [Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, Della, DellaLinear, Ties])
def test_density_zero_keeps_nothing(method, tmp_path):
    found = merge(method(density=0), SOURCES, BASE, at=tmp_path)
    assert all(torch.equal(found[name], BASE[name]) for name in SHAPES)
