import numpy as np
import pytest

from techniques.data.cluster_sensitivity_sampling import (
    SensitivitySampling,
    cluster,
    draw,
    sensitivities,
)
from tests.conformance.runs import tiny
from training.assemble import assemble


def points(count=200, dim=3):
    return np.random.default_rng(0).normal(size=(count, dim))


def test_centres_are_the_samples_nearest_to_the_means():
    x = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [12.4]])  # means 7/6 and 167/15
    centres, nearest = cluster(x, 2)
    assert sorted(centres) == [1, 4]
    assert centres[nearest].tolist() == [1, 1, 1, 4, 4, 4]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_sensitivity_is_by_hand(power):
    x, losses = points(), np.random.default_rng(1).uniform(size=8)
    centres, nearest = cluster(x, 8)
    found = sensitivities(x, centres, nearest, losses, 0.7, power)
    for i in range(len(x)):
        distances = [sum((a - b) ** 2 for a, b in zip(x[i], x[c])) ** 0.5 for c in centres]
        closest = int(np.argmin(distances))
        assert found[i] == pytest.approx(losses[closest] + 0.7 * distances[closest] ** power)


def test_bounds_the_loss_of_every_sample_when_it_is_as_smooth_as_assumed():
    """|ℓ(x) − ℓ(y)| ≤ 3·‖x − y‖ for ℓ = 3·‖x‖, and a centre's own score is its loss."""
    x = points()
    loss = 3 * np.linalg.norm(x, axis=1)
    centres, nearest = cluster(x, 10)
    found = sensitivities(x, centres, nearest, loss[centres], 3.0, 1.0)
    assert (found >= loss - 1e-12).all()
    np.testing.assert_allclose(found[centres], loss[centres], rtol=1e-12)


def test_weighted_sums_are_unbiased_with_the_variance_of_importance_sampling():
    """Var = (Σ ℓ²/p − (Σ ℓ)²)/count."""
    rng = np.random.default_rng(3)
    losses, scores = rng.uniform(size=50), rng.uniform(0.1, 1, size=50)
    sums = []
    for seed in range(4000):
        drawn, weights = draw(scores, 5, seed)
        sums.append(weights @ losses[drawn])
    p = scores / scores.sum()
    variance = ((losses**2 / p).sum() - losses.sum() ** 2) / 5
    assert np.mean(sums) == pytest.approx(losses.sum(), abs=4 * (variance / 4000) ** 0.5)
    assert np.var(sums) == pytest.approx(variance, rel=0.15)


def test_scores_that_are_the_losses_leave_no_error():
    losses = np.random.default_rng(4).uniform(0.1, 1, size=30)
    drawn, weights = draw(losses, 3, 0)
    assert weights @ losses[drawn] == pytest.approx(losses.sum(), rel=1e-12)


def test_equal_scores_are_uniform_sampling():
    weights = draw(np.ones(30), 6, 0)[1]
    np.testing.assert_allclose(weights, 30 / 6)


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0]])
def test_refuses_scores(bad):
    with pytest.raises(ValueError, match="scores"):
        draw(np.array(bad), 1, 0)


def test_overlay_draws_by_its_scores_and_gives_batches_weights_of_mean_1(tmp_path):
    run = assemble(tiny("cluster_sensitivity_sampling", tmp_path, "seed=3")[0])
    part = run.transforms["sensitivity"]
    selection = part.selection
    assert (part.clusters, part.holder, part.power, part.seed) == (50, 0.1, 2.0, 3)
    p = selection.scores.values / selection.scores.values.sum()
    np.testing.assert_allclose(selection.weights, 1 / (1437 * p[selection.kept]), rtol=1e-12)
    assert len(run.task.train) == round(0.2 * 1437)
    batch = run.batches.part(0, 0)
    expected = selection.weights[batch["index"].numpy()].astype(np.float32)
    np.testing.assert_array_equal(batch["weight"].numpy(), expected)
    assert run.config["weighting"]["_target_"].endswith("weighted_mean")


def test_one_cluster_without_a_constant_is_uniform(tmp_path):
    uniform = [f"data.transforms.sensitivity.{key}" for key in ("clusters=1", "holder=0")]
    run = assemble(tiny("cluster_sensitivity_sampling", tmp_path, *uniform)[0])
    np.testing.assert_allclose(run.transforms["sensitivity"].selection.weights, 1, rtol=1e-12)


@pytest.mark.parametrize("bad", [{"fraction": 0}, {"holder": -1}, {"power": 0}])
def test_refuses_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SensitivitySampling(**{"fraction": 0.5, "clusters": 2, "holder": 1.0} | bad)


def test_refuses_more_clusters_than_samples():
    with pytest.raises(ValueError, match="clusters"):
        cluster(points(3), 4)
