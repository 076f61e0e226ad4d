"""Estimated gradients against true ones, and gradients to the input against those of the module itself."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from pydantic import ValidationError
from tests.nets import resnet20
from torch.nn import functional

from lfm.errors import AccessError, LfmError, RequestError
from lfm.method import Access
from lfm.models.encode import Encoder
from lfm.models.handle import Model
from lfm.models.local import LocalBackend
from lfm.models.zeroth_order import Counted, ZerothOrder, estimate, through

KINDS = ("gaussian", "sphere", "coordinate")


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def point(*shape, seed=1):
    return torch.randn(*shape, generator=chance(seed), dtype=torch.float64)


def curved(points):
    """A smooth function with a third derivative, so that steps have an error."""
    flat = points.flatten(1)
    return (flat.sin() * torch.arange(1, flat.shape[1] + 1)).sum(1) + flat.prod(1)


def gradient(loss, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf[None]).sum(), leaf)[0]


def cosine(one, other):
    return float(functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic", [True, False])
def test_all_coordinates_are_exact_for_a_linear_function(antithetic):
    slope, x = point(3, 4), point(3, 4, seed=2)
    how = ZerothOrder(directions="coordinate", num_directions=50, mu=0.5, antithetic=antithetic)
    found = estimate(lambda points: (points * slope).sum((1, 2)) + 7, x, how, chance())
    assert torch.allclose(found, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_mean_is_the_gradient_as_steps_become_small(kind, antithetic):
    x = point(6)
    how = ZerothOrder(directions=kind, num_directions=4, mu=1e-5, antithetic=antithetic)
    draws, true = chance(3), gradient(curved, x)
    found = torch.stack([estimate(curved, x, how, draws) for _ in range(1200)])
    error = (found.mean(0) - true).abs()
    assert (error < 4.5 * found.std(0) / 1200**0.5 + 1e-4).all()


@pytest.mark.parametrize(("antithetic", "order"), [(True, 2), (False, 1)])
def test_the_error_of_a_step_falls_with_its_length_or_its_square(antithetic, order):
    x = point(5)
    errors = []
    for mu in (2e-2, 1e-2):
        how = ZerothOrder(directions="coordinate", num_directions=5, mu=mu, antithetic=antithetic)
        errors.append((estimate(curved, x, how, chance()) - gradient(curved, x)).norm())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_more_directions_point_better(kind):
    x = point(40)
    true = gradient(curved, x)
    means = []
    for count in (2, 8, 32):
        how = ZerothOrder(directions=kind, num_directions=count, mu=1e-5)
        means.append(sum(cosine(estimate(curved, x, how, chance(s)), true) for s in range(40)) / 40)
    assert means[0] < means[1] < means[2]
    if kind != "coordinate":
        assert means == pytest.approx([(q / (q + 40)) ** 0.5 for q in (2, 8, 32)], abs=0.08)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("antithetic", [True, False])
def test_queries_are_counted_and_come_in_batches(kind, antithetic):
    sizes = []

    def loss(points):
        sizes.append(len(points))
        return curved(points)

    x = point(7)
    found = []
    for batch_size in (1, 5, 64):
        how = ZerothOrder(directions=kind, num_directions=9, antithetic=antithetic, batch_size=batch_size, mu=0.01)
        counted = Counted(loss, limit=how.queries(7))
        sizes.clear()
        found.append(estimate(counted, x, how, chance()))
        used = 7 if kind == "coordinate" else 9
        assert counted.queries == sum(sizes) == how.queries(7) == (2 * used if antithetic else used + 1)
        assert max(sizes) <= batch_size
    assert torch.allclose(found[0], found[1], rtol=1e-9)
    assert torch.allclose(found[0], found[2], rtol=1e-9)
    with pytest.raises(LfmError, match="more than the 3 allowed"):
        estimate(Counted(loss, limit=3), x, how, chance())


def test_through_a_latent_it_is_the_gradient_to_the_latent():
    basis, z = point(3, 50), point(3, seed=4)
    loss = through(lambda latents: (latents @ basis).tanh(), curved)
    how = ZerothOrder(directions="coordinate", num_directions=3, mu=1e-4)
    true = gradient(lambda latents: curved((latents @ basis).tanh()), z)
    assert torch.allclose(estimate(loss, z, how, chance()), true, rtol=1e-4)
    assert how.queries(3) == 6


def test_equal_seeds_give_equal_estimates_and_others_do_not():
    x, how = point(9), ZerothOrder(num_directions=3)
    assert torch.equal(estimate(curved, x, how, chance(1)), estimate(curved, x, how, chance(1)))
    assert not torch.equal(estimate(curved, x, how, chance(1)), estimate(curved, x, how, chance(2)))


def test_a_loss_that_is_none_is_refused():
    how = ZerothOrder()
    with pytest.raises(ValueError, match="must be 64 values"):
        estimate(lambda points: points.sum(), point(4), how, chance())
    with pytest.raises(LfmError, match="not a finite number"):
        estimate(lambda points: points.sum(1) * float("nan"), point(4), how, chance())
    for wrong in ({"mu": 0}, {"num_directions": 0}, {"directions": "up"}, {"length": 1}):
        with pytest.raises(ValidationError):
            ZerothOrder(**wrong)


# --- gradients and features of models in memory ---------------------------------------------------------------------


@pytest.fixture
def vision():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = resnet20().eval()
    encoder = Encoder("image-classification", None, None, {str(i): i for i in range(10)})
    return Model(LocalBackend(module, None), Access.WEIGHTS, "image-classification", encoder, "net"), module


@pytest.fixture
def language():
    config = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = tf.LlamaForCausalLM(tf.LlamaConfig(**config, num_attention_heads=2, tie_word_embeddings=True)).eval()
    return Model(LocalBackend(module, None), Access.WEIGHTS, "causal-lm", Encoder("causal-lm"), "lm"), module


def images():
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=chance()), "labels": torch.tensor([1, 2, 3])}


def tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return {"input_ids": torch.randint(0, 40, (2, 4), generator=chance()) * mask, "attention_mask": mask}


def test_gradients_to_pixels_are_those_of_the_module(vision):
    model, module = vision
    batch = images()

    def loss(logits):
        return functional.cross_entropy(logits, batch["labels"])

    leaf = batch["pixel_values"].clone().requires_grad_()
    [true] = torch.autograd.grad(loss(module(leaf)), [leaf])
    assert torch.equal(model.restrict(Access.GRADIENTS).input_gradients(batch, loss), true)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not batch["pixel_values"].requires_grad


def test_an_estimate_finds_the_gradient_of_a_network(vision):
    model, _ = vision
    batch = {name: value[:1] for name, value in images().items()}
    black_box = model.restrict(Access.PROBS)

    def loss(points):
        return -black_box.log_probs({"pixel_values": points})[:, 1]

    true = model.input_gradients(batch, lambda logits: functional.cross_entropy(logits, batch["labels"]))[0]
    axes = true.flatten().abs().topk(24).indices
    directions = functional.one_hot(axes, true.numel()).float().view(-1, *true.shape)
    x = batch["pixel_values"][0]
    along = through(lambda z: x + torch.tensordot(z, directions, 1), loss)
    how = ZerothOrder(directions="coordinate", num_directions=24, mu=0.01, batch_size=48)
    assert cosine(estimate(along, torch.zeros(24), how, chance()), true.flatten()[axes]) > 0.98


def test_gradients_of_text_are_to_its_embeddings(language):
    model, module = language
    batch = tokens()
    made = model.input_gradients(batch, lambda logits: logits[:, -1].logsumexp(-1).sum())
    leaf = module.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = module(inputs_embeds=leaf, attention_mask=batch["attention_mask"]).logits
    [true] = torch.autograd.grad(logits[:, -1].logsumexp(-1).sum(), [leaf])
    assert torch.allclose(made, true, atol=1e-6)
    assert made.shape == (2, 4, 16)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_loss_is_one_number(vision):
    with pytest.raises(RequestError, match="one number"):
        vision[0].input_gradients(images(), lambda logits: logits.sum(-1))


@pytest.mark.parametrize("access", [Access.LABELS, Access.PROBS, Access.LOGITS])
def test_gradients_take_their_level(vision, access):
    with pytest.raises(AccessError, match=f"offers {access.name.lower()}, that takes gradients"):
        vision[0].restrict(access).input_gradients(images(), torch.sum)


@pytest.mark.parametrize("access", [Access.LABELS, Access.PROBS])
def test_features_take_logits(vision, access):
    with pytest.raises(AccessError, match="hidden features cannot be had"):
        vision[0].restrict(access).features(images())


def test_features_are_what_the_output_layer_reads(vision):
    model, module = vision
    features = model.restrict(Access.LOGITS).features(images())
    assert features.shape == (3, 64)
    assert torch.allclose(module.linear(features), model.logits(images()), atol=1e-5)
    assert not module.linear._forward_pre_hooks


def test_features_of_text_are_the_mean_of_the_last_hidden_state_without_padding(language):
    model, module = language
    batch = tokens()
    with torch.no_grad():
        hidden = module.model(**batch).last_hidden_state
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    assert torch.allclose(model.features(batch), expected, atol=1e-6)


def test_a_backend_that_is_no_module_has_no_inside(vision):
    class Remote:
        offers = Access.GRADIENTS

    model = Model(Remote(), Access.GRADIENTS, "image-classification", vision[0].encoder, "remote")
    with pytest.raises(AccessError, match="not one module in memory"):
        model.features(images())
    with pytest.raises(AccessError, match="not one module in memory"):
        model.input_gradients(images(), torch.sum)
