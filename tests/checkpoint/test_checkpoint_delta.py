"""Deltas: exact however they are cut, ordered or undone; refused where they do not belong; saved and read back."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lfm.checkpoint import (
    Delta,
    Dense,
    LowRank,
    MemoryWeights,
    Patched,
    Replace,
    Scale,
    Sparse,
    compose,
    open_checkpoint,
)
from lfm.errors import RequestError

QUICK = settings(max_examples=60, deadline=None)
KINDS = ["dense", "low_rank", "sparse", "scale", "row_scale", "replace"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPE = (5, 7)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def change(kind, seed=0, shape=SHAPE, dtype=torch.float32):
    rows, columns = shape
    if kind == "dense":
        return Dense(normal(seed, rows, columns, dtype=dtype))
    if kind == "low_rank":
        return LowRank(normal(seed, rows, 3, dtype=dtype), normal(seed + 1, 3, columns, dtype=dtype))
    if kind == "sparse":
        places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[: rows * columns // 3]
        return Sparse(places.sort().values, normal(seed, len(places), dtype=dtype))
    if kind == "scale":
        return Scale(normal(seed, 1, dtype=dtype)[0])
    if kind == "row_scale":
        return Scale(normal(seed, rows, dtype=dtype), columns)
    return Replace(normal(seed, rows, columns, dtype=dtype))


def expected(kind, made, weight):
    """What the change means, in plain torch and double precision."""
    weight = weight.double()
    if kind == "dense":
        return weight + made.values.double()
    if kind == "low_rank":
        return weight + made.u.double() @ made.v.double()
    if kind == "sparse":
        return weight.flatten().index_add(0, made.indices, made.values.double()).reshape(weight.shape)
    if kind == "scale":
        return weight * made.factor.double()
    if kind == "row_scale":
        return weight * made.factor.double()[:, None]
    return made.values.double()


def base(dtype=torch.float32):
    return MemoryWeights({"w": normal(99, *SHAPE, dtype=dtype), "untouched": normal(98, 3, dtype=dtype)})


def deltas(base_digest=None):
    return [Delta({"w": change(kind, seed)}, base_digest) for seed, kind in enumerate(KINDS)]


def bits(weights, name="w"):
    return weights.tensor(name).view(torch.uint8)


# --- applying


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_does_what_it_says(kind, dtype):
    made, weights = change(kind), base(dtype)
    patched = Patched(weights, [Delta({"w": made})])
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}[dtype]
    wanted = expected(kind, made, weights.tensor("w"))
    torch.testing.assert_close(patched.tensor("w").double(), wanted, rtol=tolerance, atol=tolerance)
    assert patched.tensor("w").dtype == dtype
    assert torch.equal(bits(patched, "untouched"), bits(weights, "untouched"))


def test_float64_weights_are_changed_in_float64():
    weights = MemoryWeights({"w": torch.tensor([1.0 + 2**-40], dtype=torch.float64)})
    patched = Patched(weights, [Delta({"w": Dense(torch.tensor([2.0**-45], dtype=torch.float64))})])
    assert patched.tensor("w").item() == 1.0 + 2**-40 + 2**-45


@QUICK
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, unique=True),
    st.sampled_from(FLOATS),
    st.tuples(st.integers(2, 40), st.integers(2, 70)),
    st.lists(st.integers(0, 2800), max_size=6),
)
def test_chunks_give_the_bits_of_the_whole(kinds, dtype, shape, cuts):
    weights = MemoryWeights({"w": normal(7, *shape, dtype=dtype)})
    patched = Patched(weights, [Delta({"w": change(kind, seed, shape)}) for seed, kind in enumerate(kinds)])
    size = shape[0] * shape[1]
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    parts = [patched.read("w", start, stop) for start, stop in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts).view(torch.uint8), patched.read("w").view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_elements_take_changes(kind, shape):
    made = change(kind, shape=shape)
    if kind == "row_scale" and 0 in shape:
        made = Scale(made.factor, max(shape[1], 1))
    weights = MemoryWeights({"w": torch.zeros(shape)})
    if made.fits(shape):
        assert Patched(weights, [Delta({"w": made})]).tensor("w").shape == shape


@QUICK
@given(st.permutations(range(6)), st.permutations(range(6)), st.integers(0, 6))
def test_order_does_not_show_and_reverting_is_exact(first, second, kept):
    weights, made = base(torch.bfloat16), deltas()
    forth, back = Patched(weights), Patched(weights)
    for index in first:
        forth = forth.apply(made[index])
    for index in second:
        back = back.apply(made[index])
    assert torch.equal(bits(forth), bits(back))
    for index in second[kept:]:
        forth = forth.revert(made[index].id)
    assert torch.equal(bits(forth), bits(Patched(weights, [made[index] for index in second[:kept]])))
    for index in second[:kept]:
        forth = forth.revert(made[index].id)
    assert torch.equal(bits(forth), bits(weights))


def test_a_patched_model_has_the_digest_of_its_values():
    weights, made = base(), deltas()[0]
    patched = Patched(weights, [made])
    assert patched.digest == MemoryWeights({name: patched.tensor(name) for name in patched.specs}).digest
    assert patched.revert(made.id[:8]).digest == weights.digest != patched.digest


def test_replacing_codes_and_counters_is_exact_and_nothing_else_is_allowed():
    weights = MemoryWeights({"count": torch.tensor([2**53 + 1]), "flag": torch.tensor([True])})
    replaced = Delta({"count": Replace(torch.tensor([2**60 + 1])), "flag": Replace(torch.tensor([False]))})
    assert Patched(weights, [replaced]).tensor("count").item() == 2**60 + 1
    assert not Patched(weights, [replaced]).tensor("flag").item()
    for made in (Dense(torch.ones(1)), Scale(torch.tensor(2.0)), Replace(torch.ones(1))):
        with pytest.raises(RequestError, match="does not fit"):
            Patched(weights, [Delta({"count": made})])


def test_layers_of_patches_stack():
    weights, (one, other) = base(), deltas()[:2]
    stacked = Patched(Patched(weights, [one]), [other])
    torch.testing.assert_close(stacked.tensor("w"), Patched(weights, [one, other]).tensor("w"))


# --- refusing


def refusal(act):
    with pytest.raises(RequestError) as caught:
        act()
    return caught.value


def test_all_that_does_not_fit_is_named_at_once():
    made = Delta(
        {"absent": change("dense"), "w": change("dense", shape=(7, 5)), "untouched": change("low_rank")}, "beef"
    )
    problems = refusal(lambda: Patched(base(), [made])).problems
    assert len(problems) == 4
    assert "made for the base beef" in problems[0]
    assert "'absent', which these weights do not have" in problems[1]
    assert "its dense change of 'w' does not fit F32 [5, 7]" in problems[2]
    assert "its low_rank change of 'untouched' does not fit" in problems[3]


WRONG = {
    "low rank, factors that do not meet": LowRank(torch.ones(5, 2), torch.ones(3, 7)),
    "low rank, turned": LowRank(torch.ones(7, 2), torch.ones(2, 5)),
    "low rank, flat": LowRank(torch.ones(5), torch.ones(7)),
    "dense, one axis": Dense(torch.ones(35)),
    "replace, one axis": Replace(torch.ones(35)),
    "sparse, beyond the end": Sparse(torch.tensor([35]), torch.ones(1)),
    "sparse, before the start": Sparse(torch.tensor([-1]), torch.ones(1)),
    "sparse, not ascending": Sparse(torch.tensor([3, 2]), torch.ones(2)),
    "sparse, twice": Sparse(torch.tensor([2, 2]), torch.ones(2)),
    "sparse, too few values": Sparse(torch.tensor([2, 3]), torch.ones(1)),
    "sparse, places that are no integers": Sparse(torch.tensor([2.0]), torch.ones(1)),
    "sparse, no axis": Sparse(torch.tensor(2), torch.tensor(1.0)),
    "scale, another number of rows": Scale(torch.ones(4), 7),
    "scale, another width": Scale(torch.ones(5), 6),
    "scale, two axes": Scale(torch.ones(5, 1), 7),
}


@pytest.mark.parametrize("made", WRONG.values(), ids=WRONG)
def test_changes_of_the_wrong_form_are_refused(made):
    assert "does not fit" in str(refusal(lambda: Patched(base(), [Delta({"w": made})])))


def test_a_delta_is_applied_once():
    made = deltas()[0]
    twin = Delta({"w": Dense(made.changes["w"].values.clone())})
    assert "applied already" in str(refusal(lambda: Patched(base(), [made]).apply(twin)))


def test_two_different_replacements_contradict_each_other():
    one, other = (Delta({"w": change("replace", seed)}) for seed in (0, 1))
    assert "different tensors in its place" in str(refusal(lambda: Patched(base(), [one, other])))
    assert "different tensors in its place" in str(refusal(lambda: one.compose(other)))
    more = Delta({"w": change("replace", 0), "untouched": Replace(torch.ones(3))})
    assert torch.equal(bits(Patched(base(), [one, more])), bits(Patched(base(), [one])))


def test_reverting_what_is_not_there_lists_what_is():
    patched = Patched(base(), deltas()[:2])
    for name in ("", "nothing"):
        message = str(refusal(lambda name=name: patched.revert(name)))
        assert all(delta.id[:12] in message for delta in patched.deltas)
    assert "none" in str(refusal(lambda: Patched(base()).revert("x")))


def test_only_its_own_base_takes_a_delta():
    made = Delta({"w": change("dense")}, base().digest)
    Patched(base(), [made])
    assert "was made for the base" in str(refusal(lambda: Patched(base(torch.float16), [made])))


# --- identity, composition, differences


def test_an_id_is_that_of_the_content():
    ids = [delta.id for delta in deltas()]
    assert ids == [Delta(delta.changes, "base", {"by": "somebody"}).id for delta in deltas()]
    assert len(set(ids)) == len(ids)
    two = {"w": change("dense"), "x": change("dense", 1)}
    assert Delta(two).id == Delta(dict(reversed(two.items()))).id
    assert Delta({"w": Dense(torch.ones(2))}).id != Delta({"w": Dense(torch.ones(2).half())}).id
    assert Delta({"w": Scale(torch.ones(2), 3)}).id != Delta({"w": Scale(torch.ones(2), 4)}).id


@QUICK
@given(st.sampled_from(KINDS[:-1]), st.sampled_from(FLOATS), st.integers(0, 1000))
def test_composing_does_what_both_do(kind, dtype, seed):
    one = Delta({"w": change(kind, seed, dtype=dtype), "untouched": Dense(torch.ones(3))})
    other = Delta({"w": change(kind, seed + 5, dtype=dtype)})
    weights = base(torch.float64)
    both, joined = Patched(weights, [one, other]), Patched(weights, [compose([one, other])])
    torch.testing.assert_close(joined.tensor("w"), both.tensor("w"), rtol=1e-5, atol=1e-5)
    assert torch.equal(joined.tensor("untouched"), both.tensor("untouched"))


def test_a_number_for_all_and_one_for_each_row_compose():
    one, other = Delta({"w": change("scale")}), Delta({"w": change("row_scale")})
    for joined in (one.compose(other), other.compose(one)):
        torch.testing.assert_close(Patched(base(), [joined]).tensor("w"), Patched(base(), [one, other]).tensor("w"))


def test_what_does_not_compose_is_named_at_once():
    one = Delta({"a": change("dense"), "b": change("sparse"), "c": change("replace")})
    other = Delta({"a": change("sparse"), "b": change("dense"), "c": change("replace", 4)})
    assert len(refusal(lambda: one.compose(other)).problems) == 3
    assert "different bases" in str(refusal(lambda: Delta({}, "x").compose(Delta({}, "y"))))


@QUICK
@given(st.sampled_from(FLOATS), st.integers(0, 1000))
def test_a_difference_brings_the_tuned_model_back(dtype, seed):
    weights = MemoryWeights({"w": normal(seed, *SHAPE, dtype=dtype), "same": torch.ones(2), "n": torch.tensor([2**60])})
    tuned = {"w": normal(seed + 1, *SHAPE, dtype=dtype), "same": torch.ones(2), "n": torch.tensor([2**60 + 1])}
    made = Delta.between(weights, MemoryWeights(tuned))
    assert set(made.changes) == {"w", "n"}
    assert made.base == weights.digest
    patched = Patched(weights, [made])
    torch.testing.assert_close(patched.tensor("w"), tuned["w"], rtol=1e-6, atol=1e-6)
    difference = tuned["w"].double() - weights.tensor("w").double()
    exact = (difference == made.changes["w"].values) & (torch.tensor(dtype != torch.float64))
    assert torch.equal(patched.tensor("w")[exact], tuned["w"][exact])
    if dtype in (torch.bfloat16, torch.float16):
        assert exact.float().mean() > 0.9  # all but numbers that differ a thousandfold and more
    assert torch.equal(patched.tensor("n"), tuned["n"])


def test_infinities_and_what_is_no_number_survive_a_difference():
    infinite, nan = float("inf"), float("nan")
    before = {"mask": torch.tensor([0.0, -infinite, 1.0]), "odd": torch.tensor([infinite, 1.0, nan])}
    after = {"mask": torch.tensor([0.5, -infinite, 1.0]), "odd": torch.tensor([1.0, infinite, 2.0])}
    made = Delta.between(MemoryWeights(before), MemoryWeights(after))
    assert {name: change.kind for name, change in made.changes.items()} == {"mask": "dense", "odd": "replace"}
    patched = Patched(MemoryWeights(before), [made])
    assert all(torch.equal(patched.tensor(name), after[name]) for name in after)


def test_models_that_differ_in_form_have_no_difference():
    tuned = MemoryWeights({"w": torch.ones(7, 5), "new": torch.ones(1)})
    problems = refusal(lambda: Delta.between(base(), tuned)).problems
    assert len(problems) == 3
    assert "'new': absent in the base, F32 [1] in the tuned one" in problems[0]


# --- saving


def test_saved_deltas_are_as_the_page_describes_them(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    page = (Path(__file__).parents[2] / "docs" / "delta.md").read_text(encoding="utf-8")
    schema = json.loads(page.split("```json")[2].split("```")[0])
    whole_delta().save(tmp_path / "d")
    jsonschema.validate(json.loads((tmp_path / "d" / "delta.json").read_text()), schema)
    tensors = load_file(tmp_path / "d" / "delta.safetensors")
    roles = {kind: {key.rpartition(":")[2] for key in tensors if key.startswith(f"{kind}:")} for kind in KINDS}
    assert roles["replace"] == {"tensor"}
    assert roles["scale"] == roles["row_scale"] == {"factor", "width"}
    assert (roles["dense"], roles["low_rank"], roles["sparse"]) == ({"values"}, {"u", "v"}, {"indices", "values"})


def whole_delta():
    changes = {f"{kind}:{index}": change(kind, index) for index, kind in enumerate(KINDS)}
    return Delta({**changes, "名": Dense(torch.zeros(0))}, "beef", {"method": "test", "n": [1, {"x": None}]})


def test_a_saved_delta_reads_back(tmp_path):
    made = whole_delta()
    made.save(tmp_path / "d")
    read = Delta.load(tmp_path / "d")
    assert (read.id, read.base, read.provenance) == (made.id, made.base, made.provenance)
    assert {name: change.kind for name, change in read.changes.items()} == {n: c.kind for n, c in made.changes.items()}
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == ["delta.json", "delta.safetensors"]
    with pytest.raises(RequestError, match="exists already"):
        made.save(tmp_path / "d")


def test_a_saved_empty_delta_reads_back(tmp_path):
    Delta({}).save(tmp_path / "d")
    assert Delta.load(tmp_path / "d").changes == {}


def test_a_delta_is_no_model(tmp_path):
    whole_delta().save(tmp_path / "d")
    with pytest.raises(RequestError):
        Patched(base(), [Delta.load(tmp_path / "d")])
    assert set(open_checkpoint(tmp_path / "d").specs) == set(load_file(tmp_path / "d" / "delta.safetensors"))


HEADS = {
    "another format": {"lfm_delta": 2},
    "no format": {"lfm_delta": None},
    "no id": {"id": None},
    "another id": {"id": "0" * 64},
    "a base that is a number": {"base": 3},
    "no changes": {"changes": None},
    "changes in a list": {"changes": []},
    "fewer changes": {"changes": {"w": "dense"}},
    "an unknown kind": {"changes": {"w": "magic"}},
    "a kind that is a list": {"changes": {"w": ["dense"]}},
    "another kind": {"changes": {"w": "low_rank", "s": "scale"}},
    "one change too many": {"changes": {"w": "dense", "s": "scale", "x": "dense"}},
    "a provenance that is text": {"provenance": "me"},
}


@pytest.fixture
def saved(tmp_path):
    Delta({"w": change("dense"), "s": Scale(torch.ones(5), 7)}, "beef").save(tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_that_is_not_as_documented_is_refused(head, saved):
    text = json.loads((saved / "delta.json").read_text())
    (saved / "delta.json").write_text(json.dumps({**text, **head}))
    refusal(lambda: Delta.load(saved))


def test_missing_files_are_refused(saved):
    for name in ("delta.safetensors", "delta.json"):
        (saved / name).unlink()
        refusal(lambda: Delta.load(saved))
    refusal(lambda: Delta.load(saved / "absent"))


@pytest.mark.parametrize("width", [torch.tensor([1, 2]), torch.tensor(float("nan")), torch.zeros(0), torch.tensor(3)])
def test_tensors_that_were_exchanged_are_refused(width, saved):
    tensors = load_file(saved / "delta.safetensors")
    save_file({**tensors, "s:width": width}, saved / "delta.safetensors")
    refusal(lambda: Delta.load(saved))


def test_a_tensor_that_belongs_to_no_change_is_refused(saved):
    tensors = load_file(saved / "delta.safetensors")
    save_file({**tensors, "w:extra": torch.ones(1)}, saved / "delta.safetensors")
    refusal(lambda: Delta.load(saved))


def test_the_left_overs_of_a_killed_save_are_refused(saved):
    saved.rename(saved.with_name("d.partial"))
    assert "unfinished" in str(refusal(lambda: Delta.load(saved.with_name("d.partial"))))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["delta.json", "delta.safetensors"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_damage_is_refused_or_harmless(tmp_path_factory, name, place, flip):
    folder = tmp_path_factory.mktemp("delta") / "d"
    made = Delta({"w": change("dense"), "s": Scale(torch.ones(5), 7)}, "beef")
    made.save(folder)
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= flip
    (folder / name).write_bytes(content)
    try:
        assert Delta.load(folder).id == made.id  # in the provenance, the base's name, or white space
    except RequestError:
        return
