import copy

import numpy as np
import pytest
import torch

from techniques.gradient.config_grad import MomentumConFIG
from tests.techniques.gradients import microbatches
from tests.techniques.several_losses import Point, Scaled, descend, flat, gradients, objective
from training.assemble import assemble
from training.compose import compose


def config(rows):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(rows / lengths) @ np.ones(len(rows))
    direction /= np.linalg.norm(direction)
    return (rows @ direction).sum() * direction


def trajectory(steps, rate, first=0.9, second=0.999):
    """The steps' gradients as the paper's algorithm has them, on vectors."""
    place = flat(Point())[0].copy()
    means, moves = np.zeros((3, 6)), np.zeros(3)
    last, squares, t = np.zeros(6), np.zeros(6), 0
    for step in range(steps):
        part = step % 3
        moves[part] += 1
        means[part] = first * means[part] + (1 - first) * gradients(place)[part]
        g = np.zeros(6)
        if moves.all():
            t += 1
            g = config(means / (1 - first**moves)[:, None])
            mean = (1 - first**t) * g
            newest = (mean - first * last) / (1 - first)
            last, squares = mean, second * squares + (1 - second) * newest**2
            g = g / (np.sqrt(squares / (1 - second**t)) + 1e-8)
        yield g
        place -= rate * g


@pytest.mark.parametrize("backward", [torch.Tensor.backward, Scaled()])
def test_against_numpy(backward):
    model, estimator = Point(), MomentumConFIG()
    scale = getattr(backward, "scale", 1.0)
    for expected in trajectory(12, 0.05):
        estimator(objective(model), model, microbatches(), backward)
        np.testing.assert_allclose(flat(model)[1] / scale, expected, atol=1e-10)
        descend(model, 0.05 / scale)


def test_of_gradients_that_stay_it_is_the_sign():
    """Then every mean is its gradient and s the square of ConFIG's, as Adam's."""
    model, estimator = Point(), MomentumConFIG(betas=(0.5, 0.9))
    for _ in range(9):
        model.zero_grad()
        estimator(objective(model), model, microbatches(), torch.Tensor.backward)
    np.testing.assert_allclose(flat(model)[1], np.sign(config(gradients())), atol=1e-6)


def test_one_part_a_step():
    """The others are not computed; their last losses are reported."""
    model, estimator = Point(), MomentumConFIG()
    counted = []
    height = model.height
    model.height = lambda part: (counted.append(part), height(part))[1]
    reported = []
    for _ in range(4):
        losses = estimator(objective(model), model, microbatches(1), torch.Tensor.backward)
        reported.append(list(losses.parts))
    assert [part for part in counted if part] == [1, 2]
    assert reported == [["loss"], ["loss", "first"], *[["loss", "first", "second"]] * 2]
    total = height(0) + 0.5 * height(1) + 2 * height(2)
    assert losses.total.item() == pytest.approx(total.item())


def test_state_goes_on():
    model, estimator = Point(), MomentumConFIG()
    for _ in range(5):
        estimator(objective(model), model, microbatches(), torch.Tensor.backward)
        model.zero_grad()
    other = MomentumConFIG()
    other.load_state_dict(copy.deepcopy(estimator.state_dict()))
    estimator(objective(model), model, microbatches(), torch.Tensor.backward)
    expected = flat(model)[1]
    model.zero_grad()
    other(objective(model), model, microbatches(), torch.Tensor.backward)
    assert np.array_equal(flat(model)[1], expected)


def test_composes():
    run = assemble(
        compose(
            [
                *["task=burgers", "technique=m_config_grad", "gradient.betas=[0.8,0.99]"],
                *["tracker=none", "task.points=64", "task.grid=[4,3]"],
            ]
        )
    )
    assert tuple(run.gradient.betas) == (0.8, 0.99)
    assert run.optimizer.param_groups[0]["momentum"] == 0
    assert run.config["trainer"]["clip_norm"] is None


def test_refusals():
    with pytest.raises(ValueError, match="betas"):
        MomentumConFIG(betas=(0.9, 1.0))
    model = Point()
    with pytest.raises(ValueError, match="no penalty"):
        MomentumConFIG()(
            objective(model, several=False), model, microbatches(), torch.Tensor.backward
        )
