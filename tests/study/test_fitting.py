"""Laws are found again: in published points, and in losses made from them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from study import laws
from study.fitting import HUBER, Objective, bootstrap, evaluate, fit, shown
from study.laws.annealing import areas

POINTS = Path(__file__).parent / "data" / "chinchilla.csv"
PUBLISHED = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
ERRORS = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}


@pytest.fixture(scope="module")
def chinchilla():
    """The points of Chinchilla's figure 4, as https://github.com/epoch-research/analyzing-chinchilla
    read them off it, but the five with the highest loss, as there."""
    points = np.genfromtxt(POINTS, delimiter=",", names=True)
    kept = points["loss"] < np.sort(points["loss"])[-5]
    columns = {name: points[name][kept] for name in ("parameters", "tokens")}
    return columns, points["loss"][kept]


def test_chinchillas_points_have_the_replications_law(chinchilla):
    """Within a quarter of its standard errors; and not the law that Chinchilla reported."""
    columns, losses = chinchilla
    found = fit(laws.find("chinchilla"), columns, losses, resamples=30)
    for name, value, interval in shown(found):
        assert value == pytest.approx(PUBLISHED[name], abs=ERRORS[name] / 4)
        assert interval[0] < PUBLISHED[name] < interval[1]
    low, high = found.intervals["beta"]
    assert not low < 0.28 < high
    assert found.objective < objective(columns, losses, PUBLISHED) < 1.01 * found.objective


def objective(columns, losses, law):
    """The replication's objective, in NumPy."""
    n, d = np.log(columns["parameters"]), np.log(columns["tokens"])
    terms = (
        np.log(law["A"]) - law["alpha"] * n,
        np.log(law["B"]) - law["beta"] * d,
        np.full_like(n, np.log(law["E"])),
    )
    left = np.abs(logsumexp(terms, axis=0) - np.log(losses))
    return np.where(left <= HUBER, left**2 / 2, HUBER * (left - HUBER / 2)).sum()


def test_the_objective_is_the_replications(chinchilla):
    columns, losses = chinchilla
    law = laws.find("chinchilla")
    values = [math.log(PUBLISHED[k]) for k in ("E", "A", "B")] + [0.3478, 0.3658]
    found = Objective(law, columns, losses)(torch.tensor([values], dtype=torch.float64))
    assert found.item() == pytest.approx(objective(columns, losses, PUBLISHED), rel=1e-12)


RNG = np.random.default_rng(0)
N, D = 10 ** RNG.uniform(6, 9, 40), 10 ** RNG.uniform(8, 11, 40)
X = 10 ** RNG.uniform(0, 6, 40)
MADE = {
    "chinchilla": (
        {"parameters": N, "tokens": D},
        1.7 + 400 / N**0.34 + 900 / D**0.31,
        {"E": 1.7, "A": 400, "B": 900, "alpha": 0.34, "beta": 0.31},
    ),
    "kaplan": (  # the paper's own numbers
        {"parameters": N, "tokens": D},
        ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103,
        {"Nc": 6.4e13, "Dc": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    ),
    "power": ({"x": X}, 2.1 + 3.0 / X**0.24, {"E": 2.1, "A": 3.0, "alpha": 0.24}),
    "overtraining": (
        {"parameters": N, "tokens": D},
        1.5 + (90 * (D / N) ** 0.14 + 70 * (D / N) ** -0.14) * (6 * N * D) ** -0.14,
        {"E": 1.5, "a": 90, "b": 70, "eta": 0.14},
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_losses_made_from_a_law_give_it_back(name):
    columns, losses, law = MADE[name]
    found = fit(laws.find(name), columns, losses)
    assert {k: v for k, v, _ in shown(found)} == pytest.approx(law, rel=1e-3)
    assert found.fitted_error < 1e-5


def test_loss_to_loss():
    other = RNG.uniform(2.4, 5.0, 40)
    losses = 1.2 + 0.8 * (other - 1.9) ** 1.3
    found = fit(laws.find("loss_to_loss"), {"other_loss": other}, losses)
    values = {k: v for k, v, _ in shown(found)}
    assert values["kappa"] == pytest.approx(1.3, rel=1e-3)
    assert values["E0"] == pytest.approx(1.9, rel=1e-3)


def test_areas_under_the_learning_rates():
    """The double sum of the paper, in plain Python; a warm-up is no annealing."""
    rates = [0.5, 1.0, 1.0, 0.8, 0.4, 0.4, 0.1]
    decay = 0.9
    forward, annealing = areas(torch.tensor(rates), decay)
    assert forward.tolist() == pytest.approx(np.cumsum(rates), rel=1e-6)
    for s in range(len(rates)):
        expected = sum(
            max(rates[k - 1] - rates[k], 0) * decay ** (i - k)
            for i in range(s + 1)
            for k in range(1, i + 1)
        )
        assert annealing[s].item() == pytest.approx(expected, abs=1e-7)


def test_the_law_of_annealing_predicts_another_schedule():
    """Fitted to losses of a constant and a cosine schedule, it has those of a linear one."""
    steps = torch.arange(400) / 400
    schedules = [torch.ones(400), 0.5 + 0.5 * torch.cos(math.pi * steps), 1 - steps]
    rows = []
    for number, rates in enumerate(schedules):
        forward, annealing = (part[19::20].numpy() for part in areas(0.01 * rates))
        losses = 2.0 + 0.6 * forward**-0.4 - 0.3 * annealing
        rows += [(a, b, loss, number) for a, b, loss in zip(forward, annealing, losses)]
    forward, annealing, losses, runs = map(np.array, zip(*rows))
    columns = {"forward": forward, "annealing": annealing}
    found = fit(laws.find("annealing"), columns, losses, held_out=runs == 2, groups=runs)
    assert found.error < 1e-5
    assert found.values["alpha"] == pytest.approx(0.4, rel=1e-3)
    assert found.values["C"] == pytest.approx(0.3, rel=1e-2)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 12 sets of noisy losses 95% intervals of the bootstrap miss one or two."""
    rng, law = np.random.default_rng(1), laws.find("power")
    start = np.array([math.log(1.5), math.log(2.0), 0.3])
    held = 0
    for _ in range(12):
        columns = {"x": 10 ** rng.uniform(0, 4, 60)}
        noise = np.exp(0.003 * rng.standard_normal(60))
        losses = (1.5 + 2.0 / columns["x"] ** 0.3) * noise
        low, high = bootstrap(law, columns, losses, start, 30)["alpha"]
        held += low < 0.3 < high
    assert held >= 9


def test_what_is_held_out_is_not_fitted():
    columns, losses, _ = MADE["power"]
    held = np.zeros(40, dtype=bool)
    held[:5] = True
    wrong = losses.copy()
    wrong[:5] *= 2
    found = fit(laws.find("power"), columns, wrong, held_out=held)
    assert found.fitted_error < 1e-5
    assert found.error == pytest.approx(0.5, rel=1e-3)
    again = evaluate(laws.find("power"), np.array([list(found.values.values())]), columns)
    assert np.exp(again[0]) == pytest.approx(losses, rel=1e-4)


def test_too_few_rows():
    with pytest.raises(ValueError, match="3 rows are too few for 5 coordinates"):
        fit(laws.find("chinchilla"), {"parameters": N[:3], "tokens": D[:3]}, np.ones(3))
