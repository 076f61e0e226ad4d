"""The commands about patches: what they answer, and what they say to what cannot be."""

import json

import pytest
import torch
from tests.edit import world

from lfm.api import apply
from lfm.checkpoint import open_checkpoint
from lfm.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (model, requests, edited folder): three edits of a model that knows nothing, each a patch."""
    root = tmp_path_factory.mktemp("edited")
    model = world.trained("gpt2", steps=2, count=12)
    requests = root / "facts.jsonl"
    requests.write_text("\n".join(json.dumps(one) for one in world.requests(3, count=12)))
    quick = ("--contexts", 0, "--steps", 2, "--layers", 2, "--statistics", "identity", "--guard", "off", "-q")
    arguments = ["edit", "rome", model, "--requests", requests, *quick, "-o", root / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    return model, requests, root / "out"


def ids_of(folder):
    return json.loads((folder / "patches.json").read_text())["patches"]


def test_the_commands_stand_beside_the_methods(lfm):
    code, out, _ = lfm("edit", "--help")
    assert code == 0
    for word in ("rome", "memit", "plan", "apply", "revert", "list", "show", "verify", "audit", "test", "export"):
        assert f"\n  {word} " in out
    code, _, err = lfm("edit", "aply", "x")
    assert code == 2
    assert "did you mean 'apply'?" in err
    assert lfm("merge", "apply")[0] == 2


def test_list_and_show_tell_what_was_edited(made, lfm):
    _, requests, out = made
    code, table, _ = lfm("edit", "list", out)
    assert code == 0
    prompts = [json.loads(line)["prompt"] for line in requests.read_text().splitlines()]
    assert all(f"{prompt} -> " in table for prompt in prompts)
    assert all(id_[:12] in table for id_ in ids_of(out))
    told = json.loads(lfm("edit", "list", out, "--json")[1])
    assert [one["requests"][0]["prompt"] for one in told["patches"]] == prompts
    place = out / "patches" / ids_of(out)[0][:12]
    code, table, _ = lfm("edit", "show", place)
    assert code == 0
    assert "low_rank" in table
    assert "transformer.h.2.mlp.c_proj.weight" in table
    assert json.loads(lfm("edit", "show", place, "--json")[1])["id"] == ids_of(out)[0]


def test_apply_and_revert_answer_with_what_lies_on_the_model(made, lfm, tmp_path):
    model, _, out = made
    first = ids_of(out)[0]
    code, told, _ = lfm("edit", "revert", out, first[:8], "-o", tmp_path / "two")
    assert code == 0
    assert "2 patches" in told
    code, told, _ = lfm(
        "edit", "apply", tmp_path / "two", out / "patches" / first[:12], "-o", tmp_path / "all", "--json"
    )
    assert code == 0
    answer = json.loads(told)
    assert sorted(answer["patches"]) == sorted(ids_of(out))
    assert answer["digest"] == json.loads((out / "lineage.json").read_text())["output"]["digest"]
    assert lfm("edit", "apply", model, tmp_path / "two", "-o", tmp_path / "again")[0] == 0


def test_mistakes_end_with_a_line_and_exit_code_two(made, lfm, tmp_path):
    model, _, out = made
    for arguments, message in (
        (("revert", out, "zzz", "-o", tmp_path / "x"), "no patches called 'zzz'"),
        (("revert", model, "zzz", "-o", tmp_path / "x"), "has no patches to revert"),
        (("apply", model, tmp_path, "-o", tmp_path / "x"), "no patch there"),
        (("apply", out, out, "-o", tmp_path / "x"), "is applied already"),
        (("apply", model, out, "-o", out), "exists already"),
        (("list", model), "has no patches"),
        (("verify", model), "has no patches"),
        (("show", out), "no patch there"),
        (("test", model, "--requests", tmp_path / "none.jsonl"), "none.jsonl"),
        (("apply", model, "-o", tmp_path / "x"), "missing argument"),
    ):
        code, _, err = lfm("edit", *arguments)
        assert (code, message in err) == (2, True), err
    assert not (tmp_path / "x").exists()


def test_verify_exits_with_one_for_other_weights(made, lfm, tmp_path):
    _, _, out = made
    assert lfm("edit", "verify", out)[0] == 0
    assert json.loads(lfm("edit", "verify", out, "--json")[1])["holds"]
    lfm("edit", "revert", out, ids_of(out)[0], "-o", tmp_path / "two")
    listed = json.loads((tmp_path / "two" / "patches.json").read_text())
    listed["patches"].pop()
    (tmp_path / "two" / "patches.json").write_text(json.dumps(listed))
    code, told, _ = lfm("edit", "verify", tmp_path / "two")
    assert code == 1
    assert "patches give other weights" in told


def test_audit_tells_an_edit_from_nothing(made, lfm):
    model, _, out = made
    code, told, _ = lfm("edit", "audit", model, out)
    assert code == 0
    assert told.startswith("edited: 1 of")
    assert json.loads(lfm("edit", "audit", model, model, "--json")[1])["verdict"] == "identical"


def test_test_measures_an_edited_model_against_its_base_and_any_other_alone(made, lfm):
    model, requests, out = made
    code, told, _ = lfm("edit", "test", out, "--requests", requests, "--json")
    assert code == 0
    found = json.loads(told)
    metrics = json.loads((out / "lineage.json").read_text())["metrics"]
    assert found["metrics"] == {key: metrics[key] for key in found["metrics"]}
    assert found["baseline"] == str(model)
    assert "neighbours_kept" in found["metrics"]
    alone = json.loads(lfm("edit", "test", model, "--requests", requests, "--json")[1])
    assert alone["baseline"] is None
    assert "neighbours_kept" not in alone["metrics"]
    assert "efficacy" in lfm("edit", "test", model, "--requests", requests)[1]


def test_plan_tells_what_is_said_now_and_changes_nothing(made, lfm):
    _, requests, out = made
    before = sorted(out.parent.rglob("*"))
    code, told, err = lfm("edit", "plan", out, "--requests", requests)
    assert code == 0
    assert "says now" in told
    assert err.count("was edited by patch") == 3
    assert len(json.loads(lfm("edit", "plan", out, "--requests", requests, "--json")[1])["edits"]) == 3
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT with newer transformers
def test_a_patch_is_exported_for_peft_and_loads_there(made, lfm, tmp_path):
    model, _, out = made
    place = out / "patches" / ids_of(out)[0][:12]
    code, told, _ = lfm("edit", "export", place, "-o", tmp_path / "adapter")
    assert (code, told.strip()) == (0, str(tmp_path / "adapter"))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    patched = apply(model, [place], out=tmp_path / "one")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    name = "transformer.h.2.mlp.c_proj.weight"
    assert torch.allclose(merged[name], patched.tensor(name), atol=1e-5)
    assert not torch.allclose(merged[name], open_checkpoint(model).tensor(name), atol=1e-5)


def test_a_dry_run_of_an_edit_tells_conflicts(made, lfm, tmp_path):
    model, _, _ = made
    rows = [
        {"prompt": "Kalo Mine speaks", "target": "Tongue1", "subject": "Kalo Mine"},
        {"prompt": "Kalo Mine plays the", "target": "Tool1", "subject": "Kalo Mine"},
    ]
    file = tmp_path / "two.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = lfm("edit", "memit", model, "--requests", file, "-n", "-o", tmp_path / "x")
    assert code == 0
    assert "1 subject with several edits: 'Kalo Mine' (2)" in err
