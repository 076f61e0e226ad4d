"""Patches as things of their own: put on, taken off in any order to the last bit, refused where they do not belong."""

import json
import os
import shutil
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.edit import world
from tests.killing import start
from tests.tiny import LLAMA, llama_tensors, write_llama

import lfm
from lfm.checkpoint import Delta, Dense, LowRank, open_checkpoint, read_adapter
from lfm.edit._audit import audit
from lfm.errors import RequestError
from lfm.recipe import patches
from lfm.recipe.step import Settings

DOWN = "model.layers.{}.mlp.down_proj.weight"
QUIET = Settings(quiet=True)


def write_sharded(folder, dtype=torch.float32):
    """Write the small Llama in three files: embeddings and norm, then a block each."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in llama_tensors(0).items()}
    parts = [[n for n in tensors if "layers" not in n], *([n for n in tensors if f"layers.{i}." in n] for i in (0, 1))]
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def low_rank(base, seed, layer=0, rank=1):
    """Return a patch of one block of a model."""
    generator = torch.Generator().manual_seed(seed)
    change = LowRank(torch.randn(16, rank, generator=generator), torch.randn(rank, 24, generator=generator))
    name = DOWN.format(layer)
    told = {
        "method": "Rome",
        "base_ref": str(base),
        "modules": {name: {"parameter": name, "transposed": False}},
        "requests": [{"id": str(seed), "prompt": f"p{seed}", "target": "t", "subject": None, "old": None}],
    }
    return Delta({name: change}, open_checkpoint(base).digest, told)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request, tmp_path):
    return write_sharded(tmp_path / "base", request.param)


def saved(base, tmp_path, count=6):
    """Return the folders of patches of both blocks."""
    places = [tmp_path / f"patch{seed}" for seed in range(count)]
    for seed, place in enumerate(places):
        low_rank(base, seed, seed % 2, 1 + seed % 3).save(place)
    return places


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


def test_reverting_any_three_of_six_gives_what_applying_the_others_gives(base, tmp_path):
    places = saved(base, tmp_path)
    ids = [lfm.Delta.load(place).id for place in places]
    lfm.apply(base, places, out=tmp_path / "all")
    for number, gone in enumerate(list(combinations(range(6), 3))[::5]):
        left = [places[i] for i in range(6) if i not in gone]
        lfm.apply(base, left[::-1], out=tmp_path / f"left{number}")
        once = lfm.revert(tmp_path / "all", [ids[i] for i in gone], out=tmp_path / f"once{number}")
        assert files(tmp_path / f"once{number}") == files(tmp_path / f"left{number}")
        assert patches.verify(once.ref).holds
    for step, i in enumerate((4, 0, 5, 2, 1, 3)):  # one by one, in some order, until none is left
        lfm.revert(tmp_path / ("all" if not step else f"step{step - 1}"), [ids[i][:12]], out=tmp_path / f"step{step}")
    assert files(tmp_path / "step5") == files(base)


def test_what_holds_no_change_is_linked_and_takes_no_space(base, tmp_path):
    before = {path: path.read_bytes() for path in base.iterdir()}
    place = tmp_path / "patch"
    low_rank(base, 0, layer=1).save(place)
    made = lfm.apply(base, [place], out=tmp_path / "out")
    same = {path.name: path.samefile(base / path.name) for path in (tmp_path / "out").glob("*.safetensors")}
    assert same == {
        "model-00001-of-00003.safetensors": True,
        "model-00002-of-00003.safetensors": True,
        "model-00003-of-00003.safetensors": False,
    }
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    assert made.lineage["output"]["digest"] == made.digest == lfm.open_checkpoint(tmp_path / "out").digest
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert torch.equal(loaded[DOWN.format(1)], made.tensor(DOWN.format(1)))
    assert not torch.equal(made.tensor(DOWN.format(1)), open_checkpoint(base).tensor(DOWN.format(1)))


def test_files_are_copied_where_they_cannot_be_linked(base, tmp_path, monkeypatch):
    from pathlib import Path

    def refuses(self, target):
        raise OSError(18, "Invalid cross-device link")

    place = tmp_path / "patch"
    low_rank(base, 0).save(place)
    lfm.apply(base, [place], out=tmp_path / "linked")
    monkeypatch.setattr(Path, "hardlink_to", refuses)
    lfm.apply(base, [place], out=tmp_path / "copied")
    assert files(tmp_path / "linked") == files(tmp_path / "copied")
    first = "model-00001-of-00003.safetensors"
    assert not (tmp_path / "copied" / first).samefile(base / first)


def test_the_digest_of_a_base_is_not_computed_anew_after_it_was_linked(base, tmp_path, monkeypatch):
    place = tmp_path / "patch"
    low_rank(base, 0).save(place)
    lfm.apply(base, [place], out=tmp_path / "out")

    def reads(self, names):
        raise AssertionError("hashed again")

    monkeypatch.setattr(lfm.checkpoint.FileWeights, "hash_tensors", reads)
    assert open_checkpoint(base).digest == lfm.Delta.load(place).base


def test_patches_that_do_not_belong_are_refused_and_nothing_is_written(base, tmp_path):
    other = write_llama(tmp_path / "other", seed=3)
    place = tmp_path / "patch"
    low_rank(base, 0).save(place)
    with pytest.raises(RequestError, match="was made for the base"):
        lfm.apply(other, [place], out=tmp_path / "out")
    with pytest.raises(RequestError, match="no patch there"):
        lfm.apply(base, [tmp_path / "nowhere"], out=tmp_path / "out")
    lfm.apply(base, [place], out=tmp_path / "one")
    with pytest.raises(RequestError, match="applied already"):
        lfm.apply(tmp_path / "one", [place], out=tmp_path / "out")
    with pytest.raises(RequestError, match="no patches called 'abc'"):
        lfm.revert(tmp_path / "one", ["abc"], out=tmp_path / "out")
    with pytest.raises(RequestError, match="has no patches to revert"):
        lfm.revert(base, ["abc"], out=tmp_path / "out")
    with pytest.raises(RequestError, match="is the model itself"):
        lfm.apply(tmp_path / "one", [place], out=tmp_path / "one", overwrite=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_lost_base_has_to_be_named_and_a_wrong_one_is_refused(base, tmp_path):
    [one, two] = saved(base, tmp_path, 2)
    edited = lfm.apply(base, [one, two], out=tmp_path / "runs" / "edited")
    id_ = lfm.Delta.load(one).id
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="name it with --base"):
        lfm.revert(edited.ref, [id_], out=tmp_path / "out")
    write_llama(base, seed=4)
    with pytest.raises(RequestError, match="holds other weights"):
        lfm.revert(edited.ref, [id_], out=tmp_path / "out")
    with pytest.raises(RequestError, match="holds other weights"):
        lfm.revert(edited.ref, [id_], out=tmp_path / "out", base=base)
    lfm.revert(edited.ref, [id_], out=tmp_path / "out", base=tmp_path / "elsewhere")
    shutil.rmtree(base)
    (tmp_path / "elsewhere").rename(base)
    lfm.apply(base, [two], out=tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_base_and_edited_folder_can_be_moved_together(base, tmp_path):
    [one] = saved(base, tmp_path, 1)
    lfm.apply(base, [one], out=tmp_path / "edited")
    (tmp_path / "new").mkdir()
    for name in ("base", "edited"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    assert patches.verify(str(tmp_path / "new" / "edited")).whole


def test_a_missing_or_changed_patch_is_told(base, tmp_path):
    [one, two] = saved(base, tmp_path, 2)
    lfm.apply(base, [one, two], out=tmp_path / "edited")
    lost = tmp_path / "edited" / "patches" / lfm.Delta.load(one).id[:12]
    shutil.move(lost, tmp_path / "lost")
    with pytest.raises(RequestError, match="no patch there"):
        lfm.revert(tmp_path / "edited", [lfm.Delta.load(two).id], out=tmp_path / "out")
    found = patches.verify(str(tmp_path / "edited"))
    assert not found.holds
    assert "no patch there" in found.problems[0]
    shutil.copytree(two, lost)
    assert "holds another patch" in patches.verify(str(tmp_path / "edited")).problems[0]


def test_changed_weights_are_found_though_size_and_time_are_the_same(base, tmp_path):
    [one] = saved(base, tmp_path, 1)
    lfm.apply(base, [one], out=tmp_path / "edited")
    assert patches.verify(str(tmp_path / "edited")).holds
    path = tmp_path / "edited" / "model-00002-of-00003.safetensors"
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = patches.verify(str(tmp_path / "edited"))
    assert (found.as_written, found.whole, found.holds) == (False, False, False)


def test_the_base_is_not_replaced_by_what_is_made_from_it(base, tmp_path):
    [one, two] = saved(base, tmp_path, 2)
    first = lfm.apply(base, [one], out=tmp_path / "first")
    second = lfm.apply(first.ref, [two], out=tmp_path / "second")
    assert patches.read_edited(second.folder).base == open_checkpoint(base).digest
    (base / "lineage.json").write_text("{}")
    with pytest.raises(RequestError, match="holds the weights that the patches lie on"):
        lfm.revert(second.ref, [lfm.Delta.load(two).id], out=base, overwrite=True)


def test_a_patch_goes_to_peft_as_an_adapter(base, tmp_path):
    [_, _, place] = saved(base, tmp_path, 3)
    patches.export(place, tmp_path / "adapter")
    checkpoint = open_checkpoint(base)
    read, patch = read_adapter(tmp_path / "adapter", checkpoint.weights), lfm.Delta.load(place)
    name = DOWN.format(0)
    assert torch.equal(read.changes[name].u @ read.changes[name].v, patch.changes[name].u @ patch.changes[name].v)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    dense = Delta({name: Dense(torch.ones(16, 24))}, None, patch.provenance)
    dense.save(tmp_path / "dense")
    with pytest.raises(RequestError, match="low-rank changes"):
        patches.export(tmp_path / "dense", tmp_path / "none")
    Delta(patch.changes, None).save(tmp_path / "bare")
    with pytest.raises(RequestError, match="which modules"):
        patches.export(tmp_path / "bare", tmp_path / "none")


def _apply_and_die(base, place, out):
    from lfm.checkpoint import OutputFolder

    OutputFolder.commit = lambda self: os._exit(9)
    lfm.apply(base, [place], out=out)


def test_a_killed_run_leaves_nothing_that_loads_and_a_rerun_makes_the_same(base, tmp_path):
    [one] = saved(base, tmp_path, 1)
    process = start(_apply_and_die, str(base), str(one), str(tmp_path / "out"))
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out.partial"
    assert not (left / "model-00002-of-00003.safetensors").exists()  # the one that is changed is still a draft
    with pytest.raises(RequestError, match="unfinished output"):
        open_checkpoint(left)
    lfm.apply(base, [one], out=tmp_path / "out")
    lfm.apply(base, [one], out=tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert not left.exists()


def test_an_audit_tells_edited_from_tuned_and_rounded(tmp_path):
    base = write_sharded(tmp_path / "base")
    weights = open_checkpoint(base).weights
    assert audit(weights, weights).verdict == "identical"
    [one] = saved(base, tmp_path, 1)
    edited = audit(weights, lfm.apply(base, [one], out=tmp_path / "edited").weights)
    assert (edited.verdict, [(d.name, d.rank) for d in edited.differences]) == ("edited", [(DOWN.format(0), 1)])
    tuned = write_llama(tmp_path / "tuned", seed=1)
    assert audit(weights, open_checkpoint(tuned).weights).verdict == "fine-tuned or merged"
    half = write_sharded(tmp_path / "half", torch.bfloat16)
    assert audit(weights, open_checkpoint(half).weights).verdict == "rounded"
    tensors = {name: tensor for name, tensor in llama_tensors(0).items() if "norm" not in name}
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(RequestError, match="other models"):
        audit(weights, open_checkpoint(tmp_path / "other").weights)


# --- with the methods -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Return (model, file of requests): the model has hardly learned anything, which patches do not mind."""
    file = tmp_path_factory.mktemp("facts") / "requests.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in world.requests(6, count=12)))
    return world.trained("gpt2", steps=2, count=12), file


