"""Who is related to whom: verdicts on real and made models, the base that is found, what is read, hostile input."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lfm.checkpoint import Checkpoint, Delta, Dense, LowRank, MemoryWeights, Patched, open_checkpoint
from lfm.checkpoint.kinship import Verdict, kinship, strangers
from lfm.errors import RequestError

SHAPES = {
    "embed_tokens.weight": (50, 32),
    **{
        f"layers.{layer}.{name}": shape
        for layer in range(3)
        for name, shape in {
            "norm.weight": (32,),
            "up.weight": (64, 32),
            "up.bias": (64,),
            "down.weight": (32, 64),
        }.items()
    },
}


def noise(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale * 0.1 for name, shape in SHAPES.items()}


def drawn(seed):
    """Return random tensors of a small network: matrices around 0, norms around 1."""
    return {name: tensor + ("norm" in name) for name, tensor in noise(seed).items()}


def moved(base, seed, size=0.1):
    """Return a fine-tune: every tensor moved at random by `size` of its spread."""
    return {name: base[name] + change for name, change in noise(seed, size).items()}


def model(name, tensors):
    return Checkpoint(name, MemoryWeights(tensors), Path())


def pair(one, two, **options):
    [found] = kinship([model("one", one), model("two", two)], **options).pairs
    return found


def permuted(tensors):
    """Return the same function with the hidden neurons of every layer in another order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    found = dict(tensors)
    for layer in range(3):
        for part in ("up.weight", "up.bias"):
            found[f"layers.{layer}.{part}"] = tensors[f"layers.{layer}.{part}"][order]
        found[f"layers.{layer}.down.weight"] = tensors[f"layers.{layer}.down.weight"][:, order]
    return found


BASE = drawn(0)


# --- verdicts


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (BASE, Verdict.SAME),
        (moved(BASE, 1), Verdict.SIBLINGS),
        (moved(BASE, 1, 0.4), Verdict.SIBLINGS),
        (moved(BASE, 1, 1.0), Verdict.DISTANT),
        (BASE | {name: t for name, t in drawn(1).items() if "up" in name}, Verdict.DISTANT),
        (BASE | {"layers.2.up.weight": drawn(1)["layers.2.up.weight"]}, Verdict.SIBLINGS),
        (drawn(1), Verdict.STRANGERS),
        (permuted(BASE), Verdict.PERMUTED),
        (permuted(moved(BASE, 1, 0.02)), Verdict.PERMUTED),
        ({f"model.{name}": tensor for name, tensor in BASE.items()}, Verdict.OTHER),
        ({name: torch.cat([tensor, tensor]) for name, tensor in BASE.items()}, Verdict.OTHER),
        (drawn(1) | {f"more.{index}": torch.ones(99, 99) for index in range(4)}, Verdict.OTHER),
        ({name: tensor * 0 for name, tensor in BASE.items()}, Verdict.UNKNOWN),
        ({name: tensor.int() for name, tensor in BASE.items()}, Verdict.OTHER),
    ],
)
def test_verdicts(other, verdict):
    assert pair(BASE, other).verdict is verdict
    assert pair(other, BASE).verdict is verdict


def test_norms_and_embeddings_do_not_make_kin_of_strangers():
    one, two = drawn(0), drawn(1)
    for tensors in (one, two):
        tensors |= {"final_norm.weight": torch.ones(5000), "wte.weight": torch.ones(300, 32)}
    found = pair(one, two)
    assert found.cosine > 0.9
    assert abs(found.matrix_cosine) < 0.1
    assert found.verdict is Verdict.STRANGERS


def test_an_embedding_alone_is_judged_by():
    table = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    assert pair({"wte.weight": table}, {"wte.weight": table + 0.1}).verdict is Verdict.SIBLINGS


def test_independent_draws_of_one_distribution_are_no_permutations():
    one = kinship([model(str(seed), drawn(seed)) for seed in range(12)])
    assert {found.verdict for found in one.pairs} == {Verdict.STRANGERS}


def test_tiny_matrices_may_be_alike_by_chance():
    for seed in range(20):
        one, two = (torch.randn(2, 4, generator=torch.Generator().manual_seed(seed + k)) for k in (0, 100))
        assert pair({"w": one}, {"w": two}).verdict not in (Verdict.SIBLINGS, Verdict.SAME)


