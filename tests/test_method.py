"""What methods need, and the advisor's answer from it."""

from itertools import product

import pytest

import lfm
from lfm.method import Access, Data, Have, Needs, cards


def test_nothing_is_missing_where_everything_is_had():
    needs = Needs(Access.WEIGHTS, Data.LABELLED, trains=True, sources=(2, 3), base=True, same_architecture=True)
    assert needs.missing(Have(Access.WEIGHTS, Data.LABELLED, sources=3)) == []


@pytest.mark.parametrize(
    ("needs", "have", "line"),
    [
        (Needs(), Have(Access.PROBS), "needs weights of the models, you have probs"),
        (Needs(data=Data.FEW), Have(data=Data.UNLABELLED), "needs few data, you have unlabelled"),
        (Needs(trains=True), Have(trains=False), "needs to train, and training is ruled out"),
        (Needs(sources=(2, None)), Have(sources=1), "takes 2 or more models, you have 1"),
        (Needs(sources=(1, 1)), Have(sources=2), "takes 1 model, you have 2"),
        (Needs(base=True), Have(base=False), "needs the base"),
        (Needs(same_architecture=True), Have(same_architecture=False), "needs models of one architecture"),
        (Needs(same_tokenizer=True), Have(same_tokenizer=False), "needs models with one tokenizer"),
        (Needs(extras=("no_such_package",)), Have(), "needs the package 'no_such_package', which is not installed"),
    ],
)
def test_what_is_missing_is_named(needs, have, line):
    [found] = needs.missing(have)
    assert line in found


def test_a_higher_level_includes_the_lower_ones():
    for asked, had in product(Access, Access):
        assert (Needs(access=asked).missing(Have(access=had)) == []) == (had >= asked)
    for asked, had in product(Data, Data):
        assert (Needs(data=asked).missing(Have(data=had)) == []) == (had >= asked)


def test_the_advisor_answers_for_every_method():
    answers = lfm.advise(Have(Access.WEIGHTS, Data.NONE, trains=False, sources=2))
    assert set(answers) == {f"{verb} {name}" for verb, name in cards()}
    assert answers["merge ties"] == []
    assert answers["tune full"]
