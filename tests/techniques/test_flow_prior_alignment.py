import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from techniques.callback.flow_prior_alignment import LatentLikelihood
from techniques.penalty.flow_prior_alignment import (
    Features,
    FlowPriorAlignment,
    RingOfGaussians,
    VelocityField,
    mismatch,
)
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

MU, S = 0.7, 0.5


class Gaussian:
    """N(μ, s²·I) of three features."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return MU + S * torch.randn(count, 3, generator=generator)


class ExactFlow(nn.Module):
    """E[ε − x | xₜ] of that target: the least-squares velocity."""

    dim = 3

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        slope = (t - (1 - t) * S**2) / ((1 - t) ** 2 * S**2 + t**2)
        return slope * (x - (1 - t) * MU) - MU


def closed_form() -> tuple[float, float]:
    """a and b of a·‖x − μ‖² / dim + b, by quadrature over t."""
    variance = lambda t: (1 - t) ** 2 * S**2 + t**2  # noqa: E731
    a = quad(lambda t: (t / variance(t)) ** 2, 0, 1)[0]
    b = quad(lambda t: ((1 - t) * S**2 / variance(t)) ** 2, 0, 1)[0]
    return a, b


def untrained(**settings) -> FlowPriorAlignment:
    return FlowPriorAlignment(**{"width": 8, "depth": 2, "steps": 1, **settings})


def randomised(dim: int = 2) -> VelocityField:
    """A flow without the zeros it begins with, in float64."""
    torch.manual_seed(0)
    flow = VelocityField(dim, 6, 2, frequencies=3).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    exact = torch.tensor([1e4 ** (-i / 3) for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(flow.frequencies, exact, rtol=1e-6, atol=0)
    flow.frequencies = exact  # in float32 they are rounded
    return flow


def test_of_the_exact_flow_of_a_gaussian_it_is_quadratic_like_the_likelihood():
    penalty = untrained(target=Gaussian, draws=40_000)
    penalty.flow = ExactFlow()
    a, b = closed_form()
    for x in ([MU, MU, MU], [2.0, -1.0, 0.0], [0.7, 0.2, 1.2]):
        torch.manual_seed(1)
        found = penalty(None, {"latent": torch.tensor([x], dtype=torch.float64)}, {})
        squares = sum((c - MU) ** 2 for c in x)
        assert found.item() == pytest.approx(a * squares / 3 + b, rel=0.03)


def test_training_finds_the_exact_flow():
    """Its loss on the target is near the least there is: a·s² + b."""
    penalty = FlowPriorAlignment(Gaussian, width=32, depth=1, steps=300, lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    x = Gaussian().sample(20_000, generator)
    t, noise = torch.rand(len(x), generator=generator), torch.randn(x.shape, generator=generator)
    a, b = closed_form()
    least = mismatch(ExactFlow(), x, t, noise).mean().item()
    assert least == pytest.approx(a * S**2 + b, rel=0.03)
    assert least < mismatch(penalty.flow, x, t, noise).mean().item() < 1.1 * least


def as_numpy(flow: VelocityField, x: np.ndarray, t: float) -> np.ndarray:
    """The authors' network for one row, from their description of each layer."""
    w = {name: p.detach().numpy() for name, p in flow.named_parameters()}

    def linear(name, h):
        return w[f"{name}.weight"] @ h + w[f"{name}.bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def normalised(h):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-6)

    count = len(flow.frequencies)
    angles = [t * math.exp(-math.log(10_000) * i / count) for i in range(count)]
    time = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    time = silu(linear("time.2", silu(linear("time.0", time))))
    h = linear("enter", x)
    for i in range(2):
        shift, scale, gate = np.split(linear(f"modulations.{i}", time), 3)
        inner = normalised(h) * w[f"norms.{i}.weight"] + w[f"norms.{i}.bias"]
        inner = inner * (1 + scale) + shift
        h = h + gate * linear(f"mlps.{i}.2", silu(linear(f"mlps.{i}.0", inner)))
    shift, scale = np.split(linear("last_modulation", time), 2)
    return linear("leave", normalised(h) * (1 + scale) + shift)


def test_is_the_authors_loss_one_draw_at_a_time():
    penalty = untrained(draws=3)
    penalty.flow = randomised()
    latents = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    found = penalty(None, {"latent": latents}, {})
    torch.manual_seed(2)
    t = torch.empty(12, dtype=torch.float64).uniform_().tolist()
    noise = torch.randn(12, 2, dtype=torch.float64).numpy()
    errors = []
    for i in range(12):
        x = latents[i % 4].numpy()
        v = as_numpy(penalty.flow, (1 - t[i]) * x + t[i] * noise[i], t[i])
        errors.extend((v - (noise[i] - x)) ** 2)
    assert found.item() == pytest.approx(np.mean(errors), abs=1e-10)


def test_gradients_reach_the_latents_through_the_flow_too():
    penalty = untrained(draws=2)
    penalty.flow = randomised()
    latents = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def value(x):
        torch.manual_seed(3)
        return penalty(None, {"latent": x}, {})

    assert torch.autograd.gradcheck(value, latents)


def test_landscape_is_that_of_the_negative_log_likelihood():
    penalty = FlowPriorAlignment(width=32, depth=1, steps=300, lr=3e-3)
    with torch.no_grad():
        probe = LatentLikelihood(points=21)
        assert 0.85 < probe._landscape(penalty, torch.device("cpu")) < 1


def test_flow_is_a_frozen_function_of_its_seed_and_disturbs_no_random_numbers():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first, again, other = (untrained(steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [[p.clone() for p in penalty.parameters()] for penalty in (first, again, other)]
    assert all(torch.equal(p, q) for p, q in zip(*weights[:2]))
    assert not all(torch.equal(p, q) for p, q in zip(*weights[::2]))
    assert not any(p.requires_grad for p in first.parameters())
    other.load_state_dict(first.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters()))


@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
def test_far_latents(value):
    penalty = untrained(steps=20)
    latents = torch.tensor([[value, 0.0], [value, -value]], requires_grad=True)
    found = penalty(None, {"latent": latents}, {})
    found.backward()
    assert found.isfinite()
    assert latents.grad.isfinite().all()


def test_autocast_computes_in_float32():
    penalty = untrained(steps=20)
    latents = torch.randn(8, 2)
    values = []
    for half in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            values.append(penalty(None, {"latent": latents}, {}))
    assert values[1].dtype == torch.float32
    assert torch.equal(*values)


def test_latents_of_tokens_are_latents_too():
    penalty = untrained()
    latents = torch.randn(2, 3, 2)
    values = []
    for shape in ((2, 3, 2), (6, 2)):
        torch.manual_seed(6)
        values.append(penalty(None, {"latent": latents.reshape(shape)}, {}))
    assert torch.equal(*values)


def test_ring_is_a_mixture_of_unit_standard_deviation():
    ring = RingOfGaussians()
    samples = ring.sample(50_000, torch.Generator().manual_seed(0))
    assert samples.std().item() == pytest.approx(1, rel=0.01)
    x = np.array([[0.0, 0.0], [1.4, 0.1], [-3.0, 2.0]])
    std = math.sqrt(3.0**2 / 2 + 0.3**2)
    density = 0.0
    for i in range(5):
        mean = [3 / std * math.cos(2 * math.pi * i / 5), 3 / std * math.sin(2 * math.pi * i / 5)]
        density += multivariate_normal(mean, (0.3 / std) ** 2).pdf(x) / 5
    found = ring.log_likelihood(torch.tensor(x))
    np.testing.assert_allclose(found.numpy(), np.log(density), rtol=1e-10)


def test_features_of_a_file_are_scaled_and_projected(tmp_path):
    path = tmp_path / "features.npy"
    np.save(path, 5 * np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    plain, small = Features(str(path)), Features(str(path), dim=8)
    assert plain.sample(7, generator).shape == (7, 64)
    assert plain.features.std().item() == pytest.approx(1, rel=1e-5)
    assert small.features.std().item() == pytest.approx(1, rel=0.1)
    assert untrained(target=lambda: small).flow.dim == 8
    with pytest.raises(ValueError, match="path"):
        Features(str(tmp_path / "none.npy"))
    np.save(path, np.arange(4))
    with pytest.raises(ValueError, match="path"):
        Features(str(path))


def test_composes_and_records_the_likelihood_of_latents():
    overrides = ["task=digits", "model=autoencoder", "model.latent=2", "tracker=none"]
    settings = ["draws=2", "width=16", "depth=1", "steps=5"]
    overrides += ["technique=flow_prior_alignment"]
    overrides += ["+penalties.flow_prior_alignment.target.components=3"]
    overrides += [f"penalties.flow_prior_alignment.{setting}" for setting in settings]
    overrides += ["trainer.device=cpu"]
    run = assemble(compose(overrides))
    (penalty,) = run.objective.penalty_modules
    assert (penalty.draws, penalty.flow.enter.out_features, len(penalty.flow.mlps)) == (2, 16, 1)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.model.parameters()}
    LatentLikelihood(lambda: RingOfGaussians(components=3), points=5).on_eval_end(run)
    assert run.recorded.keys() == {"probe/latent_nll", "probe/landscape"}
    assert run.model.training


def test_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="returns `latent`"):
        untrained()(None, {"logits": torch.zeros(2, 2)}, {})
    with pytest.raises(UsageError, match="2 features, the model's latents 3"):
        untrained()(None, {"latent": torch.zeros(2, 3)}, {})


@pytest.mark.parametrize("name", ["draws", "width", "depth", "steps", "batch_size", "lr"])
def test_refuses_settings_that_are_not_positive(name):
    with pytest.raises(ValueError, match=name):
        FlowPriorAlignment(**{name: 0})


@pytest.mark.parametrize(("name", "value"), [("components", 1), ("radius", 0), ("scale", -1)])
def test_refuses_such_rings(name, value):
    with pytest.raises(ValueError, match=name):
        RingOfGaussians(**{name: value})
