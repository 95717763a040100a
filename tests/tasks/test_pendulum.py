import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import pendulum
from tasks.fetch import fetch
from tasks.pendulum import Pendulum
from training.errors import UsageError


def test_a_step_by_hand():
    """Gymnasium's: speed 0.5 + (15·sin 1 + 3·1)·0.05, angle 1 + that·0.05; −(1² + 0.1·0.5² +
    0.001·1²)."""
    state = np.array([[1.0], [0.5]])
    found = pendulum.move(state, np.array([1.0]))
    speed = 0.5 + (15 * 0.8414709848078965 + 3) * 0.05
    np.testing.assert_allclose(found, [[1 + speed * 0.05], [speed]], rtol=1e-14)
    assert pendulum.reward(state, np.array([1.0])) == pytest.approx(-1.026, rel=1e-14)


def test_torque_and_speed_are_limited_and_angles_wrap():
    state = np.array([[np.pi / 2], [7.9]])
    assert pendulum.move(state, np.array([100.0]))[1] == 8
    still = np.zeros((2, 1))
    np.testing.assert_array_equal(
        pendulum.move(still, np.array([9.0])), pendulum.move(still, np.array([2.0]))
    )
    turned = np.array([[2 * np.pi + 0.1], [0.0]])
    assert pendulum.reward(turned, np.zeros(1)) == pytest.approx(-0.01)


def test_it_is_the_pendulums_equation():
    """A rod of 1 m and 1 kg about its end: angle″ = 15·sin(angle), for a small step."""
    start = np.array([[3.0], [0.2]])
    truth = solve_ivp(lambda _, y: [y[1], 15 * np.sin(y[0])], (0, 0.05), start[:, 0], rtol=1e-10)
    found = pendulum.move(start, np.zeros(1))[:, 0]
    np.testing.assert_allclose(found, truth.y[:, -1], atol=0.01)


def test_the_expert_stands_up_from_everywhere():
    reward, state = pendulum.rollout(pendulum.expert, pendulum.beginnings(300, seed=7), 200)
    assert np.abs((state[0] + np.pi) % (2 * np.pi) - np.pi).max() < 1e-3
    assert reward.mean() > -200


def test_a_regulated_pendulum_is_stable():
    """The gains solve the Riccati equation: closed loop inside the unit circle, and cheaper than
    gains a little off."""
    a, b = np.array([[1.0375, 0.05], [0.75, 1.0]]), np.array([0.0075, 0.15])
    gains = pendulum.regulator()
    assert np.abs(np.linalg.eigvals(a - np.outer(b, gains))).max() < 1

    def cost(k):
        x, total = np.array([0.1, 0.0]), 0.0
        for _ in range(500):
            u = -k @ x
            total += x[0] ** 2 + 0.1 * x[1] ** 2 + 0.1 * u**2
            x = a @ x + b * u
        return total

    for change in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
        assert cost(gains) < cost(gains + change)


def test_labels_are_the_experts_torques_in_noise():
    task = Pendulum(trajectories=3, horizon=10)
    batch = fetch(task.train, torch.arange(len(task.train)))
    assert len(task.train) == 30
    cosine, sine, speed = batch["features"].double().numpy().T
    state = np.stack([np.arctan2(sine, cosine), 8 * speed])
    np.testing.assert_allclose(batch["labels"], pendulum.expert(state) / 2, atol=1e-3)
    quiet = Pendulum(trajectories=3, horizon=10, noise=0.0)
    other = fetch(quiet.train, torch.arange(30))["features"]
    assert other[:3].equal(batch["features"][:3])
    assert not other.equal(batch["features"])


def test_rewards_are_the_experts_for_the_expert():
    """The number in the recipe of `gradient_variance_amplification_ema`."""

    def policy(features):
        cosine, sine, speed = features.double().numpy().T
        state = np.stack([np.arctan2(sine, cosine), 8 * speed])
        return torch.from_numpy(pendulum.expert(state) / 2)

    task = Pendulum(trajectories=1)
    found = task.rewards(policy)
    assert found.shape == (20,)
    assert found.mean() == pytest.approx(-132.42, abs=0.1)
    assert task.rewards(lambda features: torch.zeros(len(features))).mean() < -1000


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trajectories": 0}, "task.trajectories: must be at least 1"),
        ({"horizon": 0}, "task.horizon: must be at least 1"),
        ({"noise": -1.0}, "task.noise: must not be negative"),
    ],
)
def test_refusals(keys, message):
    with pytest.raises(UsageError, match=message):
        Pendulum(**keys)
