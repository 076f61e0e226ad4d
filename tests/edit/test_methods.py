"""Edits of models of several shapes: mechanics on random weights, where a key gives its value afterwards."""

import json

import pytest
import torch
from tests.edit import world
from transformers import AutoConfig, AutoModelForCausalLM

import lfm
from lfm.checkpoint import open_checkpoint
from lfm.data.requests import Neighbour, Request
from lfm.edit._contract import LeastSquares
from lfm.edit._least_squares import Editor, layers_of
from lfm.edit._locate import memories, padded, reading, weight_of
from lfm.edit._score import Drift, listen, metrics
from lfm.edit._statistics import Statistics, statistics
from lfm.edit._targets import find_values
from lfm.edit._tuning import tune
from lfm.edit.alpha_edit import AlphaEdit
from lfm.edit.emmet import Emmet
from lfm.edit.ft_l import FtL
from lfm.edit.memit import Memit
from lfm.edit.rome import Rome
from lfm.recipe.step import Settings

PEOPLE = 12
SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "pad_token_id": 1,
    },
}


def saved(folder, kind: str, dtype=torch.float32):
    """Save a model of random weights, large enough for its words to differ."""
    words = world.tokenizer(PEOPLE)
    config = AutoConfig.for_model(kind, vocab_size=len(words), bos_token_id=0, eos_token_id=0, **SHAPES[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: saved(tmp_path_factory.mktemp("shapes") / kind, kind) for kind in SHAPES}


def asks(count: int) -> list[Request]:
    found = []
    for one in world.requests(count, count=PEOPLE):
        near = tuple(Neighbour(**other) for other in one.pop("neighbours"))
        found.append(Request(**{**one, "paraphrases": tuple(one["paraphrases"])}, neighbours=near))
    return found


def editor(method: LeastSquares, model, contexts=("Now then . ",)) -> Editor:
    layers = layers_of(method, model)
    known = statistics(model, [one.out.name for one in layers], 600, digest=None, seed=0, texts=None)
    return Editor(method, model, layers, known, list(contexts))


@pytest.mark.parametrize("kind", SHAPES)
def test_after_rome_the_key_gives_the_value_in_any_shape_of_model(folders, kind):
    model = lfm.load(folders[kind])
    method = Rome(layers=[1], steps=4, keys="bare")
    [request], [layer] = asks(1), layers_of(method, model)
    found = find_values(model, [request], layer, method, ["Now then . "]).values
    before = {name: one.detach().clone() for name, one in model.module.named_parameters()}
    made = editor(method, model)
    [change] = made.update([request]).changes.values()
    torch.testing.assert_close(made._now([request], layer.out.name), found, rtol=1e-3, atol=1e-4)
    changed = {n for n, one in model.module.named_parameters() if not torch.equal(one, before[n])}
    assert changed == {layer.out.weight}
    assert change.fits(tuple(weight_of(model.module, layer.out).shape))
    torch.testing.assert_close(before[layer.out.weight] + change.u @ change.v, weight_of(model.module, layer.out))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_after_emmet_all_edits_give_their_values_together(folders, kind):
    model = lfm.load(folders[kind])
    method = Emmet(layers=[1], steps=3, contexts=0)
    requests = asks(3)
    made = editor(method, model, contexts=())
    found = find_values(model, requests, layers_of(method, model)[0], method, []).values
    made.update(requests)
    torch.testing.assert_close(made._now(requests, layers_of(method, model)[0].block.name), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [Rome(layers=[1], steps=5), Memit(layers=[1, 2], steps=5)], ids=["out", "stream"])
def test_values_searched_for_side_by_side_are_those_found_one_by_one(folders, method):
    model = lfm.load(folders["gpt2"])
    requests, top = asks(4), layers_of(method, model)[-1]
    together = find_values(model, requests, top, method, ["Now then . "])
    alone = [find_values(model, [one], top, method, ["Now then . "]) for one in requests]
    torch.testing.assert_close(together.values, torch.cat([one.values for one in alone]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.losses, torch.cat([one.losses for one in alone]), rtol=1e-3, atol=1e-3)


def test_the_search_stays_within_its_bound(folders):
    model = lfm.load(folders["llama"])
    method = Rome(layers=[1], steps=6, clamp=0.2)
    [layer] = layers_of(method, model)
    made = editor(method, model)
    requests = asks(3)
    found = find_values(model, requests, layer, method, [])
    moved = (found.values - made._now(requests, layer.out.name)).norm(dim=1)
    assert bool((moved <= 0.2 * made._now(requests, layer.block.name).norm(dim=1) + 1e-4).all())


def test_statistics_in_batches_are_those_of_all_keys_at_once(folders):
    model = lfm.load(folders["llama"])
    name = memories(model)[1].out.name
    texts = [torch.arange(2, 2 + length) for length in (9, 4, 6)]
    found = statistics(model, [name], 1000, digest=None, seed=0, texts=texts)
    keys = []
    with torch.no_grad(), reading(model.module, [name], inputs=True) as seen:
        for text in texts:
            model.module(**padded([text.tolist()], torch.device("cpu")))
            keys.append(seen[name][0].double())
    stacked = torch.cat(keys)
    assert found.tokens == len(stacked) == 19
    torch.testing.assert_close(found.covariances[name], stacked.T @ stacked / 19, rtol=1e-5, atol=1e-7)
    assert 1 <= found.effective_rank(name) <= 19


def test_statistics_are_kept_by_what_the_model_holds(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = lfm.load(folders["gpt2"])
    name = memories(model)[1].out.name

    def taken(digest: str) -> Statistics:
        return statistics(model, [name], 200, digest=digest, seed=0, texts=None)

    first = taken("a")
    weight_of(model.module, memories(model)[0].out).data.mul_(5)
    torch.testing.assert_close(taken("a").covariances[name], first.covariances[name], rtol=0, atol=0)
    assert not torch.allclose(taken("b").covariances[name], first.covariances[name])


def test_no_weight_leaves_the_bound_of_ft_l(folders):
    model = lfm.load(folders["gpt2"])
    method = FtL(layers=[1], steps=5, learning_rate=0.1, epsilon=1e-3)
    [update] = tune(method, model, asks(2), None, 0)
    [change] = update.changes.values()
    assert 0 < float(change.values.abs().max()) <= 1e-3 + 1e-7


def test_alpha_edit_hardly_changes_what_ordinary_text_gives(folders):
    model = lfm.load(folders["gpt2"])
    drift = {}
    for method in (AlphaEdit(layers=[1], steps=5), Emmet(layers=[1], steps=5)):
        model = lfm.load(folders["gpt2"])
        moved = Drift(model, 0)
        editor(method, model).update(asks(2))
        drift[type(method)] = moved.now(model)
    assert drift[AlphaEdit] < drift[Emmet]


def test_an_unchanged_model_has_not_drifted_and_keeps_everything(folders):
    model = lfm.load(folders["llama"])
    requests = asks(3)
    before, moved = listen(model, requests, answers=0), Drift(model, 0)
    found = metrics(before, listen(model, requests, answers=0))
    assert found["neighbours_kept"] == found["same_subject_kept"] == 1
    assert moved.now(model) == pytest.approx(0, abs=1e-6)
    weight_of(model.module, memories(model)[1].out).data.mul_(20)
    assert moved.now(model) > 1e-3


def test_facts_of_the_subject_itself_are_counted_apart_from_those_of_others(folders):
    model = lfm.load(folders["gpt2"])
    [request] = asks(1)
    [said] = listen(model, [request], answers=0)
    assert said.same_subject == tuple(request.subject in near.prompt for near in request.neighbours)
    assert sum(said.same_subject) == len(world.RELATIONS) - 1


def test_edits_of_a_bf16_checkpoint_are_measured_as_they_are_saved(tmp_path):
    folder = saved(tmp_path / "model", "llama", torch.bfloat16)
    requests = tmp_path / "facts.jsonl"
    requests.write_text("\n".join(json.dumps(one) for one in world.requests(2, count=PEOPLE)))
    out = tmp_path / "edited"
    lfm.edit(
        Rome(layers=[1], steps=5, contexts=0),
        str(folder),
        str(requests),
        tokens=200,
        guard={"mode": "off"},
        out=out,
        settings=Settings(quiet=True),
    )
    metrics_told = json.loads((out / "lineage.json").read_text())["metrics"]
    edited = lfm.load(out)
    name = memories(edited)[1].out.weight
    saved_as = open_checkpoint(out).tensor(name)
    assert saved_as.dtype == torch.bfloat16
    found = metrics(listen(lfm.load(folder), asks(2), answers=0), listen(edited, asks(2), answers=0))
    for measure in ("efficacy", "paraphrase", "neighbours_kept", "same_subject_kept"):
        assert metrics_told[measure] == found[measure]
    assert metrics_told["kl_drift"] >= 0
