"""A hundred steps of every optimizer the repository defines, beside its algorithm in NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from techniques.gradient.finite_difference_gradient_regularization import (
    FiniteDifferenceGradientRegularization,
)
from techniques.gradient.sam import SAM
from techniques.optimizer.adamp import AdamP
from techniques.optimizer.lion_k import LionK
from techniques.optimizer.momo import Momo, MomoAdam
from techniques.optimizer.sgdp import SGDP
from tests.techniques.gradients import microbatches, objective

STEPS = 100
SHAPES = ((3, 4), (6,))
PARTS = (slice(0, 12), slice(12, 18))
"""Of the vector of all parameters: a matrix and a bias."""

RNG = np.random.default_rng(0)
MIXING = RNG.standard_normal((18, 18))
CURVATURE = MIXING @ MIXING.T / 18 + 0.1 * np.eye(18)
SLOPE = RNG.standard_normal(18)
START = 0.5 * RNG.standard_normal(18)

KINDS = [
    {"k": "norm"},
    {"k": "norm", "p": 1.5},
    {"k": "norm", "p": 2.0},
    {"k": "threshold", "e": 0.3},
    {"k": "huber", "e": 0.7},
]


def quadratic(x):
    """Value and gradient of ½ xᵀAx − bᵀx, above its minimum."""
    lowest = -0.5 * SLOPE @ np.linalg.solve(CURVATURE, SLOPE)
    return 0.5 * x @ CURVATURE @ x - SLOPE @ x - lowest, CURVATURE @ x - SLOPE


def rosenbrock(x):
    """Value and gradient of Σ 100·(xᵢ₊₁ − xᵢ²)² + (1 − xᵢ)²."""
    rise = x[1:] - x[:-1] ** 2
    gradient = np.zeros_like(x)
    gradient[:-1] = -400 * x[:-1] * rise - 2 * (1 - x[:-1])
    gradient[1:] += 200 * rise
    return (100 * rise**2 + (1 - x[:-1]) ** 2).sum(), gradient


def torch_quadratic(x):
    a, b = torch.from_numpy(CURVATURE), torch.from_numpy(SLOPE)
    return 0.5 * x @ a @ x - b @ x + 0.5 * b @ torch.linalg.solve(a, b)


def torch_rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


SURFACES = {"quadratic": (quadratic, torch_quadratic), "rosenbrock": (rosenbrock, torch_rosenbrock)}
RATE = {"quadratic": 1.0, "rosenbrock": 0.01}
"""Of the learning rates: Rosenbrock's curvature is in the hundreds."""


