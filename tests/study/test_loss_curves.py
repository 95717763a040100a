"""Kaplan's law of loss curves, of curves that follow it."""

import numpy as np
import pytest
from scipy.optimize import brentq

from study.analyses import loss_curves

NC, SC, ALPHA_N, ALPHA_S, BATCH, ALPHA_B = 4e5, 8.0, 0.08, 0.7, 2e3, 0.2
STEPS = (20, 40, 60, 80, 120, 160, 240, 320, 480)


def loss(width, batch, step):
    """Equations 1.4, 1.6 and 5.4 of arXiv 2001.08361, solved by bisection."""
    n = 12 * width**2

    def excess(value):
        critical = BATCH / value ** (1 / ALPHA_B)
        least = step / (1 + critical / batch)
        return (NC / n) ** ALPHA_N + (SC / least) ** ALPHA_S - value

    return brentq(excess, 0.5, 50)


def run(arm, width, batch):
    lines = [{"step": step, "val/loss": loss(width, batch, step)} for step in STEPS]
    config = {"model": {"width": width, "depth": 1}, "trainer": {"batch_size": batch}}
    return {"arm": arm, "seed": 0, "metrics": {"step": 480}, "lines": lines, "config": config}


@pytest.fixture(scope="module")
def table():
    sizes = [run(f"w{width}", width, 32) for width in (8, 12, 24)]
    batches = [run(f"b{batch}", 16, batch) for batch in (4, 16, 64, 256)]
    return [*sizes, *batches, run("large", 48, 16)]


def test_constants_are_found_again_and_a_larger_run_is_predicted(table):
    """But for what lines between evaluations lose."""
    found = loss_curves.estimated(table, batches=["b*"], held_out="large")
    assert found["alpha_B"][0] == pytest.approx(ALPHA_B, rel=0.1)
    assert found["alpha_N"][0] == pytest.approx(ALPHA_N, rel=0.1)
    assert found["alpha_S"][0] == pytest.approx(ALPHA_S, rel=0.1)
    assert found["fitted_error"][0] < 0.01
    assert found["error"][0] < 0.01 < found["nearest"][0]


def test_critical_batches_are_those_of_the_hyperbola():
    """Of curves whose steps to a loss L are (S_min + E_min/B)/L, E_min/S_min at every loss."""
    losses = np.linspace(3, 1, 200)
    sizes = [4.0, 16.0, 64.0]
    curves = [((10 + 800 / size) / losses, losses) for size in sizes]
    reached, critical = loss_curves.critical_batches(sizes, curves, 5)
    assert len(reached) == 5
    assert critical == pytest.approx(np.full(5, 80), rel=1e-3)


def test_what_is_wrong(table):
    with pytest.raises(ValueError, match=r"^batches: no arm is 'c\*'"):
        loss_curves.estimated(table, batches=["c*"], held_out="large")
