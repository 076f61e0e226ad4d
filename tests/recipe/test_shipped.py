"""The shipped recipes do what they say (`digits` is run with the README's commands)."""

import json

from lfm import run
from lfm.cli._recipes import shipped


def test_pydoc_makes_a_soup_that_is_better_than_the_base_and_no_worse_than_its_worse_half(tmp_path):
    run(shipped()["pydoc"], out=tmp_path / "out")
    tables = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]
    rows = next(table["rows"] for table in tables if table["title"] == "Perplexity per token")
    perplexity = {name: row["perplexity topics per token"]["value"] for name, row in rows.items()}
    assert perplexity["base"] < 12
    assert perplexity["soup"] < max(perplexity["one"], perplexity["two"]) < perplexity["base"]


def test_every_shipped_recipe_is_run_by_a_test():
    assert set(shipped()) == {"digits", "pydoc"}
