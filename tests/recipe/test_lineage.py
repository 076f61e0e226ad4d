"""lineage.json and the model card: complete, the same every time, and fit for the hub."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.tiny import write_llama

from lfm import run
from lfm.checkpoint import open_checkpoint
from lfm.cli import main
from lfm.recipe._yaml import parse_yaml
from lfm.recipe.lineage import card_metadata, hub_names, public_name
from lfm.recipe.schema import check_recipe


@pytest.fixture
def family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [str(write_llama(tmp_path / "models" / name, seed)) for seed, name in enumerate(("base", "a", "b"))]


def run_text(text):
    return run(check_recipe(parse_yaml(text, "r.yaml"), text))


def chain(family, out, length=3):
    """Return a recipe in which every step takes the two before it."""
    base, a, b = family
    steps = {"s0": {"merge": "linear", "models": [a, b], "weights": [1, 3]}, "s1": {"merge": "slerp", "models": [a, b]}}
    for number in range(2, length):
        steps[f"s{number}"] = {"merge": "ties", "models": [f"s{number - 1}", f"s{number - 2}"], "base": base}
    return yaml.safe_dump({"lfm": 1, "seed": 7, "steps": steps, "out": str(out)}, sort_keys=False)


def lineage_of(folder):
    return json.loads((folder / "lineage.json").read_text())


def test_lineage_says_everything_that_made_a_checkpoint(family, tmp_path):
    run_text(chain(family, "out"))
    lineage = lineage_of(tmp_path / "out" / "s2")
    assert {"lfm", "key", "environment", "seconds", "metrics", "notes"} <= set(lineage)
    assert (lineage["verb"], lineage["method"], lineage["seed"]) == ("merge", "ties", 7)
    assert lineage["paper"].startswith("https://arxiv.org/abs/")
    known = {"density": 0.2, "scale": 1.0, "normalize": True, "scope": "global", "rescale": "none", "rules": "paper"}
    assert lineage["parameters"] == known
    plain = {"weights": None, "dtype": None, "rounding": "nearest", "tokenizer": "same", "vary": {}, "slices": []}
    assert plain.items() <= lineage["inputs"].items()
    assert [entry["digest"] for entry in lineage["parents"]] == [
        open_checkpoint(tmp_path / "out" / "s1").digest,
        open_checkpoint(tmp_path / "out" / "s0").digest,
        open_checkpoint(family[0]).digest,
    ]
    made_by = lineage["parents"][1]["made_by"]
    assert (made_by["method"], made_by["inputs"]["weights"]) == ("linear", [1.0, 3.0])
    assert [entry["name"] for entry in made_by["parents"]] == family[1:]
    assert lineage["output"]["digest"] == open_checkpoint(tmp_path / "out" / "s2").digest
    assert {"python", "torch", "numpy"} <= set(lineage["environment"])


def test_lineage_is_the_same_every_time_but_for_time(family, tmp_path):
    run_text(chain(family, "out"))
    (tmp_path / "out").rename(tmp_path / "before")
    run_text(chain(family, "out"))
    for step in ("s0", "s1", "s2"):
        one, two = (lineage_of(tmp_path / folder / step) for folder in ("before", "out"))
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert (tmp_path / "before" / step / "README.md").read_text() == (
            tmp_path / "out" / step / "README.md"
        ).read_text()


def test_lineage_of_a_long_chain_names_every_ancestor_once(family, tmp_path):
    run_text(chain(family, "out", length=14))
    path = tmp_path / "out" / "s13" / "lineage.json"
    lineage = json.loads(path.read_text())
    known = {**lineage["ancestors"], **{p["digest"]: p["made_by"] for p in lineage["parents"] if "made_by" in p}}
    assert set(known) == {open_checkpoint(tmp_path / "out" / f"s{number}").digest for number in range(13)}
    assert path.stat().st_size < 40_000


def test_data_is_known_by_its_content(tmp_path, assets):
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog.\n\n" * 4)
    base = assets / "checkpoints" / "stories260k"
    out = tmp_path / "out"
    done = ["tune", "full", base, "--data", tmp_path / "text.txt", "--steps", 1, "--length", 16, "-o", out, "-q"]
    assert main([str(part) for part in done]) == 0
    data = lineage_of(out)["inputs"]["data"]
    assert data["path"] == str(tmp_path / "text.txt")
    assert data["rows"] == 4
    assert len(data["digest"]) == 64
    card = (out / "README.md").read_text()
    assert "data: text.txt" in card
    assert str(tmp_path) not in card
    assert lineage_of(out)["metrics"]["steps"] == 1


def test_the_hub_takes_the_card(family, tmp_path):
    run_text(chain(family, "out"))
    card = ModelCard.load(tmp_path / "out" / "s2" / "README.md")
    card.data.to_dict()
    assert card.data.base_model == ["s1", "s0", "base"]
    assert card.data.base_model_relation == "merge"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["lfm", "reuse", "ties"]
    text = (tmp_path / "out" / "s2" / "README.md").read_text()
    assert str(tmp_path) not in text
    body = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert body == {"s2": {"merge": "ties", "models": ["s1", "s0"], "base": "base"}}


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (("mit", None), None),
        (("mit", "llama3"), None),
        (("[mit, apache-2.0]", "mit"), None),
    ],
)
def test_the_strictest_known_licence_is_passed_on(family, tmp_path, licenses, expected):
    for model, license in zip(family[1:], licenses, strict=True):
        if license:
            (tmp_path / "models" / model / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    run_text(chain(family, "out", length=2))
    text = (tmp_path / "out" / "s0" / "README.md").read_text()
    assert ModelCard(text).data.license == expected
    assert ("License: not derived" in text) is (expected is None)


def test_names_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("models/base", "with space", "a+b"):
        (tmp_path / name).mkdir(parents=True)
    assert hub_names("org/name@main") == ["org/name"]
    assert hub_names("org/name+models/base") == ["org/name", "base"]
    assert hub_names("with space") == []
    assert public_name("models/../models/base") == "base"
    assert public_name(str(tmp_path / "a+b")) == "a+b"
    assert public_name(".") == tmp_path.name


@pytest.mark.parametrize("text", ["", "---\n", "---\n: [\n---\n", "---\n- a\n---\n", "no header\n---\na: 1\n---\n"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card_metadata(tmp_path) == {}