class Surface(nn.Module):
    """A function of a matrix and a bias as a model, scaled by each sample."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(
            torch.tensor(START[part].reshape(shape)) for part, shape in zip(PARTS, SHAPES)
        )

    def vector(self):
        return torch.cat([w.flatten() for w in self.weights])

    def forward(self, features):
        return {"logits": features * self.function(self.vector())}


def path(surface: str, optimizer_of: Callable, estimator: Callable | None = None) -> np.ndarray:
    """The points that one of our optimizers visits; the gradient by autograd or an estimator."""
    model = Surface(SURFACES[surface][1])
    # Two groups, as training has them.
    optimizer, found = optimizer_of([{"params": [w]} for w in model.weights]), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.function(model.vector())
        if estimator is None:
            loss.backward()
        else:
            estimator(objective(model), model, microbatches(1), torch.Tensor.backward)
        optimizer.step(**({"loss": loss.detach()} if "Momo" in type(optimizer).__name__ else {}))
        found.append(model.vector().detach().numpy().copy())
    return np.array(found)


def descend(surface: str, step: Callable) -> np.ndarray:
    """The points of `step(x, points, gradients, values)`, which gets all of those so far."""
    x, points, gradients, values, found = START, [], [], [], []
    for _ in range(STEPS):
        value, gradient = SURFACES[surface][0](x)
        points.append(x)
        gradients.append(gradient)
        values.append(value)
        x = step(x, np.array(points), np.array(gradients), np.array(values))
        found.append(x)
    return np.array(found)


def average(history, beta):
    """Of all values so far, with weights (1 − β)·βᵗ by their age t."""
    age = np.arange(len(history))[::-1]
    return ((1 - beta) * beta**age) @ history


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(theirs).max() < 10
    assert np.ptp(theirs, axis=0).max() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def tangential(w, g, step, delta, eps=1e-8):
    """A matrix's step without its radial part, where gradient and weight are orthogonal enough:
    all rows of it, or else the matrix as a vector. And whether they were."""
    for rows in (w.shape[0], 1):
        w2, g2, s2 = (x.reshape(rows, -1) for x in (w, g, step))
        lengths = np.sqrt((w2**2).sum(1))
        cosines = np.abs((w2 * g2).sum(1)) / (lengths * np.sqrt((g2**2).sum(1)))
        if all(c < delta / np.sqrt(w2.shape[1]) for c in cosines):
            unit = w2 / (lengths[:, None] + eps)
            return np.stack([s - (u @ s) * u for u, s in zip(unit, s2)]).ravel(), True
    return step, False


def projected(x, gradient, step, lr, decay, delta, ratio, seen):
    """One step of AdamP or SGDP from the step that Adam or SGD would take, before `lr`."""
    matrix, shape = PARTS[0], SHAPES[0]
    w, g = x[matrix].reshape(shape), gradient[matrix].reshape(shape)
    tangent, invariant = tangential(w, g, step[matrix], delta)
    seen.add(invariant)
    shrink = np.full_like(x, lr * decay)
    shrink[matrix] *= ratio if invariant else 1.0
    return (1 - shrink) * x - lr * np.concatenate([tangent, step[PARTS[1]]])


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("decay", "nesterov"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("delta", [0.1, 1.2])
def test_adamp(surface, decay, nesterov, delta):
    lr, beta1, beta2, eps, ratio, seen = 0.03, 0.8, 0.97, 1e-8, 0.2, set()

    def step(x, points, gradients, values):
        t, g = len(values), gradients[-1]
        first, second = average(gradients, beta1), average(gradients**2, beta2)
        first = beta1 * first + (1 - beta1) * g if nesterov else first
        adam = first / (1 - beta1**t) / (np.sqrt(second / (1 - beta2**t)) + eps)
        return projected(x, g, adam, lr, decay, delta, ratio, seen)

    keys = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    keys |= {"delta": delta, "wd_ratio": ratio, "nesterov": nesterov}
    same(path(surface, lambda groups: AdamP(groups, **keys)), descend(surface, step))
    assert seen == {True, False}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"), [(0.0, 0.0, False), (0.8, 0.1, False), (0.8, 0.1, True)]
)
def test_sgdp(surface, momentum, decay, nesterov):
    lr, dampening, delta, ratio, seen = 0.02 * RATE[surface], 0.1, 0.6, 0.2, set()

    def step(x, points, gradients, values):
        age = np.arange(len(values))[::-1]
        update = (1 - dampening) * momentum**age @ gradients
        update = gradients[-1] + momentum * update if nesterov else update
        strength = decay / (1 - momentum)
        return projected(x, gradients[-1], update, lr, strength, delta, ratio, seen)

    keys = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": decay}
    keys |= {"nesterov": nesterov, "delta": delta, "wd_ratio": ratio}
    same(path(surface, lambda groups: SGDP(groups, **keys)), descend(surface, step))
    assert seen == {True, False}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("lr", "lb", "decay"), [(0.05, 0.0, 0.1), (1.0, 0.0, 0.0), (1.0, 0.5, 0.1)]
)
def test_momo(surface, lr, lb, decay):
    limited, taus = lr == 1, []
    lr, beta = lr if surface == "quadratic" else 0.003 * lr, 0.7

    def step(x, points, gradients, values):
        k = len(values)
        weights = (1 - beta) * beta ** np.arange(k)[::-1]
        weights[0] = beta ** (k - 1)  # averages start at their first values
        d, f = weights @ gradients, weights @ values
        inner = weights @ (gradients * points).sum(1)
        grown = 1 + lr * decay
        tau = min(lr, max(grown * (f - lb - inner) + d @ x, 0) / (d @ d))
        taus.append(tau)
        return (x - tau * d) / grown

    keys = {"lr": lr, "beta": beta, "lb": lb, "weight_decay": decay}
    same(path(surface, lambda groups: Momo(groups, **keys)), descend(surface, step))
    assert limited == (min(taus) < lr)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("lr", "lb", "decay"), [(0.01, 0.0, 0.1), (0.3, 0.0, 0.0), (0.3, 0.5, 0.1)]
)
def test_momo_adam(surface, lr, lb, decay):
    limited, taus = lr == 0.3, []
    beta1, beta2, eps = 0.8, 0.97, 1e-8
    lr *= 1 if surface == "quadratic" else 0.2

    def step(x, points, gradients, values):
        t = len(values)
        d, f = average(gradients, beta1), average(values, beta1)
        inner = average((gradients * points).sum(1), beta1)
        size = np.sqrt(average(gradients**2, beta2) / (1 - beta2**t)) + eps
        rho, grown = 1 - beta1**t, 1 + lr * decay
        model = grown * (f - rho * lb - inner) + d @ x
        tau = min(lr / rho, max(model, 0) / (d @ (d / size)))
        taus.append(tau * rho / lr)
        return (x - tau * d / size) / grown

    keys = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "lb": lb, "weight_decay": decay}
    same(path(surface, lambda groups: MomoAdam(groups, **keys)), descend(surface, step))
    assert limited == (min(taus) < 0.999)


def slope(u, k, p=1.0, e=0.0):
    """∇K by its components; that of a norm from ‖u‖ₚᵖ."""
    if k == "threshold":
        return np.array([0.0 if abs(v) <= e else np.sign(v) for v in u])
    if k == "huber":
        return np.array([v / e if abs(v) <= e else np.sign(v) for v in u])
    return np.sign(u) * np.abs(u) ** (p - 1) / (np.abs(u) ** p).sum() ** ((p - 1) / p)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("keys", KINDS)
def test_lion_k(surface, keys):
    lr, beta1, beta2, decay = 0.01 if surface == "quadratic" else 0.003, 0.8, 0.95, 0.5

    def step(x, points, gradients, values):
        before = average(gradients[:-1], beta2) if len(values) > 1 else 0 * x
        u = -beta1 * before - (1 - beta1) * gradients[-1]
        slopes = np.concatenate([slope(u[part], **keys) for part in PARTS])
        return x + lr * (slopes - decay * x)

    settings = {"lr": lr, "betas": (beta1, beta2), "weight_decay": decay, **keys}
    same(path(surface, lambda groups: LionK(groups, **settings)), descend(surface, step))


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(surface, adaptive):
    lr, rho = 0.05 * RATE[surface], 0.05

    def step(x, points, gradients, values):
        scale = np.abs(x) if adaptive else np.ones_like(x)
        ascent = scale**2 * gradients[-1] / np.linalg.norm(scale * gradients[-1])
        return x - lr * SURFACES[surface][0](x + rho * ascent)[1]

    sgd = lambda groups: torch.optim.SGD(groups, lr=lr)  # noqa: E731
    same(path(surface, sgd, SAM(rho=rho, adaptive=adaptive)), descend(surface, step))


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("sign", "ascent"), [(1, True), (-1, False)])
def test_finite_difference_gradient_regularization(surface, sign, ascent):
    lr, gamma = 0.05 * RATE[surface], 0.03 * RATE[surface]
    epsilon = 0.02 * RATE[surface]

    def step(x, points, gradients, values):
        g = gradients[-1]
        moved = SURFACES[surface][0](x + sign * epsilon * g)[1]
        return x - lr * (g + sign * gamma / epsilon * (moved - g))

    estimator = FiniteDifferenceGradientRegularization(gamma, epsilon, ascent)
    sgd = lambda groups: torch.optim.SGD(groups, lr=lr)  # noqa: E731
    same(path(surface, sgd, estimator), descend(surface, step))