@pytest.fixture(scope="module")
def trained():
    """Return state dicts of a small network on handwritten digits; `other` has an initialisation of its own."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)

    def train(network, rows, steps, rate, seed):
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(network.parameters(), rate)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (64,), generator=generator)]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def new(seed, start=None):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.LayerNorm(64)]
            network = torch.nn.Sequential(*layers, torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        if start is not None:
            network.load_state_dict(start)
        return network

    everything, halves = torch.arange(len(x)), [torch.where(y % 2 == rest)[0] for rest in (0, 1)]
    base = train(new(0), everything, 200, 2e-3, 0)
    return {
        "base": base,
        "even": train(new(0, base), halves[0], 60, 2e-4, 1),
        "odd": train(new(0, base), halves[1], 60, 2e-4, 2),
        "other": train(new(1), everything, 200, 2e-3, 0),
        "apart": train(new(0), halves[0], 200, 2e-3, 3),
    }


def test_trained_networks(trained):
    found = kinship([model(name, tensors) for name, tensors in trained.items()])
    verdicts = {pair.models: pair.verdict for pair in found.pairs}
    assert all(verdict is Verdict.STRANGERS for models, verdict in verdicts.items() if "other" in models)
    assert {verdicts[name, "apart"] for name in ("base", "even", "odd")} == {Verdict.DISTANT}
    assert {verdicts["base", "even"], verdicts["base", "odd"], verdicts["even", "odd"]} == {Verdict.SIBLINGS}
    three = kinship([model(name, trained[name]) for name in ("even", "odd", "base", "other")])
    assert three.base == "base"
    assert [vector.model for vector in three.task_vectors] == ["even", "odd"]


def test_residual_networks_of_two_depths_are_strangers_where_they_overlap(assets):
    refs = [str(assets / "checkpoints" / f"cifar10-resnet{depth}") for depth in (20, 56)]
    found = kinship([open_checkpoint(ref) for ref in refs])
    [found] = found.pairs
    assert found.verdict is Verdict.OTHER
    assert (found.shared, found.other_shape, found.missing) == (97, 0, (180, 0))
    assert found.cosine == pytest.approx(0.588, abs=0.001)  # BatchNorm's share
    assert found.matrix_cosine == pytest.approx(0.002, abs=0.001)
    [warning] = strangers([open_checkpoint(ref) for ref in refs])
    assert "are strangers" in warning


def test_fine_tunes_and_a_permuted_copy_of_a_language_model(assets, tmp_path):
    from lfm.cli import main

    base = assets / "checkpoints" / "stories260k"
    for name, file in {"a": "tiny-shakespeare.txt", "b": "wikitext-2-valid.txt"}.items():
        source = f"{{path: '{assets / 'data' / file}', limit: 40}}"
        how = ("--steps", "6", "--learning-rate", "1e-3", "--batch-size", "4", "--length", "64", "-q")
        assert main(["tune", "full", str(base), "--data", source, "-o", str(tmp_path / name), *how]) == 0
    models = [open_checkpoint(path) for path in (tmp_path / "a", tmp_path / "b", base)]
    found = kinship(models)
    assert {one.verdict for one in found.pairs} == {Verdict.SIBLINGS}
    assert all(one.matrix_cosine > 0.99 for one in found.pairs)
    assert found.base == str(base)
    assert all(0.001 < vector.norm < 0.05 for vector in found.task_vectors)
    assert strangers(models[:2], models[2]) == []
    weights = {name: models[2].tensor(name) for name in models[2].specs}
    order = torch.randperm(
        weights["model.layers.0.mlp.up_proj.weight"].shape[0], generator=torch.Generator().manual_seed(0)
    )
    for name in weights:
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weights[name][order]
        elif "down_proj" in name:
            weights[name] = weights[name][:, order]
    assert kinship([models[2], model("permuted", weights)]).pairs[0].verdict is Verdict.PERMUTED
    assert "align the permutations" in strangers([models[2], model("permuted", weights)])[0]


# --- numbers


def flat(tensors):
    return np.concatenate([tensors[name].numpy().reshape(-1).astype(np.float64) for name in sorted(tensors)])


@pytest.mark.parametrize("everything", [False, True])
def test_measures_are_what_they_are_called(everything):
    base, one, two = BASE, moved(BASE, 1), moved(BASE, 2, 0.3)
    one["layers.0.up.weight"] = base["layers.0.up.weight"]
    found = kinship([model("b", base), model("1", one), model("2", two)], everything=everything)
    pairs = {one.models: one for one in found.pairs}
    o, t = flat(one), flat(two)
    assert found.compared == 1
    assert pairs["1", "2"].cosine == pytest.approx(o @ t / np.linalg.norm(o) / np.linalg.norm(t), rel=1e-9)
    assert pairs["1", "2"].distance == pytest.approx(np.linalg.norm(o - t) / np.linalg.norm(o), rel=1e-6)
    assert pairs["b", "1"].equal == 1 / len(SHAPES)
    matrices = [name for name in SHAPES if "up.w" in name or "down" in name]
    cosines = [float(torch.cosine_similarity(one[n].reshape(-1), two[n].reshape(-1), dim=0)) for n in matrices]
    assert pairs["1", "2"].matrix_cosine == pytest.approx(float(np.median(cosines)), rel=1e-5)


def test_task_vectors():
    change = noise(1, 0.1)
    ways = {"plus": change, "minus": {n: -t for n, t in change.items()}, "twice": {n: 2 * t for n, t in change.items()}}
    ways["else"] = noise(2, 0.1)
    models = [model(way, {n: BASE[n] + t for n, t in tensors.items()}) for way, tensors in ways.items()]
    found = kinship(models, model("base", BASE))
    assert found.base == "base"
    norms = {vector.model: vector.norm for vector in found.task_vectors}
    assert norms["twice"] == pytest.approx(2 * norms["plus"], rel=1e-5)
    assert norms["plus"] == pytest.approx(np.linalg.norm(flat(change)) / np.linalg.norm(flat(BASE)), rel=1e-5)
    agreement = {pair.models: (pair.cosine, pair.sign_conflict) for pair in found.task_pairs}
    assert agreement["plus", "minus"] == (pytest.approx(-1), 1)
    assert agreement["plus", "twice"] == (pytest.approx(1), 0)
    cosine, conflict = agreement["minus", "twice"]
    assert (cosine, conflict) == (pytest.approx(-1), 1)
    free = kinship([model("a", moved(BASE, 1)), model("b", moved(BASE, 2))], model("base", BASE)).task_pairs[0]
    assert abs(free.cosine) < 0.05
    assert abs(free.sign_conflict - 0.5) < 0.03


def test_one_who_did_not_change_has_no_direction():
    found = kinship([model("a", moved(BASE, 1)), model("b", BASE)], model("base", BASE))
    assert [vector.norm for vector in found.task_vectors][1] == 0
    assert (found.task_pairs[0].cosine, found.task_pairs[0].sign_conflict) == (None, None)


def test_changes_too_small_for_a_square_are_measured():
    wide = {name: tensor.double() for name, tensor in BASE.items()}
    near = {name: tensor * (1 + 1e-9) for name, tensor in wide.items()}
    assert pair(wide, near).distance == pytest.approx(1e-9, rel=1e-5)


def test_a_copy_in_another_precision_has_the_same_weights():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = pair(BASE, {name: tensor.to(dtype) for name, tensor in BASE.items()})
        assert (found.verdict, found.equal) == (Verdict.SAME, 1), dtype
    half = {name: tensor.half() for name, tensor in BASE.items()}
    assert pair(half, {name: tensor.bfloat16() for name, tensor in half.items()}).equal == 1
    assert pair(half, {name: tensor.bfloat16() for name, tensor in moved(BASE, 1).items()}).equal == 0


def test_negative_zero_and_nan_payloads_are_bits():
    zeros = {"w": torch.zeros(8, 8)}
    assert pair(zeros, {"w": -zeros["w"]}).equal == 0
    assert pair({"w": torch.full((8, 8), torch.nan)}, {"w": torch.full((8, 8), torch.nan)}).verdict is Verdict.SAME


# --- the base


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_base_is_found_in_any_order(order):
    models = [model("base", BASE), model("a", moved(BASE, 1)), model("b", moved(BASE, 2, 0.15))]
    assert kinship([models[place] for place in order]).base == "base"


def test_what_is_no_base_is_not_taken_for_it():
    a, b, c = moved(BASE, 1), moved(BASE, 2), moved(BASE, 3)
    mean = {name: (a[name] + b[name]) / 2 for name in BASE}
    near = moved(BASE, 4, 0.08)
    assert kinship([model("a", a), model("b", b)]).base is None
    assert kinship([model("a", a), model("b", b), model("c", c)]).base is None
    assert kinship([model("a", a), model("b", b), model("mean", mean)]).base is None
    assert kinship([model("a", a), model("b", b), model("near", near)]).base is None
    assert kinship([model("a", drawn(1)), model("b", drawn(2)), model("c", drawn(3))]).base is None
    assert kinship([model("a", a), model("again", a), model("again too", a)]).base is None


def test_strangers_do_not_hide_the_base():
    models = [("x", drawn(8)), ("a", moved(BASE, 1)), ("b", moved(BASE, 2)), ("base", BASE), ("c", moved(BASE, 3))]
    found = kinship([model(*one) for one in models])
    assert found.base == "base"
    assert [vector.model for vector in found.task_vectors] == ["a", "b", "c"]
    assert len(found.task_pairs) == 3


def test_a_given_base_may_be_among_the_models():
    base, a = model("base", BASE), model("a", moved(BASE, 1))
    assert kinship([a, base], base) == kinship([a], base)


# --- properties


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3), st.floats(0.01, 100))
def test_a_pair_is_the_same_both_ways_and_at_any_scale(seed, size, scale):
    one, two = drawn(seed), moved(drawn(seed), seed + 1, size)
    there, back = pair(one, two), pair(two, one)
    assert (there.verdict, there.equal, there.shared) == (back.verdict, back.equal, back.shared)
    assert there.cosine == pytest.approx(back.cosine, rel=1e-9)
    assert there.matrix_cosine == pytest.approx(back.matrix_cosine, rel=1e-9)
    assert -1 <= round(there.cosine, 9) <= 1
    larger = pair(*({name: tensor.double() * scale for name, tensor in each.items()} for each in (one, two)))
    assert larger.verdict is there.verdict
    assert larger.distance == pytest.approx(there.distance, rel=1e-6, abs=1e-9)


def test_the_layout_of_files_does_not_matter(tmp_path):
    one, two = drawn(0), moved(drawn(0), 1)
    names = sorted(one)
    for folder, tensors in (("a", one), ("b", two)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / f"{folder}-shards").mkdir()
        weight_map = {}
        for shard, part in enumerate((names[::2], names[1::2])):
            file = f"model-{shard}.safetensors"
            save_file({name: tensors[name] for name in part[::-1]}, tmp_path / f"{folder}-shards" / file)
            weight_map |= dict.fromkeys(part, file)
        index = tmp_path / f"{folder}-shards" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    plain = kinship([open_checkpoint(tmp_path / name) for name in "ab"]).pairs[0]
    sharded = kinship([open_checkpoint(tmp_path / f"{name}-shards") for name in "ab"]).pairs[0]
    assert (plain.cosine, plain.distance, plain.matrix_cosine) == (
        sharded.cosine,
        sharded.distance,
        sharded.matrix_cosine,
    )
    same = kinship([open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "a-shards")]).pairs[0]
    assert same.verdict is Verdict.SAME


def test_weights_under_patches_are_compared_as_they_are():
    base = MemoryWeights(BASE)
    u, v = torch.randn(64, 2) * 0.02, torch.randn(2, 32)
    delta = Delta({"layers.0.up.weight": LowRank(u, v), "layers.1.up.bias": Dense(torch.ones(64))})
    models = [Checkpoint("base", base, Path()), Checkpoint("base+lora", Patched(base, [delta]), Path())]
    [found] = kinship(models).pairs
    assert found.verdict is Verdict.SIBLINGS
    assert found.equal == pytest.approx(1 - 2 / len(SHAPES))
    assert strangers(models) == []


# --- warnings


def test_a_warning_for_each_pair_that_does_not_belong_together():
    a, b, x = model("a", moved(BASE, 1)), model("b", moved(BASE, 2)), model("x", drawn(3))
    y = model("y", moved(BASE, 4, 1.0))
    base = model("base", BASE)
    assert strangers([a, b], base) == []
    lines = strangers([a, b, x], base)
    assert [line.split(" ")[0] for line in lines] == ["x", "a", "b"]
    assert "does not stem from the base base" in lines[0]
    assert "is it the right base?" in lines[0]
    assert all("are strangers" in line and "ensemble" in line and "distil" in line for line in lines[1:])
    [line] = strangers([a, y])
    assert "distant relatives" in line
    assert "0.9 or more)" in line
    half = model("half", BASE | {name: t for name, t in drawn(1).items() if "up" in name})
    assert "50% of the matrices have nothing in common" in strangers([base, half])[0]
    assert "permuted" in strangers([base, model("p", permuted(BASE))])[0]
    assert all("\n" not in line for line in lines)


# --- hostile input

ODD = {
    "nothing": {},
    "nan": {name: torch.full_like(tensor, torch.nan) for name, tensor in BASE.items()},
    "some nan": {name: torch.where(tensor > 0.3, torch.nan, tensor) for name, tensor in moved(BASE, 1).items()},
    "infinite": {name: torch.where(tensor > 0.3, torch.inf, tensor) for name, tensor in BASE.items()},
    "zero": {name: torch.zeros_like(tensor) for name, tensor in BASE.items()},
    "huge": {name: tensor.double() * 1e300 for name, tensor in BASE.items()},
    "minute": {name: tensor.double() * 1e-300 for name, tensor in BASE.items()},
    "integers": {name: (tensor * 100).to(torch.int8) for name, tensor in BASE.items()},
    "codes": {name: tensor.to(torch.float8_e4m3fn) for name, tensor in BASE.items()},
    "complex": {name: tensor.to(torch.complex64) for name, tensor in BASE.items()},
    "flags": {name: tensor > 0 for name, tensor in BASE.items()},
    "empty": {name: torch.zeros(0, 4) for name in BASE},
    "scalars": {name: torch.tensor(1.0) for name in BASE},
    "vectors": {name: tensor.reshape(-1) for name, tensor in BASE.items()},
    "thin": {name: torch.ones(1, 64) for name in BASE},
    "even rows": {name: torch.ones(*tensor.shape) * torch.sign(tensor) for name, tensor in BASE.items()},
    "few": {"layers.0.up.weight": BASE["layers.0.up.weight"]},
    "mixed": {name: tensor.to((torch.bfloat16, torch.int32)["norm" in name]) for name, tensor in BASE.items()},
}


@pytest.mark.parametrize("one", ODD)
def test_whatever_a_model_holds_there_is_an_answer(one):
    for two in ({"base": BASE} | ODD).items():
        models = [model(one, ODD[one]), model(*two), model("other", drawn(1))]
        for base in (None, models[0], model("fourth", moved(BASE, 3))):
            found = kinship(models, base)
            assert len(found.pairs) == (3 if base in (None, *models) else 6)
            json.loads(json.dumps([vars(found_pair) for found_pair in found.pairs], allow_nan=False))
            json.dumps([vars(each) for each in (*found.task_vectors, *found.task_pairs)], allow_nan=False)
            assert isinstance(strangers(models, base), list)
    itself = kinship([model(one, ODD[one]), model("again", ODD[one])]).pairs[0].verdict
    assert itself is (Verdict.UNKNOWN if one in ("nothing", "empty") else Verdict.SAME)


def test_a_tensor_that_is_not_finite_does_not_spoil_the_others():
    spoilt = moved(BASE, 1)
    spoilt["layers.0.up.weight"] = torch.full((64, 32), torch.nan)
    found = kinship([model("a", spoilt), model("b", moved(BASE, 2)), model("base", BASE)])
    assert {pair.verdict for pair in found.pairs} == {Verdict.SIBLINGS}
    assert found.base == "base"
    sound = [{name: tensors[name] for name in SHAPES if "0.up.w" not in name} for tensors in (spoilt, BASE)]
    change = np.linalg.norm(flat(sound[0]) - flat(sound[1])) / np.linalg.norm(flat(sound[1]))
    assert found.task_vectors[0].norm == pytest.approx(change, rel=1e-5)


def test_kinship_takes_two():
    with pytest.raises(RequestError, match="2 models or more, got 1"):
        kinship([model("a", BASE)])
    assert strangers([]) == strangers([model("a", BASE)]) == strangers([], model("a", BASE)) == []


def test_torch_is_not_needed(tmp_path):
    for name, tensors in {"a": BASE, "b": drawn(1)}.items():
        (tmp_path / name).mkdir()
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / name / "model.safetensors")
    code = (
        "import sys\nfrom lfm.cli import main\nassert main(['inspect', 'a', 'b', '--base', 'a', '--exact']) == 0\n"
        "from lfm.checkpoint import open_checkpoint\nfrom lfm.checkpoint.kinship import strangers\n"
        "assert len(strangers([open_checkpoint('a'), open_checkpoint('b')])) == 1\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "strangers" in done.stdout
