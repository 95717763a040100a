import numpy as np
import pytest
import torch
from pytorch_optimizer import Lion
from scipy.optimize import brentq

from techniques.optimizer.lion_k import LionK
from tests.techniques.test_trajectories import KINDS
from training.assemble import build_optimizer
from training.compose import compose

CURVATURE, GOAL = np.array([1.0, 3.0, 0.5, 2.0]), np.array([3.0, -2.0, 0.1, 0.6])
DECAY = 2.0


def descend(start, steps, lr, **keys):
    """The path on ½ Σ c·(w − goal)², with a learning rate that falls to 0."""
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, path = LionK([weight], weight_decay=DECAY, **keys), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        weight.grad = torch.from_numpy(CURVATURE * (weight.detach().numpy() - GOAL))
        optimizer.step()
        path.append(weight.detach().numpy().copy())
    return np.array(path)


def test_the_norm_with_p_1_is_lion():
    torch.manual_seed(0)
    start = torch.randn(5, 4, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    keys = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    first, second = LionK([ours], **keys), Lion([theirs], **keys)
    for _ in range(20):
        ours.grad = torch.randn(5, 4, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def value(u, k, p=1.0, e=0.0):
    if k == "norm":
        return torch.linalg.vector_norm(u, p)
    if k == "threshold":
        return (u.abs() - e).clamp(min=0).sum()
    return torch.nn.functional.huber_loss(u, torch.zeros_like(u), reduction="sum", delta=e) / e


@pytest.mark.parametrize("keys", KINDS)
def test_a_step_is_the_gradient_of_k(keys):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    weight.grad = torch.randn(4, 3, dtype=torch.float64)
    LionK([weight], lr=0.1, betas=(0.0, 0.9), **keys).step()
    u = (-weight.grad).requires_grad_()
    (expected,) = torch.autograd.grad(value(u, **keys), u)
    torch.testing.assert_close(weight.detach(), 0.1 * expected)


def ball(radius):
    """The minimum within ‖w‖₂ ≤ radius: c·goal/(c + μ), with the multiplier μ that gets there."""
    at = lambda mu: CURVATURE * GOAL / (CURVATURE + mu)  # noqa: E731
    return at(brentq(lambda mu: np.linalg.norm(at(mu)) - radius, 0, 1e3))


def soft(x, threshold):
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


BOUND = 1 / DECAY


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"k": "norm", "p": 1.0}, np.clip(GOAL, -BOUND, BOUND)),
        ({"k": "norm", "p": 2.0}, ball(BOUND)),
        ({"k": "threshold", "e": 0.8}, np.clip(soft(GOAL, 0.8 / CURVATURE), -BOUND, BOUND)),
        (
            {"k": "huber", "e": 0.8},
            np.clip(CURVATURE * GOAL / (CURVATURE + 0.8 * DECAY), -BOUND, BOUND),
        ),
    ],
)
def test_rests_at_the_constrained_minimum(keys, expected):
    found = descend([0.0, 0.0, 0.0, 0.0], 4000, lr=0.01, **keys)[-1]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(("p", "q"), [(1.0, np.inf), (1.5, 3.0), (2.0, 2.0)])
def test_enters_exponentially_and_stays(p, q):
    """λ·w and ∇K are averaged, and the size of ∇K is at most 1."""
    path = descend([3.0, -4.0, 0.0, 1.0], 400, lr=0.1, p=p)
    rates = 0.1 * (1 - np.arange(400) / 400) * DECAY
    start = np.linalg.norm([3.0, -4.0, 0.0, 1.0], q) * DECAY
    sizes = np.linalg.norm(path, q, axis=1) * DECAY
    assert (sizes - 1 <= (start - 1) * np.cumprod(1 - rates) + 1e-12).all()
    inside = np.linalg.norm(descend([0.0, 0.0, 0.0, 0.0], 400, lr=0.1, p=p), q, axis=1)
    assert (inside * DECAY <= 1 + 1e-12).all()


def test_a_gradient_of_zero_is_no_step():
    for keys in KINDS:
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.zeros(3)
        LionK([weight], lr=0.1, **keys).step()
        assert weight.tolist() == [1, 1, 1]


def test_settings_reach_the_class():
    config = compose(["technique=lion_k", "optimizer.k=huber", "optimizer.e=0.5"])
    (group,) = build_optimizer(config["optimizer"], torch.nn.Linear(2, 2, bias=False)).param_groups
    assert (group["k"], group["e"], group["betas"]) == ("huber", 0.5, (0.9, 0.99))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"k": "cosh"}, "k: "),
        ({"p": 0.5}, "p: "),
        ({"k": "huber"}, "e: "),
    ],
)
def test_refusals(keys, name):
    with pytest.raises(ValueError, match=name):
        LionK([torch.zeros(1)], **keys)