def quick(**more):
    from lfm.edit.rome import Rome

    return Rome(contexts=0, steps=2, layers=[2], **more)


def edit(facts, out, rows=6, start=0, **more):
    model, file = facts
    part = out.parent / f"{out.name}.jsonl"
    part.write_text("\n".join(file.read_text().splitlines()[start : start + rows]))
    options = {"statistics": "identity", "guard": "off", "settings": QUIET} | more
    return lfm.edit(quick(), options.pop("model", model), part, out=out, **options)


def test_an_edited_folder_holds_a_patch_for_each_update(facts, tmp_path):
    made = edit(facts, tmp_path / "edited", 3)
    found = patches.read_edited(made.folder)
    assert len(found.patches) == 3
    assert found.base == open_checkpoint(facts[0]).digest
    told = patches.about(found.patches[0])
    assert told["method"] == "Rome"
    assert {"efficacy", "neighbours_kept"} <= set(told["scores"])
    assert patches.verify(made.ref).holds
    bare = lfm.revert(made.ref, [patch.id for patch in found.patches], out=tmp_path / "bare")
    assert bare.digest == open_checkpoint(facts[0]).digest
    again = lfm.apply(facts[0], [made.folder], out=tmp_path / "again")
    assert again.digest == made.digest


def test_edits_of_an_edited_model_are_patches_of_the_same_base(facts, tmp_path):
    first = edit(facts, tmp_path / "first", 2)
    second = edit(facts, tmp_path / "second", 2, start=2, model=first.ref)
    found = patches.read_edited(second.folder)
    assert [patch.id for patch in found.patches[:2]] == [
        patch.id for patch in patches.read_edited(first.folder).patches
    ]
    assert found.base == open_checkpoint(facts[0]).digest
    gone = [patch.id for patch in found.patches[2:]]
    assert lfm.revert(second.ref, gone, out=tmp_path / "back").digest == first.digest


def test_to_edit_further_the_base_is_needed_or_given_up_by_name(facts, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(facts[0], home)
    first = edit((home, facts[1]), tmp_path / "first", 1)
    home.rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="name it with --base"):
        edit(facts, tmp_path / "second", 1, start=2, model=first.ref)
    kept = edit(facts, tmp_path / "second", 1, start=2, model=first.ref, base=tmp_path / "elsewhere")
    assert len(patches.read_edited(kept.folder).patches) == 2
    afresh = edit(facts, tmp_path / "third", 1, start=2, model=first.ref, base=first.ref)
    assert patches.read_edited(afresh.folder).base == first.digest


def test_bfloat16_is_kept_and_what_is_measured_is_what_is_saved(facts, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(facts[0], half)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    made = edit((half, facts[1]), tmp_path / "edited", 2)
    assert {spec.dtype for spec in made.specs.values()} == {"BF16"}
    assert patches.verify(made.ref).holds
    from lfm.edit._trial import test as measure

    again = measure(made.ref, str(tmp_path / "edited.jsonl"), None, QUIET)
    assert again["metrics"] == {key: made.lineage["metrics"][key] for key in again["metrics"]}
