"""The guard: an update that goes too far leaves no trace but a note; what is kept is measured again and again."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tests.edit import world

import lfm
from lfm.checkpoint import Delta, open_checkpoint
from lfm.data.requests import Neighbour, Request
from lfm.edit._contract import Guard, Inputs
from lfm.edit._guard import Look, Watch, conflicts, heat_map, largest_value
from lfm.edit._tuning import tune
from lfm.edit.ft_m import FtM
from lfm.recipe import patches
from lfm.recipe.step import Settings

LAYER = "transformer.h.1.mlp.c_proj.weight"
STRONG = FtM(layers=[1], steps=60, learning_rate=5e-3, enough=0.001)


@pytest.fixture(scope="module")
def folder():
    """A model that has hardly learned anything: whatever edits do to it, they do quickly."""
    return world.trained("gpt2", steps=2, count=12)


@pytest.fixture
def model(folder):
    return lfm.load(folder)


@pytest.fixture(scope="module")
def requests():
    found = []
    for one in world.requests(6, count=12):
        near = tuple(Neighbour(**other) for other in one.pop("neighbours"))
        found.append(Request(**{**one, "paraphrases": tuple(one["paraphrases"])}, neighbours=near))
    return found


def watch(model, folder, **limits):
    """Return a guard that by itself refuses nothing but what leaves no edit in force."""
    loose = {"perplexity": 1e9, "retention": 0.0}
    checkpoint = open_checkpoint(folder)
    return Watch(Guard(**(loose | limits)), model, lambda name: checkpoint.tensor(name))


def matrix(model):
    return model.module.get_parameter(LAYER).detach().clone()


def test_an_update_that_holds_is_kept_as_it_is(model, folder, requests):
    guard = watch(model, folder)
    before = matrix(model)
    [update] = tune(STRONG, model, requests[:1], 1, 0)
    after = matrix(model)
    assert guard.judge(update) is update
    assert torch.equal(matrix(model), after)
    [row] = guard.log
    assert row["verdict"] == "kept"
    assert row["norm"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert row["in_force"] == [True]


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"norm": 1e-4}, "of its length"),
        ({"spectrum": 1.0001}, "largest singular value"),
        ({"perplexity": 1.0001}, "perplexity of other text"),
    ],
)
def test_a_refused_update_leaves_no_trace_but_a_note(model, folder, requests, limits, why):
    guard = watch(model, folder, **limits)
    before = model.module.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    [update] = tune(STRONG, model, requests[:1], 1, 0)
    assert guard.judge(update) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    [note] = guard.notes()
    assert "update 1" in note
    assert why in note
    assert guard.metrics() == {"updates_refused": 1.0, "updates_shrunk": 0.0}


def test_an_update_that_does_nothing_of_what_was_asked_is_refused(model, folder, requests):
    guard = watch(model, folder)
    [update] = tune(FtM(layers=[1], steps=1, learning_rate=1e-6), model, requests[:1], 1, 0)
    assert guard.judge(update) is None
    assert "none of its own edits holds" in next(guard.notes())


def test_what_is_no_number_is_refused(model, folder, requests):
    guard = watch(model, folder)
    before = matrix(model)
    [update] = tune(STRONG, model, requests[:1], 1, 0)
    with torch.no_grad():
        model.module.get_parameter(LAYER)[0, 0] = float("nan")
    assert guard.judge(update) is None
    assert "makes a matrix infinite" in next(guard.notes())
    assert torch.equal(matrix(model), before)
    json.loads(guard.as_json())


def test_an_update_that_undoes_earlier_ones_is_refused_and_they_stay_in_force(model, folder, requests):
    guard = watch(model, folder, retention=1.0)
    for request in (requests[0], replace(requests[0], target="Firm3")):
        [update] = tune(STRONG, model, [request], 1, 0)
        guard.judge(update)
    assert [row["verdict"] for row in guard.log] == ["kept", "refused"]
    assert "leaves 0% of earlier edits in force" in guard.log[1]["against"][0]
    assert guard.log[1]["in_force"] == [True, False]


def test_a_shrunk_update_is_a_fraction_of_what_it_was(model, folder, requests):
    before = matrix(model)
    [update] = tune(STRONG, model, requests[:1], 1, 0)
    change = matrix(model) - before
    size = float(change.norm() / before.norm())
    guard = watch(lfm.load(folder), folder, mode="shrink", norm=0.6 * size)
    with torch.no_grad():
        guard.model.module.get_parameter(LAYER).copy_(matrix(model))
    found = guard.judge(update)
    assert guard.log[0]["verdict"] == "shrunk to 0.5"
    assert torch.equal(found.changes[LAYER].values, update.changes[LAYER].values * 0.5)
    assert torch.allclose(matrix(guard.model), before + 0.5 * change, atol=1e-7)


def test_shrinking_to_nothing_is_refusing(model, folder, requests):
    guard = watch(model, folder, mode="shrink", norm=1e-6)
    before = matrix(model)
    [update] = tune(STRONG, model, requests[:1], 1, 0)
    assert guard.judge(update) is None
    assert torch.equal(matrix(model), before)


def test_least_squares_forget_the_keys_of_a_refused_update(folder, requests):
    from lfm.edit._least_squares import Editor, layers_of
    from lfm.edit.memit import Memit

    model = lfm.load(folder)
    method = Memit(contexts=0, steps=2, layers=[1])
    editor = Editor(method, model, layers_of(method, model), None, [])
    remembered, before = editor.remembered(), matrix(model)
    editor.update(requests[:2])
    with torch.no_grad():
        model.module.get_parameter(LAYER).copy_(before)
    editor.forget(remembered)
    again = editor.update(requests[2:4])
    with torch.no_grad():
        model.module.get_parameter(LAYER).copy_(before)
    fresh = Editor(method, model, layers_of(method, model), None, []).update(requests[2:4])
    assert torch.equal(again.changes[LAYER].v, fresh.changes[LAYER].v)


def test_the_largest_singular_value_is_right():
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 7), (5, 30)):
        some = torch.randn(shape, generator=generator)
        some += 6 * torch.outer(torch.ones(shape[0]), torch.ones(shape[1])) / (shape[0] * shape[1]) ** 0.5
        assert largest_value(some) == pytest.approx(float(torch.linalg.matrix_norm(some, 2)), rel=1e-3)
    assert largest_value(torch.full((2, 2), float("nan"))) == float("inf")


def test_a_look_is_judged_by_its_limits():
    fine = Look(0.1, 1.0, 1.0, None, (True,), 1)
    assert fine.against(Guard()) == []
    assert replace(fine, kept=0.9).against(Guard()) == []
    assert len(replace(fine, norm=2.0, spectrum=3.0, perplexity=2.0, kept=0.5, own=0).against(Guard())) == 3
    assert len(replace(fine, norm=2.0, spectrum=3.0).against(Guard(norm=1, spectrum=2))) == 2
    assert len(replace(fine, perplexity=float("nan")).against(Guard())) == 1


def test_a_guard_is_a_word_or_a_mapping():
    told = {"model": "m", "requests": "r"}
    assert Inputs(**told).guard is None
    assert Inputs(**told, guard="shrink").guard == Guard(mode="shrink")
    assert Inputs(**told, guard={"mode": "off"}).guard.mode == "off"
    with pytest.raises(ValidationError):
        Inputs(**told, guard="perhaps")
    with pytest.raises(ValidationError):
        Guard(perplexity=0.5)


def test_the_picture_has_a_row_for_updates_and_a_column_for_later_ones():
    rows = [{"requests": [str(i)], "in_force": [j % 2 == 0 for j in range(i + 1)]} for i in range(60)]
    found = heat_map(rows)
    assert len(found["rows"]) == len(found["columns"]) == 20
    assert found["rows"][0] == "edits of update 1-3"
    assert found["values"][1][0] is None  # not made yet
    assert found["values"][0][-1] == pytest.approx(2 / 3)
    assert heat_map(rows[:2])["values"] == [[1.0, 1.0], [None, 0.0]]


def test_edits_that_get_in_each_others_way_are_told_before_any_is_made():
    one = Request("A lives in", "B", "A", paraphrases=("The home of A is",), where="f:1")
    two = Request("A speaks", "C", "A", where="f:2")
    three = Request("The home of A is", "D", "A", where="f:3")
    four = Request("E lives in", "B", "E", where="f:4")
    told = {"requests": [{"prompt": "E lives in", "target": "X"}]}
    patch = Delta({}, None, told)
    overlap = torch.eye(4)
    overlap[0, 3] = overlap[3, 0] = 0.8
    notes = list(conflicts([one, two, three, four], [patch], overlap))
    assert [note.partition(":")[0].partition(" (")[0] for note in notes[:1]] == ["1 subject with several edits"]
    assert "f:1: a paraphrase of 'A lives in' (to 'B') is the prompt of f:3 (to 'D')" in notes[1]
    assert notes[2].startswith(f"'E lives in' was edited by patch {patch.id[:12]} to 'X'")
    assert notes[3] == "1 pair of edits of different subjects share most of their keys: 'E' and 'A' 0.80"
    assert list(conflicts([four], [], torch.eye(1))) == []


# --- the whole way --------------------------------------------------------------------------------------------------


def run(folder, requests, out, guard):
    rows = [{"prompt": one.prompt, "target": one.target, "subject": one.subject} for one in requests]
    file = out.parent / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return lfm.edit(STRONG, folder, file, out=out, batch=1, guard=guard, settings=Settings(quiet=True))


def test_refused_updates_are_in_the_lineage_and_the_model_is_its_base(folder, requests, tmp_path):
    made = run(folder, requests[:2], tmp_path / "out", {"norm": 1e-6})
    assert made.digest == open_checkpoint(folder).digest
    assert patches.read_edited(made.folder).patches == ()
    assert made.lineage["metrics"]["updates_refused"] == 2
    assert sum("refused" in note for note in made.lineage["notes"]) == 2


def test_several_updates_are_guarded_unless_it_is_said_otherwise(folder, requests, tmp_path):
    made = run(folder, requests[:3], tmp_path / "out", None)
    kept = json.loads((made.folder / "retention.json").read_text())
    assert kept["guard"]["mode"] == "refuse"
    assert [len(row["in_force"]) for row in kept["updates"]] == [1, 2, 3]
    assert [one["prompt"] for one in kept["edits"]] == [one.prompt for one in requests[:3]]
    verdicts = [row["verdict"] for row in kept["updates"]]
    assert len(patches.read_edited(made.folder).patches) == verdicts.count("kept")
    report = (made.folder / "report.html").read_text()
    assert "Edits in force over time" in report
    off = run(folder, requests[:3], tmp_path / "off", "off")
    assert not (off.folder / "retention.json").exists()
    assert len(patches.read_edited(off.folder).patches) == 3
    alone = run(folder, requests[:1], tmp_path / "alone", None)
    assert not (alone.folder / "retention.json").exists()
