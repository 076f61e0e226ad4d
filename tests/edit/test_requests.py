"""Requests: every layout that is read, and everything that is wrong with them, all of it said at once."""

import pytest

from lfm.data._rows import Rows
from lfm.data.requests import Neighbour, Request, requests_of
from lfm.errors import RequestError


def rows(*given: dict) -> Rows:
    names = list(dict.fromkeys(name for row in given for name in row))
    columns = {name: [row.get(name) for row in given] for name in names}
    return Rows(columns, "facts.jsonl", lines=list(range(1, len(given) + 1)))


def read(*given: dict) -> list[Request]:
    return requests_of(rows(*given))


FACT = {"prompt": "Ada was born in", "target": "Rome"}


def test_our_layout_takes_all_it_knows():
    [found] = read(
        FACT
        | {
            "subject": "Ada",
            "old": "Paris",
            "paraphrases": ["The birthplace of Ada is "],
            "neighbours": ["Bo was born in", {"prompt": "Cy was born in", "answer": "Oslo"}],
        }
    )
    assert (found.prompt, found.target, found.subject, found.old) == ("Ada was born in", "Rome", "Ada", "Paris")
    assert found.paraphrases == ("The birthplace of Ada is",)
    assert found.neighbours == (Neighbour("Bo was born in"), Neighbour("Cy was born in", "Oslo"))


def test_lists_may_be_written_as_json_as_a_table_has_them():
    [found] = read(FACT | {"paraphrases": '["One", "Two"]', "neighbours": '[{"prompt": "Bo", "answer": "x"}]'})
    assert found.paraphrases == ("One", "Two")
    assert found.neighbours == (Neighbour("Bo", "x"),)


def test_counterfact():
    [found] = read(
        {
            "requested_rewrite": {
                "prompt": "The mother tongue of {} is",
                "subject": "Danielle Darrieux",
                "target_new": {"str": "English"},
                "target_true": {"str": "French"},
            },
            "paraphrase_prompts": ["Danielle Darrieux spoke"],
            "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
        }
    )
    assert found.prompt == "The mother tongue of Danielle Darrieux is"
    assert (found.target, found.old, found.subject) == ("English", "French", "Danielle Darrieux")
    assert found.neighbours == (Neighbour("The mother tongue of Léon Blum is", "French"),)


def test_zsre():
    [found] = read(
        {
            "src": "What is Ada's home?",
            "alt": "Rome",
            "subject": "Ada",
            "answers": ["Paris"],
            "rephrase": "Where does Ada live?",
            "loc": "nq question: who sings",
            "loc_ans": "Bo",
        }
    )
    assert (found.target, found.old, found.paraphrases) == ("Rome", "Paris", ("Where does Ada live?",))
    assert found.neighbours == (Neighbour("nq question: who sings", "Bo"),)


def test_easyedit_and_knowedit():
    plain, by_kind = read(
        {
            "prompt": "Ada lives in",
            "target_new": "Rome",
            "ground_truth": "Paris",
            "subject": "Ada",
            "rephrase_prompt": "Ada's home is",
            "locality_prompt": "Bo lives in",
            "locality_ground_truth": "Oslo",
        },
        {
            "prompt": "Cy lives in",
            "target_new": "Rome",
            "locality": {"Relation_Specificity": [{"prompt": "Cy speaks", "ground_truth": [["Dutch"]]}]},
        },
    )
    assert (plain.old, plain.paraphrases, plain.neighbours) == (
        "Paris",
        ("Ada's home is",),
        (Neighbour("Bo lives in", "Oslo"),),
    )
    assert by_kind.neighbours == (Neighbour("Cy speaks", "Dutch"),)


def test_a_request_that_is_there_twice_counts_once():
    assert len(read(FACT, FACT)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (FACT | {"target": "  "}, "target is empty"),
        (FACT | {"target": None}, "target: expected text"),
        (FACT | {"prompt": ""}, "prompt is empty"),
        (FACT | {"subject": "Bo"}, "does not occur in the prompt"),
        (FACT | {"neighbours": 3}, "neighbours: expected a list"),
        (FACT | {"paraphrases": [3]}, "paraphrases: expected a list of texts"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(row, said):
    with pytest.raises(RequestError) as caught:
        read({"prompt": "Bo was born in", "target": "Oslo"}, row)
    [problem] = caught.value.problems
    assert said in problem
    assert problem.startswith("facts.jsonl:2")


def test_contradictions_name_both_lines():
    with pytest.raises(RequestError, match=r"facts.jsonl:2.*'Oslo'.*facts.jsonl:1.*'Rome'"):
        read(FACT, FACT | {"target": "Oslo"})


def test_all_problems_come_together():
    with pytest.raises(RequestError) as caught:
        read(FACT | {"target": ""}, FACT | {"subject": "Bo"}, FACT, FACT | {"target": "Oslo"})
    assert len(caught.value.problems) == 3


def test_other_columns_are_refused_with_what_is_needed():
    with pytest.raises(RequestError, match="takes the columns prompt and target"):
        read({"question": "x", "answer": "y"})
