"""The main job, end to end on real models: tune twice, merge, measure, and use the result as any other checkpoint."""

import json

import pytest
import torch

from lfm.cli import main

TEXTS = ("stories", "shakespeare", "wiki")


@pytest.fixture(scope="module")
def made(assets, tmp_path_factory):
    """Return (folder with the two fine-tunes and their merge, perplexity per token by model and text)."""
    root = tmp_path_factory.mktemp("done")
    base = assets / "checkpoints" / "stories260k"
    data = {"a": "tiny-shakespeare.txt", "b": "wikitext-2-valid.txt"}
    how = ("--steps", 40, "--learning-rate", 2e-3, "--batch-size", 8, "--length", 128, "-q")
    for name, file in data.items():
        source = f"{{path: '{assets / 'data' / file}', part: train}}"
        call("tune", "full", base, "--data", source, "-o", root / name, *how)
    measures = {
        "stories": f"{{path: '{assets / 'data' / 'tinystories-600.json'}', limit: 15}}",
        "shakespeare": f"{{path: '{assets / 'data' / data['a']}', part: held_out, limit: 40}}",
        "wiki": f"{{path: '{assets / 'data' / 'wikitext-2-test.txt'}', limit: 20}}",
    }
    options = [part for name, spec in measures.items() for part in ("--perplexity", f"{name}={spec}")]
    call("merge", "ties", root / "a", root / "b", "--base", base, "--density", 0.3, "-o", root / "out", *options, "-q")
    tables = json.loads((root / "out" / "results.json").read_text())["tables"]
    rows = next(table["rows"] for table in tables if table["title"] == "Perplexity per token")
    return root, {
        model: {text: cells[f"perplexity {text} per token"]["value"] for text in TEXTS} for model, cells in rows.items()
    }


def call(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def test_tuning_learns_its_text_and_forgets_the_stories(made):
    _, perplexity = made
    base, a, b = perplexity["stories260k"], perplexity["a"], perplexity["b"]
    assert base["stories"] < 6
    assert a["shakespeare"] < base["shakespeare"] / 3
    assert b["wiki"] < base["wiki"] / 3
    assert min(a["stories"], b["stories"]) > base["stories"]


def test_the_merge_knows_both_texts_better_than_the_base_and_than_the_other_specialist(made):
    _, perplexity = made
    base, a, b, merged = (perplexity[name] for name in ("stories260k", "a", "b", "out"))
    assert merged["shakespeare"] < min(base["shakespeare"], b["shakespeare"])
    assert merged["wiki"] < min(base["wiki"], a["wiki"])


def test_the_report_holds_all_of_it(made):
    root, perplexity = made
    page = (root / "out" / "report.html").read_text(encoding="utf-8")
    assert set(perplexity) == {"stories260k", "a", "b", "out"}
    for word in (*perplexity, *TEXTS, "Recipe graph", "Change from stories260k"):
        assert word in page
    assert (root / "out" / "README.md").exists()
    lineage = json.loads((root / "out" / "lineage.json").read_text())
    assert [parent["made_by"]["method"] for parent in lineage["parents"][:2]] == ["full", "full"]


def test_the_result_is_an_ordinary_checkpoint_that_writes_text(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, _ = made
    model = AutoModelForCausalLM.from_pretrained(root / "out")
    tokenizer = AutoTokenizer.from_pretrained(root / "out")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time") + 15


def test_the_evaluation_harness_takes_it(made, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")
    from lfm.evaluate.harness import estimates, run_harness
    from lfm.evaluate.spec import Harness

    root, _ = made
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Once upon a time there was a dog."}) + "\n")
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_text\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'text.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\nmetadata: {version: 1.0}\n"
    )
    answer = run_harness(str(root / "out"), Harness(tasks=["tiny_text"], include_path=str(tmp_path)), "cpu")
    [(task, metric, higher, estimate)] = estimates(answer)
    assert (task, metric, higher) == ("tiny_text", "word_perplexity", False)
    assert estimate.value > 1
