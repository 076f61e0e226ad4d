"""Whole answers are ranked in pairs, fused, and asked for from a larger model where a small one is unsure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.reuse.test_ensemble_text_bytes import llama

from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.models.local import LocalBackend, byte_tokenizer
from lfm.models.text import Completion, Message, Sampling, Token
from lfm.reuse.ensemble._answers import (
    BestOfBackend,
    Candidates,
    CascadeBackend,
    FuseBackend,
    Judge,
    Likelihood,
    Ranker,
    confidence,
    ranked,
)
from lfm.reuse.ensemble.best_of import BestOf
from lfm.reuse.ensemble.byte_average import ByteAverage
from lfm.reuse.ensemble.fuse import Fuse
from lfm.reuse.ensemble.text_cascade import TextCascade

ENCODER = Encoder("causal-lm")


class Endpoint:
    """Answers by a rule, and remembers what it was asked: what an endpoint is to an ensemble."""

    def __init__(self, rule, offers=Access.LABELS):
        self.rule, self.offers, self.asked, self.how = rule, offers, [], []

    def write(self, prompts, how, tell):
        self.asked += prompts
        self.how.append(how)
        made = [self.rule(prompt, number) for number, prompt in enumerate(prompts)]
        return [one if isinstance(one, Completion) else Completion(one, "stop") for one in made]


def handle(rule, offers=Access.LABELS):
    backend = Endpoint(rule, offers)
    return Model(backend, offers, "causal-lm", ENCODER, "endpoint"), backend


def local(seed=0):
    model = llama(byte_tokenizer(), seed, max_position_embeddings=512)
    encoder = Encoder("causal-lm", model.tokenizer, context=512)
    return Model(LocalBackend(model.module, model.tokenizer), Access.WEIGHTS, "causal-lm", encoder, "local")


class Longest(Ranker):
    """Prefers the longer answer."""

    def prefer(self, prompt, answers):
        lengths = np.array([len(answer) for answer in answers])
        return 0.5 + 0.5 * np.sign(lengths[:, None] - lengths[None, :])


def parts(question):
    """Return the two answers shown to a judge."""
    first, second = question.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
    return first, second.split("\n\nSay A or B")[0]


def sure(text, *probabilities):
    tokens = tuple(Token(text, math.log(one), {}) for one in probabilities)
    return Completion(text, "stop", tokens)


# --- rankers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("A", "B"), ("A.", "B."), ("**A**", "**B**"), (" a", " b\n")])
def test_a_judge_says_which_is_better(words):
    judge, backend = handle(lambda question, _: words[len(parts(question)[0]) < len(parts(question)[1])])
    answers = ["aa", "aaaa", "a"]
    found = Judge(judge).prefer("Write a.", answers)
    assert np.array_equal(found, Longest().prefer("", answers))
    assert len(backend.asked) == 6
    assert ranked(Judge(judge), "Write a.", answers) == [1, 0, 2]


def test_a_judge_that_always_says_the_first_prefers_none():
    judge, _ = handle(lambda question, _: "A")
    assert np.array_equal(Judge(judge).prefer("x", ["p", "q"]), np.full((2, 2), 0.5))
    unclear, _ = handle(lambda question, _: "Another question!")
    assert np.array_equal(Judge(unclear).prefer("x", ["p", "q"]), np.full((2, 2), 0.5))


def test_a_judge_with_probabilities_is_asked_for_them():
    def rule(question, _):
        share = 0.9 if parts(question)[0] == "good" else 0.4
        top = {" A": math.log(share * 0.5), "B": math.log((1 - share) * 0.5), "Both": math.log(0.5)}
        return Completion("Both", "length", (Token("Both", math.log(0.5), top),))

    judge, backend = handle(rule, Access.PROBS)
    found = Judge(judge).prefer("x", ["good", "bad"])
    assert np.allclose(found, [[0.5, 0.75], [0.25, 0.5]])
    assert backend.how[0].top_logprobs == 20


def test_a_likelihood_is_the_mean_of_the_tokens():
    model, answers = local(), ["abc", "b c d", "zz"]
    found = Likelihood(model, 2.0).prefer("The", answers)
    tokenizer = model.encoder.tokenizer
    scores = []
    for answer in answers:
        prompt, ids = tokenizer("The")["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            rows = model.module(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        scores.append(np.mean([rows[len(prompt) - 1 + place, token].item() for place, token in enumerate(ids)]))
    expected = [[1 / (1 + math.exp(-2 * (one - other))) for other in scores] for one in scores]
    assert np.allclose(found, expected, atol=1e-5)
    assert np.allclose(found + found.T, 1)


# --- best of n, and fusing ------------------------------------------------------------------------------------------


def test_the_best_of_several_members_is_written():
    members = [handle(lambda prompt, _, text=text: f"{prompt} {text}")[0] for text in ("a", "abc", "ab")]
    heard = []
    made = BestOfBackend(Candidates(members), Longest()).write(
        ["p", "q"], Sampling(), lambda *piece: heard.append(piece)
    )
    assert [one.text for one in made] == ["p abc", "q abc"]
    assert heard == [(0, "p abc"), (1, "q abc")]


def test_several_candidates_of_one_member_are_drawn():
    member, backend = handle(lambda prompt, number: "x" * (number % 3 + 1))
    made = BestOfBackend(Candidates([member], 3, 0.7), Longest()).write(["p", "q"], Sampling(), None)
    assert [one.text for one in made] == ["xxx", "xxx"]
    assert backend.asked == ["p"] * 3 + ["q"] * 3
    assert backend.how[0].temperature == 0.7
    found = Candidates([local()], 4, 1.0).write(["ab"], Sampling(max_new_tokens=6, seed=1))
    assert len(found[0]) > 1, "candidates of one member differ"


def test_a_single_candidate_is_not_ranked():
    judge, backend = handle(lambda question, _: "A")
    members = [handle(lambda prompt, _: "same")[0]] * 2
    assert BestOfBackend(Candidates(members), Judge(judge)).write(["p"], Sampling(), None)[0].text == "same"
    assert not backend.asked


def test_models_in_memory_and_endpoints_mix():
    remote, _ = handle(lambda prompt, _: "short")
    made = BestOfBackend(Candidates([remote, local()]), Likelihood(local())).write(
        ["ab"], Sampling(max_new_tokens=5), None
    )
    own = local().complete(["ab"], 5)[0]
    assert made[0].text in ("short", own)
    assert made[0].text == own, "a model prefers its own greedy text"


def test_fusing_shows_the_best_answers():
    members = [handle(lambda prompt, _, text=text: text)[0] for text in ("a{b}", "abcdef", "abc")]
    fuser, backend = handle(lambda prompt, _: "fused")
    made = FuseBackend(Candidates(members), Longest(), fuser, keep=2).write(["Say {x}."], Sampling(), None)
    assert made[0].text == "fused"
    assert "Say {x}." in backend.asked[0]
    assert backend.asked[0].index("Answer 1:\nabcdef") < backend.asked[0].index("Answer 2:\na{b}")
    assert "Answer 3" not in backend.asked[0]
    plain, asked = handle(lambda prompt, _: "fused")
    FuseBackend(Candidates(members), None, plain).write(["x"], Sampling(), None)
    assert "Answer 1:\na{b}" in asked.asked[0]


def test_a_conversation_is_fused_in_a_conversation():
    fuser, backend = handle(lambda prompt, _: "fused")
    member, _ = handle(lambda prompt, _: "Hello!")
    FuseBackend(Candidates([member]), None, fuser).write([[Message(role="user", content="Hi")]], Sampling(), None)
    (turn,) = backend.asked[0]
    assert turn.role == "user"
    assert "user: Hi" in turn.content


# --- cascades -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "asked"), [(0.0, []), (0.5, ["b"]), (0.7, ["a", "b"]), (1.0, ["a", "b", "c"])])
def test_a_larger_model_is_asked_where_the_small_is_unsure(threshold, asked):
    answers = {"a": sure("x", 0.9, 0.4), "b": sure("x", 0.2), "c": sure("x", 0.95)}  # 0.6, 0.2, 0.95
    small, _ = handle(lambda prompt, _: answers[prompt], Access.PROBS)
    large, backend = handle(lambda prompt, _: "large")
    made = CascadeBackend([small, large], [threshold]).write(["a", "b", "c"], Sampling(), None)
    assert backend.asked == asked
    assert [one.text for one in made] == ["large" if prompt in asked else "x" for prompt in "abc"]


def test_a_cascade_needs_probabilities_of_all_but_the_last():
    small, backend = handle(lambda prompt, _: "x")
    with pytest.raises(AccessError, match="log-probabilities of tokens"):
        CascadeBackend([small, small], [0.5]).write(["a"], Sampling(), None)
    assert not backend.asked


def test_the_curve_says_how_often_the_next_is_asked_and_asks_nobody_more_than_it_must():
    first = {"a": sure("x", 0.9, 0.4), "b": sure("x", 0.2), "c": sure("x", 0.95), "d": sure("x", 0.7)}
    second = {"a": sure("x", 0.9), "b": sure("x", 0.3), "c": sure("x", 0.1), "d": sure("x", 0.9)}
    one, asked = handle(lambda prompt, _: first[prompt], Access.PROBS)
    two, _ = handle(lambda prompt, _: second[prompt], Access.PROBS)
    last, unasked = handle(lambda prompt, _: "large")
    curve = TextCascade(tokens=9).curve([one, two, last], list("abcd"))
    assert (asked.how[0].max_new_tokens, asked.asked, unasked.asked) == (9, list("abcd"), [])
    points = dict(zip(curve.thresholds, zip(curve.quality, curve.shares, strict=True), strict=True))
    assert points[0.0] == (pytest.approx(np.mean([0.6, 0.2, 0.95, 0.7])), (0.0, 0.0))
    assert points[0.65] == (pytest.approx(np.mean([0.9, 0.95, 0.7])), (0.5, 0.25))  # of a, c and d; b goes on
    assert points[0.8] == (pytest.approx(np.mean([0.9, 0.9, 0.95])), (0.75, 0.25))
    assert points[1.01] == (None, (1.0, 1.0)), "of the last one's answers nothing is known"


def test_members_that_do_not_tell_how_sure_they_are_are_refused_unless_last():
    offered = [("small", Access.LABELS), ("middle", Access.PROBS), ("large", Access.LABELS)]
    [problem] = TextCascade().problems(offered)
    assert problem.startswith("small: offers labels, and all models but the last must tell how probable")


def test_confidence_is_that_of_the_text():
    (made,) = local().write(["ab"], Sampling(max_new_tokens=5, top_logprobs=1))
    assert confidence(made) == pytest.approx(math.exp(np.mean([token.logprob for token in made.tokens])))
    assert confidence(Completion("", "stop")) == 0


# --- methods --------------------------------------------------------------------------------------------------------


def test_methods_make_these_backends():
    members = [handle(lambda prompt, _: "a", Access.PROBS)[0], local()]
    how = Sampling(max_new_tokens=4)
    for method in (BestOf(), BestOf(ranker="likelihood", by=2), Fuse(), Fuse(ranker="no"), TextCascade(threshold=0)):
        (made,) = method.backend(members, [1, 1]).write(["ab"], how, None)
        assert made.text
    assert TextCascade(threshold=0).backend(members, []).write(["ab"], how, None)[0].text == "a"
    with pytest.raises(RequestError, match="by: 3 is no member, there are 2"):
        BestOf(by=3).backend(members, [1, 1])
    with pytest.raises(RequestError, match="fuser: 3 is no member"):
        Fuse(fuser=3).backend(members, [1, 1])
    with pytest.raises(AccessError, match="a model in memory that gives probabilities"):
        BestOf(ranker="likelihood").backend(members, [1, 1])


def test_bytes_are_averaged_by_the_method():
    made = ByteAverage().backend([local(), local()], [1, 1]).write(["abc"], Sampling(max_new_tokens=8), None)
    assert made[0].text == local().complete(["abc"], 8)[0]
    with pytest.raises(AccessError, match="endpoint"):
        ByteAverage().backend([handle(lambda prompt, _: "a")[0]], [1])
