"""The checks do find what they are there for: a good method passes, one flaw in it is found."""

import re

import pytest
from hypothesis import Phase
from tests.conformance import checks, merges

from lfm.method import cards, read_card

GOOD = '''"""Give the first model, times a factor: a method for tests."""

import torch
from pydantic import Field

from lfm.method import Needs
from lfm.reuse.merge._machine.array import Array
from lfm.reuse.merge._contract import Elementwise, Site


class First(Elementwise):
    needs = Needs(sources=(1, 1))
    paper = "https://example.org/first"
    weighted = False

    scale: float = Field(1.0, gt=0, description="Factor on the result.")

    def merge(self, site: Site, measured: None) -> Array:
        return site.sources[0] * self.scale
'''
SCALE = "    scale: float"
FLAWS = {
    "a summary that is no sentence": ("for tests.", "for tests", checks.says_what_it_is),
    "a paper that is no address": ("https://example.org/first", "somewhere", checks.says_what_it_is),
    "a library": ("import torch\n", "import torch\nimport yaml\n", checks.imports_little),
    "another paradigm": ("import torch\n", "import torch\nfrom lfm.tune import _engine\n", checks.imports_little),
    "too long": ("class First", "\n" * 150 + "class First", checks.imports_little),
    "abstract": ("def merge", "def _merge", checks.is_final),
    "undescribed": (', description="Factor on the result."', "", checks.describes_and_bounds_its_parameters),
    "a parameter of the verb": ("scale", "weights", checks.shares_no_name_with_what_the_verb_takes),
    "a parameter out of sight": (
        SCALE,
        f"    if True:\n        hidden: int = 1\n{SCALE}",
        checks.reads_the_same_without_being_imported,
    ),
    "not itself": ("sources[0] *", "sources[0] + ", merges.gives_back_what_is_everywhere_the_same),
    "not whole": ("* self.scale", "* 0.5", merges.gives_back_a_single_source),
    "depends on the order": ("(1, 1)", "(1, None)", merges.does_not_depend_on_the_order_of_sources),
    "not repeatable": ("* self.scale", "* float(torch.rand(()))", merges.does_not_depend_on_how_it_runs),
}  # fmt: skip


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a method file, make it known, and return its card."""

    def make(label, text):
        module = "first_" + re.sub(r"\W", "_", label)
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        card = read_card(module, tmp_path / f"{module}.py")
        monkeypatch.setitem(cards(), ("merge", module), card)
        return card

    return make


def test_a_good_method_passes(make):
    checks.check_card(make("good", GOOD))


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found(flaw, make, monkeypatch):
    monkeypatch.setattr(merges, "PHASES", (Phase.generate,))  # nobody reads the smallest example
    good, bad, check = FLAWS[flaw]
    assert good in GOOD
    try:
        card = make(flaw, GOOD.replace(good, bad))
    except ValueError:
        pytest.fail("the registry takes it; the check is to find it")
    with pytest.raises(AssertionError):
        check(card)
