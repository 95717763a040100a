import copy

import numpy as np
import pytest
import torch
from torch import nn

from techniques.gradient.loss_gradient_balancer import LossGradientBalancer
from techniques.penalty.reconstruction import Absolute, Spectral
from tests.techniques.several_losses import Scaled
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.objective import Objective

X = np.random.default_rng(0).standard_normal((3, 6, 4))
TARGET = np.random.default_rng(1).standard_normal((3, 6, 2))
WEIGHT = np.random.default_rng(2).standard_normal((4, 2))


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHT))

    def forward(self, features):
        return {"logits": features @ self.weight}


def objective(model, scale=1.0):
    """½‖y − t‖², scale·‖y − t‖⁴ with coefficient 3, and ½‖W‖² with coefficient 0.7."""
    squares = lambda outputs, batch: (outputs["logits"] - batch["target"]).square().sum(-1)  # noqa: E731
    return Objective(
        model,
        lambda outputs, batch: 0.5 * squares(outputs, batch),
        lambda losses, outputs, batch: losses.mean(),
        {
            "fourth": (lambda m, o, b: scale * squares(o, b).square().mean(), 3.0),
            "weights": (lambda m, o, b: 0.5 * m.weight.square().sum(), 0.7),
        },
        frozenset({"features"}),
    )


def batches(step, count):
    """Micro-batches of 4 and 2 samples, or all in one."""
    cuts = [slice(0, 4), slice(4, 6)] if count == 2 else [slice(0, 6)]
    return [
        {
            "features": torch.tensor(X[step][cut]),
            "target": torch.tensor(TARGET[step][cut]),
            "share": torch.tensor((cut.stop - cut.start) / 6, dtype=torch.float64),
        }
        for cut in cuts
    ]


def expected(per_batch_item, decay=0.9, total_norm=2.0):
    """The steps' gradients, from those of the two losses at y by hand."""
    sums, count = np.zeros(2), 0.0
    for x, target in zip(X, TARGET):
        error = x @ WEIGHT - target
        g = np.stack([error / 6, 4 * (error**2).sum(1, keepdims=True) * error / 6])
        norms = np.linalg.norm(g, axis=2).mean(1) if per_batch_item else np.sqrt((g**2).sum((1, 2)))
        sums, count = decay * sums + norms, decay * count + 1
        factors = total_norm * np.array([0.25, 0.75]) / (1e-12 + sums / count)
        yield x.T @ np.tensordot(factors, g, 1) + 0.7 * WEIGHT, sums / count / (sums / count).sum()


@pytest.mark.parametrize("per_batch_item", [True, False])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backward", [torch.Tensor.backward, Scaled()])
def test_against_numpy(per_batch_item, count, backward):
    model = Linear()
    balancer = LossGradientBalancer(2.0, 0.9, per_batch_item, monitor=True)
    for step, (gradient, ratios) in enumerate(expected(per_batch_item)):
        model.weight.grad = None
        losses = balancer(objective(model), model, batches(step, count), backward)
        scale = getattr(backward, "scale", 1.0)
        np.testing.assert_allclose(model.weight.grad / scale, gradient, atol=1e-10)
        found = [losses.parts[name].item() for name in ("ratio_loss", "ratio_fourth")]
        assert found == pytest.approx(ratios.tolist(), rel=1e-12)


def test_scale_does_not_matter():
    found = []
    for scale in (1e-3, 1.0, 1e3):
        model, balancer = Linear(), LossGradientBalancer()
        for step in range(3):
            model.weight.grad = None
            balancer(objective(model, scale), model, batches(step, 1), torch.Tensor.backward)
        found.append(model.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[2], found[1], rtol=1e-8, atol=1e-10)


def test_authors_own_example():
    """Two opposite absolute errors, one a hundred times the other, cancel."""
    model = Linear()
    away = lambda sign, scale: lambda m, o, b: scale * (o["logits"] - sign * 99.0).abs().mean()  # noqa: E731
    both = Objective(
        model,
        lambda outputs, batch: (outputs["logits"] - 99.0).abs(),
        lambda losses, outputs, batch: losses.mean(),
        {"other": (away(-1.0, 100.0), 1.0)},
        frozenset({"features"}),
    )
    LossGradientBalancer()(both, model, batches(0, 1), torch.Tensor.backward)
    np.testing.assert_allclose(model.weight.grad, 0, atol=1e-9)


def test_state_goes_on():
    model, balancer, other = Linear(), LossGradientBalancer(), LossGradientBalancer()
    balancer(objective(model), model, batches(0, 1), torch.Tensor.backward)
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    found = []
    for each in (balancer, other):
        model.weight.grad = None
        each(objective(model), model, batches(1, 1), torch.Tensor.backward)
        found.append(model.weight.grad)
    assert found[0].equal(found[1])


def test_reconstruction_penalties():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2, 5, 1, 4, 6))
    outputs, batch = {"logits": torch.tensor(y)}, {"pixel_values": torch.tensor(x)}
    wanted = 10 * np.abs(y - x).sum((1, 2, 3)).mean()
    assert Absolute(10.0)(nn.Identity(), outputs, batch).item() == pytest.approx(wanted, rel=1e-12)
    wanted = np.abs(np.fft.fft2(y - x, norm="ortho")).sum((1, 2, 3)).mean()
    assert Spectral()(nn.Identity(), outputs, batch).item() == pytest.approx(wanted, rel=1e-12)
    outputs, batch = {"logits": torch.tensor(y[:, 0, 0])}, {"features": torch.tensor(x[:, 0, 0])}
    wanted = np.abs(np.fft.fft((y - x)[:, 0, 0], norm="ortho")).sum(1).mean()
    assert Spectral()(nn.Identity(), outputs, batch).item() == pytest.approx(wanted, rel=1e-12)


def test_composes():
    settings = ["gradient.total_norm=3", "gradient.ema_decay=0.5", "gradient.monitor=true"]
    choice = ["task=digits", "model=autoencoder", "technique=loss_gradient_balancer"]
    balancer = assemble(compose([*choice, *settings, "tracker=none"])).gradient
    assert (balancer.total_norm, balancer.ema_decay, balancer.monitor) == (3, 0.5, True)
    assert (balancer.epsilon, balancer.per_batch_item) == (1e-12, True)


@pytest.mark.parametrize("settings", [{"total_norm": 0.0}, {"ema_decay": 1.1}, {"epsilon": 0.0}])
def test_refusals(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LossGradientBalancer(**settings)


def test_refuses_a_model_without_logits():
    class Latent(Linear):
        def forward(self, features):
            return {"latent": features @ self.weight}

    model = Latent()
    whole = objective(model)
    whole.loss = lambda outputs, batch: outputs["latent"]
    whole.penalties = {}
    with pytest.raises(UsageError, match="logits"):
        LossGradientBalancer()(whole, model, batches(0, 1), torch.Tensor.backward)
