"""Chains of kernel ridge regression against scikit-learn, the spectrum and published losses."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.kernel_ridge import KernelRidge

from study.analyses import self_distillation
from study.analyses.self_distillation import chain, limit, optimal_weight
from tests.cli.invoke import invoke
from training.folder import read_config

X = np.arange(11) / 10
Y = np.array(
    [
        *(0.38476636465198066, 1.2333967683416893, 1.33232242218057, 0.6920159488889518),
        *(-0.29756145531871736, -0.24189291901377769, -0.7964485769175675, -0.9616480167034174),
        *(-0.49672509509916934, -0.3469066003991437, 0.5589512650600734),
    ]
)
FINE = np.arange(101) / 100


def rbf(x, other):
    return np.exp(-80 * (x[:, None] - other[None]) ** 2)


@pytest.mark.parametrize(
    ("alpha", "published", "infinite"),
    [
        (0.0, [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
        (0.35, [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
    ],
)
def test_published_losses(alpha, published, infinite):
    """The table of the README of the authors' code, of the points in its notebook.

    Its second column is headed 0.25, but is of the 0.35 in its text.
    """
    fits = chain(rbf(X, X), Y, 0.2, [alpha] * 5)
    fits = np.concatenate([fits, limit(rbf(X, X), Y, 0.2, alpha)[None]])
    losses = ((fits @ rbf(FINE, X).T - np.sin(2 * np.pi * FINE)) ** 2).mean(1)
    np.testing.assert_allclose(losses, [*published, infinite], atol=6e-6)


def test_each_step_is_a_ridge_regression_on_its_targets():
    weights = [0.3, 0.0, 0.8]
    fits = chain(rbf(X, X), Y, 0.2, weights)
    ridge = KernelRidge(alpha=0.2, kernel="rbf", gamma=80)
    predictions = [ridge.fit(X[:, None], Y).predict(X[:, None])]
    for weight in weights:
        targets = weight * Y + (1 - weight) * predictions[-1]
        predictions.append(ridge.fit(X[:, None], targets).predict(X[:, None]))
    np.testing.assert_allclose(fits @ rbf(X, X), predictions, atol=1e-10)


def test_the_chain_filters_the_spectrum_of_the_first_fit():
    """B_t = A·(α·I + (1 − α)·B_{t−1}) with A = D(D + λ)⁻¹, in the kernel's eigenvectors; without
    labels it is Aᵗ, whose small entries fall faster."""
    values, vectors = np.linalg.eigh(rbf(X, X))
    a = values / (values + 0.2)
    for alpha in (0.0, 0.35):
        b = a
        fits = chain(rbf(X, X), Y, 0.2, [alpha] * 4) @ rbf(X, X)
        for fit in fits:
            np.testing.assert_allclose(fit, vectors @ (b * (vectors.T @ Y)), atol=1e-10)
            b = a * (alpha + (1 - alpha) * b)
    powers = chain(rbf(X, X), Y, 0.2, [0.0] * 4)[-1] @ rbf(X, X)
    np.testing.assert_allclose(powers, vectors @ (a**5 * (vectors.T @ Y)), atol=1e-10)


def test_infinite_steps_are_the_first_problem_with_more_regularisation():
    far = chain(rbf(X, X), Y, 0.2, [0.3] * 400)[-1]
    np.testing.assert_allclose(limit(rbf(X, X), Y, 0.2, 0.3), far, atol=1e-10)
    np.testing.assert_allclose(chain(rbf(X, X), Y, 0.2 / 0.3, [])[0], far, atol=1e-10)


def test_optimal_weight_is_where_a_search_finds_it():
    rng = np.random.default_rng(0)
    between = np.linspace(0.05, 0.95, 10)
    held_out = np.sin(2 * np.pi * between) + rng.normal(0, 0.5, 10)
    inside = 0
    for before in ([], [0.4], [0.0, 0.0, 0.0], [0.9, 0.1]):

        def error(weight, before=before):
            fit = chain(rbf(X, X), Y, 0.2, [*before, weight])[-1]
            return ((rbf(between, X) @ fit - held_out) ** 2).sum()

        fits = chain(rbf(X, X), Y, 0.2, [*before, 0.0])
        found = optimal_weight(held_out, rbf(between, X) @ fits[0], rbf(between, X) @ fits[-1])
        searched = minimize_scalar(error, bounds=(0, 1), method="bounded", options={"xatol": 1e-9})
        assert found == pytest.approx(searched.x, abs=1e-5)
        inside += 0.01 < found < 0.99
    assert inside
    assert optimal_weight(Y, Y, Y) == 1.0
    assert optimal_weight(Y, 0 * Y, Y) == 0.0


def test_kernel_draws_for_each_seed():
    table = [{"seed": seed, "metrics": {}, "arm": "a"} for seed in (3, 0, 3)]
    found = self_distillation.kernel(table, draws=3)
    assert list(found) == ["first", "zero", "fixed", "optimal"]
    assert all(list(values) == [0, 3] for values in found.values())
    assert self_distillation.kernel(table, draws=3, alpha=0.0)["fixed"] == found["zero"]
    assert self_distillation.kernel(table, draws=3, alpha=1.0)["fixed"] == pytest.approx(
        found["first"]
    )
    rng = np.random.default_rng(3)
    losses = []
    for _ in range(3):
        y = np.sin(2 * np.pi * X) + rng.normal(0, 0.5, 11)
        rng.normal(0, 0.5, 10)  # the points that choose the optimal weight
        fit = KernelRidge(alpha=0.2, kernel="rbf", gamma=80).fit(X[:, None], y)
        losses.append(((fit.predict(FINE[:, None]) - np.sin(2 * np.pi * FINE)) ** 2).mean())
    assert found["first"][3] == pytest.approx(np.mean(losses), rel=1e-6)


def test_networks(tmp_path):
    """The estimate of one seed against a search by the predictions of its two runs."""
    tiny = ("task=digits", "model.width=8", "tracker=none", "trainer.max_steps=10")
    technique = "technique=self_distillation_ground_truth_weight"
    table = []

    def train(arm, *overrides):
        result = invoke("run", *tiny, technique, *overrides, f"outputs={tmp_path}", "--json")
        assert result.code == 0, result.err
        folder = json.loads(result.out.splitlines()[-1])["run_dir"]
        row = {"arm": arm, "seed": 0, "metrics": {"step": 10}, "run_dir": folder}
        table.append(row | {"config": read_config(Path(folder))})
        return folder

    first = train("first", "~callbacks.teacher", "task.loss.alpha=1")
    arms = {"zero": 0.0, "half": 0.5}
    for arm, alpha in arms.items():
        train(arm, f"callbacks.teacher.of={first}", f"task.loss.alpha={alpha}")
    found = self_distillation.networks(table, first="first", distilled=arms)
    said = {row["arm"]: self_distillation._probabilities(row) for row in table}
    labels = said["first"][1][::2]
    mixed = lambda w: w * said["first"][0][::2] + (1 - w) * said["zero"][0][::2]  # noqa: E731
    searched = min(np.linspace(0, 1, 10_001), key=lambda w: ((mixed(w) - labels) ** 2).sum())
    assert found["estimate"][0] == pytest.approx(searched, abs=2e-4)
    errors = {arm: ((p - y)[1::2] ** 2).mean() for arm, (p, y) in said.items()}
    assert found["zero"][0] == pytest.approx(errors["zero"])
    assert found["best"][0] == pytest.approx(min(errors.values()))
    with pytest.raises(ValueError, match="no arm has an alpha of 0"):
        self_distillation.networks(table, first="first", distilled={"half": 0.5})
    with pytest.raises(ValueError, match="no finished run of the arm 'other'"):
        self_distillation.networks(table, first="other", distilled=arms)
