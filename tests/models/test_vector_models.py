"""MLP, autoencoder and the embeddings of `dual`."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from models.autoencoder import kl, reconstruction
from models.dual import Projection
from models.stochastic import ConditionalLayerNorm
from tests.models.conftest import CIFAR, DIGITS, TEXT

TABLE = {"in_features": 6, "out_features": 3}
LINEAR = {
    "activation": {"_target_": "torch.nn.Identity"},
    "norm": {"_target_": "torch.nn.Identity"},
}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mlp_parameter_count(depth, build):
    w = 5
    sizes = [6] + [w] * depth + [3]
    expected = sum((a + 1) * b for a, b in pairwise(sizes)) + depth * 2 * w
    model = build("mlp", TABLE, width=w, depth=depth)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_mlp_without_activation_is_affine(build, generator):
    model = build("mlp", TABLE, width=8, depth=3, **LINEAR).double()
    x, y = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    f = lambda z: model(features=z)["logits"]  # noqa: E731
    torch.testing.assert_close(f(0.3 * x + 0.7 * y), 0.3 * f(x) + 0.7 * f(y))


def test_mlp_flattens_windows_and_images(build, generator):
    model = build("mlp", {"in_features": 64, "out_features": 3}, width=8)
    x = torch.randn(4, 64, generator=generator)
    expected = model(features=x)["logits"]
    torch.testing.assert_close(model(pixel_values=x.view(4, 1, 8, 8))["logits"], expected)
    torch.testing.assert_close(model(past_values=x.view(4, 16, 4))["logits"], expected)


def test_mlp_needs_exactly_one_input(build):
    model = build("mlp", TABLE)
    with pytest.raises(ValueError, match="exactly one of features"):
        model()


def test_kl_is_that_of_torch_distributions(generator):
    mean, log_variance = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    posterior = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(kl(mean, log_variance), expected.sum(-1))


def test_reconstruction_is_the_negative_log_likelihood_up_to_its_constant(build, generator):
    x = torch.randn(5, 1, 8, 8, generator=generator)
    for variational in (False, True):
        model = build("autoencoder", DIGITS, variational=variational)
        outputs = model(pixel_values=x)
        nll = -Normal(outputs["logits"], 1.0).log_prob(x) - 0.5 * torch.tensor(2 * torch.pi).log()
        divergence = outputs["kl"] if variational else 0.0
        for beta in (1.0, 4.0):
            loss = reconstruction(outputs, {"pixel_values": x}, beta=beta)
            torch.testing.assert_close(loss, nll.sum((1, 2, 3)) + beta * divergence)


def test_latent_is_drawn_in_training_and_the_mean_in_evaluation(build, generator):
    model = build("autoencoder", TABLE, variational=True, latent=3)
    x = torch.randn(1, 6, generator=generator)
    outputs = model(features=x.expand(20_000, -1))
    deviation = (outputs["log_variance"][0] / 2).exp()
    standard = (outputs["latent"] - outputs["mean"]) / deviation
    torch.testing.assert_close(standard.mean(0), torch.zeros(3), atol=0.03, rtol=0)
    torch.testing.assert_close(standard.T.cov(), torch.eye(3), atol=0.05, rtol=0)
    outputs = model.eval()(features=x)
    assert torch.equal(outputs["latent"], outputs["mean"])


def test_linear_autoencoder_finds_the_principal_components(build, generator):
    """Its smallest error is half the variance beyond the first components (Baldi, Hornik 1989)."""
    x = torch.randn(200, 6, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.1])
    x = x - x.mean(0)
    model = build("autoencoder", TABLE, width=6, depth=1, latent=2, **LINEAR)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = reconstruction(model(features=x), {"features": x}).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    spectrum = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert closure().item() == pytest.approx(0.5 * spectrum[:-2].sum().item(), rel=1e-3)


def test_embeddings_have_length_one(build, generator):
    model = build("dual", CIFAR | TEXT, width=16, depth=1, heads=2, embedding=5)
    ids = torch.randint(23, (3, 12), generator=generator)
    outputs = model(pixel_values=torch.randn(3, 3, 32, 32, generator=generator), input_ids=ids)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(outputs[name].norm(dim=-1), torch.ones(3))


def test_padding_does_not_change_a_captions_embedding(build, generator):
    model = build("dual", CIFAR | TEXT, width=16, depth=2, heads=2)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    ids = torch.randint(23, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    short = model(images, ids[:, :7])["text_embeds"]
    torch.testing.assert_close(model(images, ids, mask)["text_embeds"], short)


def test_a_batch_without_its_captions_is_refused(build):
    model = build("dual", CIFAR | TEXT, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.zeros(1, 3, 32, 32))


def test_projection_is_two_matrices_and_a_relu(generator):
    head = Projection(6, 3).double()
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    (w1, b1), (w2, b2) = head.hidden.parameters(), head.out.parameters()
    torch.testing.assert_close(head(x), (x @ w1.T + b1).clamp(min=0) @ w2.T + b2)
    assert isinstance(Projection(6, 3, activation=nn.Tanh).activation, nn.Tanh)
    torch.testing.assert_close(F.relu(x), head.activation(x))


ENSEMBLE = {**TABLE, "noise_features": 4}


def test_members_are_alike_until_the_noise_has_weight(build, generator):
    """At first it is an MLP with layer norms."""
    x, noise = torch.randn(4, 6, generator=generator), torch.randn(4, 5, 4, generator=generator)
    model = build("stochastic", ENSEMBLE, width=8, depth=2)
    plain = build("mlp", TABLE, width=8, depth=2)
    for own, layer in zip(model.layers, (plain.layers[0], plain.layers[3])):
        layer.load_state_dict(own.linear.state_dict())
    plain.head.load_state_dict(model.head.state_dict())
    expected = plain(features=x)["logits"]
    members = model(features=x, noise=noise)["logits"]
    torch.testing.assert_close(members, expected[:, None].expand(4, 5, 3))


def test_members_are_exchangeable_and_of_their_own_noise(build, generator):
    x, noise = torch.randn(4, 6, generator=generator), torch.randn(4, 5, 4, generator=generator)
    model = build("stochastic", ENSEMBLE, width=8, zero_init=False)
    members = model(features=x, noise=noise)["logits"]
    assert (members[:, 0] - members[:, 1]).abs().min() > 0
    order = [3, 0, 4, 2, 1]
    shuffled = model(features=x, noise=noise[:, order])["logits"]
    torch.testing.assert_close(shuffled, members[:, order])
    alone = model(features=x, noise=noise[:, 2:3])["logits"]
    torch.testing.assert_close(alone, members[:, 2:3])


def test_conditional_layer_norm_is_its_formula(generator):
    norm = ConditionalLayerNorm(6, 3, zero_init=False).double()
    x, u = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (6, 3))
    scale = u @ norm.scale.weight.T + norm.scale.bias
    shift = u @ norm.shift.weight.T + norm.shift.bias
    variance = x.var(-1, correction=0, keepdim=True)
    expected = (1 + scale) * (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() + shift
    torch.testing.assert_close(norm(x, u), expected)


def test_a_stochastic_model_needs_noise(build):
    with pytest.raises(ValueError, match=r"task\.members"):
        build("stochastic", TABLE)
    with pytest.raises(ValueError, match=r"model\.depth"):
        build("stochastic", ENSEMBLE, depth=0)
