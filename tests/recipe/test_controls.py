"""Controls: the same step by other methods, beside it."""

import pytest

from lfm.errors import RequestError
from lfm.recipe.schema import load_recipe

FRAME = """lfm: 1
models: {big: {config: {model_type: vit}}}
steps:
  small:
    distill: response
    teacher: big
    student: big
    data: "sklearn:digits"
    batch_size: 8
    temperature: 2.0
    controls: %s
evaluate: {accuracy: "sklearn:digits", compare: [small]}
"""


def recipe(tmp_path, controls):
    path = tmp_path / "recipe.yaml"
    path.write_text(FRAME % controls)
    return load_recipe(path)


def test_a_control_takes_over_what_it_has_a_place_for(tmp_path):
    found = recipe(tmp_path, "[noise]")
    control = found.steps["small-noise"]
    assert control.as_dict() == {
        "distill": "noise",
        "teacher": "big",
        "student": "big",
        "batch_size": 8,
        "temperature": 2.0,
    }
    assert control.control_of == "small"
    assert found.steps["small"].control_of is None


def test_a_control_may_differ_in_anything(tmp_path):
    found = recipe(tmp_path, "{cold: {distill: response, temperature: 1.0}, noise: {pool: 30}}")
    cold, noise = (found.steps[f"small-{name}"].as_dict() for name in ("cold", "noise"))
    assert cold == found.steps["small"].as_dict() | {"temperature": 1.0}
    assert noise["pool"] == 30


def test_controls_are_measured_where_their_step_is(tmp_path):
    found = recipe(tmp_path, "[noise]")
    assert found.evaluate is not None
    assert found.evaluate.compare == ["small", "small-noise"]


@pytest.mark.parametrize(
    ("controls", "told"),
    [
        ("noise", "controls are a list of methods"),
        ("[nois]", "did you mean 'noise'"),
        ("{noise: 3}", "a control is a mapping"),
        ("{noise: {pol: 3}}", "did you mean 'pool'"),
        ("{noise: {pool: -1}}", "greater than or equal to 1"),
        ("[noise, 3]", "controls are a list of methods"),
    ],
)
def test_what_is_wrong_with_a_control_is_told_with_its_line(tmp_path, controls, told):
    with pytest.raises(RequestError, match=told) as raised:
        recipe(tmp_path, controls)
    assert "recipe.yaml:11" in str(raised.value)


def test_a_control_has_a_name_of_its_own(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        (FRAME % "[noise]").replace("  small:\n", "  small-noise: {merge: linear, models: [big]}\n  small:\n", 1)
    )
    with pytest.raises(RequestError, match="makes 'small-noise', as another step does"):
        load_recipe(path)
