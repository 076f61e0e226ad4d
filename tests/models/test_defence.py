"""Defences: what they tell, that they keep the most probable class, and that the same input is always told the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.distill import digits

from lfm.errors import AccessError, RequestError
from lfm.method import Access
from lfm.models.defence import Defence, defended, keys_of, told
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.models.local import load_model
from lfm.models.open import open_model
from lfm.models.ref import ModelRef
from lfm.models.text import Completion, Sampling, Token


def rows(seed: int, count: int, classes: int, sharp: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, classes, generator=generator) * sharp).softmax(-1)


def keys(count: int, secret: str = "") -> list[bytes]:
    return keys_of({"texts": [str(row) for row in range(count)]}, count, secret)


@given(
    seed=st.integers(0, 999),
    classes=st.integers(1, 30),
    sharp=st.floats(0.0, 20.0),
    decimals=st.none() | st.integers(0, 6),
    top_k=st.none() | st.integers(1, 40),
    perturb=st.just(0.0) | st.floats(0.01, 0.99),
)
def test_what_is_told_are_probabilities_with_the_same_first_class(seed, classes, sharp, decimals, top_k, perturb):
    probs = rows(seed, 6, classes, sharp)
    found = told(probs, Defence(round=decimals, top_k=top_k, perturb=perturb), keys(6))
    assert found.min() >= 0
    assert torch.allclose(found.sum(-1), torch.ones(6), atol=1e-5)
    best = probs.argmax(-1, keepdim=True)
    if sharp > 0.1:  # of classes that are equal, any may be the first
        assert (found.argmax(-1, keepdim=True) == best).all()
    assert (found.gather(-1, best)[:, 0] >= found.amax(-1) - 1e-6).all()
    if top_k is not None:
        assert ((found > 0).sum(-1) <= top_k).all()
    if decimals is not None:
        assert torch.allclose(found * 10**decimals, (found * 10**decimals).round(), atol=1e-6 * 10**decimals)
    if perturb and decimals is None and top_k is None:
        assert ((found - probs).abs().sum(-1) <= 2 * perturb + 1e-5).all()


def test_the_first_class_stays_ahead_in_few_digits():
    probs = rows(2, 6, 6, 1.0)
    found = told(probs, Defence(perturb=0.5), keys(6))
    assert torch.equal(found.argmax(-1), probs.argmax(-1))


def test_rounding_moves_nothing_by_more_than_a_unit_where_no_class_catches_up():
    probs = rows(0, 200, 10, 3.0)
    found = told(probs, Defence(round=2))
    moved = (found - probs).abs().amax(-1)
    assert (moved <= 0.02 + 1e-6).all()
    assert (moved <= 0.01 + 1e-6).float().mean() > 0.95
    exact = torch.tensor([[0.6, 0.3, 0.1]])
    assert torch.allclose(told(exact, Defence(round=1)), exact)
    assert told(torch.tensor([[0.34, 0.33, 0.33]]), Defence(round=0)).tolist() == [[1, 0, 0]]


def test_noise_is_a_function_of_the_input_and_the_secret():
    probs, noise = rows(0, 4, 10, 1.0), Defence(perturb=0.3)
    once = told(probs, noise, keys(4))
    assert torch.equal(once, told(probs, noise, keys(4)))
    assert torch.equal(once[2:], told(probs[2:], noise, keys(4)[2:]))
    assert not torch.allclose(once, told(probs, noise, keys(4, "secret")))
    average = torch.stack([told(probs, noise, keys(4)) for _ in range(10)]).mean(0)
    assert (average - probs).abs().sum(-1).min() > 0.05


def test_the_same_text_has_one_key_however_it_is_padded_and_in_whatever_batch():
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])}
    long = {
        "input_ids": torch.tensor([[7, 8, 9], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([3, 4]),
    }
    assert keys_of(short, 1, "")[0] == keys_of(long, 2, "")[1]
    assert keys_of({"members": [short, long]}, 1, "") == keys_of(short, 1, "")
    images = {"images": [np.zeros((2, 8), np.uint8), np.zeros((4, 4), np.uint8)]}
    assert len(set(keys_of(images, 2, ""))) == 2


def test_a_defended_model_offers_probabilities_and_no_more():
    plain = load_model(ModelRef.model_validate(digits.ref("teacher", digits.trained())))
    *_, pixels, _ = digits.images()
    batch = {"pixel_values": pixels[:50]}
    model = defended(plain, Defence(top_k=2))
    assert model.access is Access.PROBS
    with pytest.raises(AccessError):
        model.logits(batch)
    assert ((model.probs(batch) > 0).sum(-1) == 2).all()
    assert torch.equal(model.labels(batch), plain.labels(batch))
    assert torch.equal(model.probs(batch).argmax(-1), plain.labels(batch))
    labels = defended(plain.restrict(Access.LABELS), Defence(top_k=2))
    assert labels.access is Access.LABELS


def test_a_reference_can_say_how_its_model_is_defended():
    ref = ModelRef.model_validate({**digits.ref("teacher", digits.trained()), "defence": {"round": 1}})
    assert ref.offers is Access.PROBS
    *_, pixels, _ = digits.images()
    probs = open_model(ref).probs({"pixel_values": pixels[:50]})
    assert torch.allclose(probs * 10, (probs * 10).round(), atol=1e-5)
    with pytest.raises(AccessError, match="offers probs"):
        open_model(ref, access=Access.LOGITS)
    for wrong in ({"round": 10}, {"top_k": 0}, {"perturb": 1.0}, {"blur": 1}):
        with pytest.raises(ValidationError):
            Defence(**wrong)


class Writer:
    """Writes one token with its three most probable neighbours."""

    offers = Access.PROBS

    def write(self, prompts, how, tell):
        token = Token("a", -0.1234, {"a": -0.1234, "b": -2.3456, "c": -5.4321})
        return [Completion("a", "length", (token,), 1, 1) for _ in prompts]


def test_of_text_log_probabilities_are_rounded_and_fewer_are_told():
    plain = Model(Writer(), Access.PROBS, "causal-lm", Encoder("causal-lm"), "w")
    [made] = defended(plain, Defence(round=1, top_k=2)).write(["x"], Sampling(top_logprobs=3))
    assert made.tokens == (Token("a", -0.1, {"a": -0.1, "b": -2.3}),)
    assert plain.write(["x"])[0].text == made.text
    with pytest.raises(RequestError, match="perturb is for classifiers"):
        defended(plain, Defence(perturb=0.1))
