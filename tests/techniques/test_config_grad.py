import numpy as np
import pytest
import torch

from techniques.gradient.config_grad import ConFIG, conflict_free, weights
from tests.techniques.gradients import microbatches
from tests.techniques.several_losses import Point, Scaled, flat, gradients, objective
from training.assemble import assemble
from training.compose import compose


def expected(rows):
    """By the pseudoinverse of the unit gradients themselves."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(rows / lengths) @ np.ones(len(rows))
    direction /= np.linalg.norm(direction)
    return (rows @ direction).sum() * direction


def found(rows):
    combined = conflict_free([[torch.tensor(row[:2]), torch.tensor(row[2:])] for row in rows])
    return torch.cat(combined).numpy()


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_against_numpy(parts):
    rows = (
        np.random.default_rng(parts).standard_normal((parts, 40))
        * np.logspace(-3, 2, parts)[:, None]
    )
    g = found(rows)
    np.testing.assert_allclose(g, expected(rows), rtol=1e-10, atol=1e-12)
    cosines = rows @ g / np.linalg.norm(rows, axis=1) / np.linalg.norm(g)
    assert np.ptp(cosines) < 1e-10
    assert cosines.min() > 0


def test_of_two_it_is_the_bisector():
    """The authors' simpler form for two losses, by trigonometry: its length is Σ ‖gᵢ‖·cos φ/2."""
    angle = 2.9
    rows = np.array([[3.0, 0, 0, 0], [0.2 * np.cos(angle), 0.2 * np.sin(angle), 0, 0]])
    half = angle / 2
    length = 3.2 * np.cos(half)
    wanted = length * np.array([np.cos(half), np.sin(half), 0, 0])
    np.testing.assert_allclose(found(rows), wanted, atol=1e-12)


def test_degenerate_gradients():
    g = np.array([1.0, -2.0, 0.5, 3.0])
    np.testing.assert_array_equal(found(np.array([g, -g])), 0)  # no way down
    np.testing.assert_allclose(found(np.array([g, 2 * g])), 3 * g, rtol=1e-7)  # no conflict
    np.testing.assert_allclose(found(np.array([g, 0 * g])), g, rtol=1e-12)  # nothing to do
    assert (
        not weights(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]).double(), 1e-7)
        .isfinite()
        .any()
    )


@pytest.mark.parametrize("count", [1, 2])
def test_of_a_run(count):
    model = Point()
    losses = ConFIG()(objective(model), model, microbatches(count), torch.Tensor.backward)
    np.testing.assert_allclose(flat(model)[1], expected(gradients()), atol=1e-10)
    assert losses.total.item() == pytest.approx(
        sum(c * model.height(part).item() for part, c in enumerate((1.0, 0.5, 2.0)))
    )


def test_loss_scale():
    model = Point()
    ConFIG()(objective(model), model, microbatches(), Scaled())
    np.testing.assert_allclose(flat(model)[1], 1024 * expected(gradients()), atol=1e-7)


def test_composes():
    run = assemble(
        compose(
            [
                "task=burgers",
                "technique=config_grad",
                "tracker=none",
                "task.points=64",
                "task.grid=[4,3]",
            ]
        )
    )
    assert isinstance(run.gradient, ConFIG)
    assert list(run.objective.penalties) == ["boundary", "initial"]
