"""Laws fitted to points that were published with a paper's code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from study import laws
from study.fitting import Objective, fit, shown
from study.laws.annealing import areas
from study.laws.loss_to_loss import between

DATA = Path(__file__).parent / "data"
FIRST, SECOND = "fineweb-edu-100b", "starcoder"
LARGEST = 3e9
"""Parameters above which a model of `loss_to_loss.csv` is one of the paper's extrapolation."""


def read(name):
    return np.genfromtxt(DATA / name, delimiter=",", names=True, dtype=None, encoding="utf-8")


@pytest.fixture(scope="module")
def models():
    """Of https://github.com/KempnerInstitute/loss-to-loss-notebooks, `data/sweep.csv` and
    `data/extrapolation.csv`, the models trained on two of the six corpora."""
    return read("loss_to_loss.csv")


PUBLISHED = {  # `data/opt_params_data.csv`, the rows of `val_loss` with Kaplan's law
    FIRST: ((1.9669051, 66798878.5, 889955656.4, 0.41289807, 0.45558130), 7.92450060e-06),
    SECOND: ((0.8452475, 22270138.3, 377544568.2, 0.45126811, 0.47156526), 1.23548209e-05),
}


def small(models, corpus):
    own = models[(models["data"] == corpus) & (models["parameters"] < LARGEST)]
    return {name: own[name] for name in ("parameters", "tokens")}, own["loss"]


def test_kaplans_law_with_a_floor_is_the_authors(models):
    """The coefficients of their own fit."""
    columns, losses = small(models, FIRST)
    found = fit(laws.find("kaplan_floor"), columns, losses)
    values = {name: value for name, value, _ in shown(found)}
    for name, value in zip(("E", "Nc", "Dc", "alpha_N", "alpha_D"), PUBLISHED[FIRST][0]):
        assert values[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_its_objective_is_the_authors(models, corpus):
    """They report its mean at their coefficients."""
    columns, losses = small(models, corpus)
    (floor, size, tokens, *exponents), mean = PUBLISHED[corpus]
    law = laws.find("kaplan_floor")
    values = {"log_E": floor, "log_Nc": size, "log_Dc": tokens}
    values = {n: math.log(v) for n, v in values.items()} | dict(
        zip(("alpha_N", "alpha_D"), exponents)
    )
    given = torch.tensor([[values[name] for name in law.starts]], dtype=torch.float64)
    assert Objective(law, columns, losses)(given).item() / len(losses) == pytest.approx(
        mean, rel=1e-5
    )


def test_one_corpus_loss_from_anothers(models):
    """With the authors' floors their exponents (`loss_relationships.ipynb`: κ = 1.1002, K = 0.6331,
    by least squares of logarithms), and the 3.3B model's loss within 2.1%."""
    sides = [{r["tokens"]: r["loss"] for r in models if r["data"] == n} for n in (FIRST, SECOND)]
    shared = [tokens for tokens in sides[0] if tokens in sides[1]]
    other, losses = (np.array([side[tokens] for tokens in shared]) for side in sides)
    held = np.arange(len(shared)) == other.argmin()
    assert other[held] == pytest.approx(2.1262636)  # of the model of 3.3B
    found = fit(between(0.8452475, 1.9669051), {"other_loss": other}, losses, held)
    values = {name: value for name, value, _ in shown(found)}
    assert values == pytest.approx({"kappa": 1.1002, "K": 0.6331}, rel=6e-3)
    assert found.error < 0.021
    least = np.polyfit(np.log(other[~held] - 1.9669051), np.log(losses[~held] - 0.8452475), 1)
    assert (least[0], math.exp(least[1])) == pytest.approx((1.1002, 0.6331), rel=2e-4)


PEAK, FLOOR, WARM = 3e-4, 3e-5, 2160


def schedule(name):
    """As `src/lr_schedules.py` there makes them."""
    warm = np.linspace(0, PEAK, WARM)
    cosine = np.arange(24000 - WARM) / (24000 - WARM)
    down = np.arange(4000) / 4000
    rest = {
        "constant_24000": np.full(24000 - WARM, PEAK),
        "cosine_24000": FLOOR + (PEAK - FLOOR) * (1 + np.cos(np.pi * cosine)) / 2,
        "wsd_20000_24000": np.r_[np.full(20000 - WARM, PEAK), PEAK ** (1 - down) * FLOOR**down],
        "wsdcon_9": np.r_[np.full(8000 - WARM, PEAK), np.full(8000, 9e-5)],
    }
    return np.concatenate([warm, rest[name]])


def test_two_curves_give_the_others():
    """Constant and cosine learning rates of a model of 100M, of
    https://github.com/thu-yao-01-luo/MultiPowerLaw (MIT, Kairong Luo), `loss_curve_repo/csv_100`,
    every sixth point: what decays at the end and what drops half way are predicted within 0.15%."""
    points = read("learning_rates.csv")
    parts = []
    for number, name in enumerate(dict.fromkeys(points["curve"])):
        rates = schedule(name)
        own = points[points["curve"] == name]
        own = own[own["step"] < len(rates)]
        assert own["lr"] == pytest.approx(rates[own["step"]], rel=1e-3)
        both = [area.numpy()[own["step"]] for area in areas(torch.from_numpy(rates))]
        parts.append(np.stack([*both, own["loss"], np.full(len(own), number)]))
    forward, annealing, losses, curves = np.concatenate(parts, axis=1)
    columns = {"forward": forward, "annealing": annealing}
    found = fit(laws.find("annealing"), columns, losses, curves > 1)
    assert found.fitted_error < 5e-4
    assert found.error < 1.5e-3
    # Without the annealing area one curve cannot be told from another.
    without = fit(laws.find("power"), {"x": forward}, losses, curves > 1)
    assert without.error > 5 * found.error


def test_mup_models_give_the_larger_ones():
    """Parameters (millions) and training losses of https://github.com/cofe-ai/Mu-scaling,
    `fit_scale_loss_prediction.py`: seven models of widths 128 to 896 give the next three, as the
    least squares of SciPy do, with which it fits."""
    sizes = [8.53, 21.56, 39.09, 61.12, 87.65, 118.68, 154.21, 194.24, 676.48, 1446.72]
    losses = [3.9181, 3.6054, 3.4431, 3.3542, 3.2902, 3.2478, 3.224, 3.1797, 3.0854, 3.0425]
    n, measured = np.array(sizes) * 1e6, np.array(losses)
    held = np.arange(10) >= 7
    found = fit(laws.find("mup"), {"parameters": n}, measured, held)
    theirs, _ = curve_fit(
        lambda x, a, b, c: a * x**b + c, sizes[:7], losses[:7], p0=[1, -1, 3], maxfev=5000
    )
    a, b, c = theirs
    values = {name: value for name, value, _ in shown(found)}
    assert values["b"] == pytest.approx(b, rel=0.05)
    assert values["c"] == pytest.approx(c, rel=0.01)
    assert found.predicted[held] == pytest.approx(a * np.array(sizes[7:]) ** b + c, rel=4e-3)
    assert found.error < 0.01
