"""Behaviour cloning: the actions of an expert that swings up a pendulum."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tasks import losses
from tasks.arrays import as_dataset
from training.errors import UsageError

Policy = Callable[[Tensor], Tensor]
"""Features (states, 3) to actions (states,)."""

STEP = 0.05
"""Seconds."""
PULL = 15.0
"""3g/2l, of gravity 10 m/s² and a rod of 1 m."""
PUSH = 3.0
"""3/ml², of 1 kg: angular acceleration per torque."""
TORQUE, SPEED = 2.0, 8.0
"""The largest, in N·m and rad/s."""


class Pendulum:
    """From cosine and sine of a pendulum's angle and its speed, predict the expert's torque.

    The pendulum is Gymnasium's `Pendulum-v1`, standing at angle 0: its torque cannot lift it, so it
    has to be swung, and there it has to be balanced. The expert adds energy with all its torque
    until a linear-quadratic regulator can catch it; it does from every start. Both sets are
    trajectories of the expert, from uniform starts at any angle and up to 1 rad/s, with noise added
    to the torque that moves the pendulum but not to the one that is to be predicted. They are the
    same for every seed of a run.

    `rewards(policy)` is what a policy gets when it acts by itself from 20 other starts, without
    noise: of each the sum over `horizon` steps of −(angle² + 0.1·speed² + 0.001·torque²).

    Args:
        trajectories: of the training set; the validation set has 16.
        horizon: steps of a trajectory of 0.05 s; 200 as in Gymnasium.
        noise: standard deviation, in N·m of at most 2.

    Raises:
        UsageError: for a number below 1, or a negative noise.
    """

    unit = "samples"
    dims = {"in_features": 3, "out_features": 1}  # noqa: RUF012

    def __init__(self, *, trajectories: int = 64, horizon: int = 200, noise: float = 0.5) -> None:
        for name, value in {"trajectories": trajectories, "horizon": horizon}.items():
            if value < 1:
                raise UsageError(f"task.{name}: must be at least 1, got {value}")
        if noise < 0:
            raise UsageError(f"task.noise: must not be negative, got {noise}")
        self.horizon = horizon
        self.train: Dataset = _watched(trajectories, horizon, noise, seed=0)
        self.validation: Dataset = _watched(16, horizon, noise, seed=1)

    def count(self, batch: dict[str, Any]) -> int:
        """States in a batch."""
        return len(batch["labels"])

    def prepare(
        self, rows: dict[str, Any], generator: torch.Generator, training: bool
    ) -> dict[str, Any]:
        """`features` (batch, 3), of about unit size, and `labels` (batch,), torques over the
        largest."""
        return rows

    loss = staticmethod(losses.squared_error)

    def scores(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The absolute error."""
        return {"mae": (outputs["logits"].view(-1).float() - batch["labels"]).abs()}

    def rewards(self, policy: Policy, starts: int = 20) -> np.ndarray:
        """The reward of each rollout, (starts,)."""

        def act(state: np.ndarray) -> np.ndarray:
            features = torch.from_numpy(observed(state).astype(np.float32))
            return TORQUE * policy(features).double().cpu().numpy()

        return rollout(act, beginnings(starts, seed=2), self.horizon)[0]


def move(state: np.ndarray, torque: np.ndarray) -> np.ndarray:
    """The next angles and speeds, (2, pendulums), of these."""
    angle, speed = state
    push = PUSH * np.clip(torque, -TORQUE, TORQUE)
    speed = np.clip(speed + (PULL * np.sin(angle) + push) * STEP, -SPEED, SPEED)
    return np.stack([angle + speed * STEP, speed])


def reward(state: np.ndarray, torque: np.ndarray) -> np.ndarray:
    """What a step from here gives, (pendulums,)."""
    angle, speed = _wrapped(state[0]), state[1]
    return -(angle**2 + 0.1 * speed**2 + 0.001 * np.clip(torque, -TORQUE, TORQUE) ** 2)


def expert(state: np.ndarray) -> np.ndarray:
    """The torques (pendulums,) that swing up and balance.

    Below, all of the torque goes with the speed while the energy ½·speed² + 15·(cos(angle) − 1) is
    less than that of standing, and against it while more. Near the top it is the regulator's.
    """
    angle, speed = _wrapped(state[0]), state[1]
    hold = -(regulator() @ np.stack([angle, speed]))
    energy = 0.5 * speed**2 + PULL * (np.cos(angle) - 1)
    swing = -energy * np.where(speed >= 0, 1.0, -1.0)
    near = (np.abs(angle) < 0.5) & (np.abs(hold) < 2 * TORQUE)
    return np.clip(np.where(near, hold, swing), -TORQUE, TORQUE)


@functools.cache
def regulator() -> np.ndarray:
    """Gains (2,) of the linear-quadratic regulator of the pendulum linearised at the top, for costs
    angle² + 0.1·speed² + 0.1·torque²."""
    from scipy.linalg import solve_discrete_are

    a = np.array([[1 + PULL * STEP**2, STEP], [PULL * STEP, 1]])
    b = np.array([[PUSH * STEP**2], [PUSH * STEP]])
    cost, price = np.diag([1, 0.1]), np.array([[0.1]])
    value = solve_discrete_are(a, b, cost, price)
    return np.linalg.solve(price + b.T @ value @ b, b.T @ value @ a)[0]


def beginnings(count: int, seed: int) -> np.ndarray:
    """Angles and speeds to start from, (2, count)."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.uniform(-np.pi, np.pi, count), rng.uniform(-1, 1, count)])


def rollout(
    act: Callable[[np.ndarray], np.ndarray], state: np.ndarray, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of rewards (pendulums,) of acting for `horizon` steps, and the last state."""
    total = np.zeros(state.shape[1])
    for _ in range(horizon):
        torque = act(state)
        total += reward(state, torque)
        state = move(state, torque)
    return total, state


def observed(state: np.ndarray) -> np.ndarray:
    """Cosine, sine and speed over the largest, (pendulums, 3)."""
    return np.stack([np.cos(state[0]), np.sin(state[0]), state[1] / SPEED], axis=1)


def _watched(trajectories: int, horizon: int, noise: float, seed: int) -> Dataset:
    """The expert's features and actions, with noise in what moves the pendulum."""
    state, rng = beginnings(trajectories, seed), np.random.default_rng([seed, 0])
    features, labels = [], []
    for _ in range(horizon):
        torque = expert(state)
        features.append(observed(state))
        labels.append(torque / TORQUE)
        state = move(state, torque + noise * rng.normal(size=trajectories))
    return as_dataset({"features": np.concatenate(features), "labels": np.concatenate(labels)})


def _wrapped(angle: np.ndarray) -> np.ndarray:
    """Between −π and π."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
