"""Two steps from sizes to accuracy, of runs that follow them."""

import numpy as np
import pytest

from study.analyses import ladder
from tests.study.test_laws import chinchilla, run


def accuracy(loss):
    """A sigmoid in the loss that is 1 at none, but for 2e-6."""
    return 1 - 0.9 / (1 + np.exp(-6 * (loss - 2.2)))


@pytest.fixture(scope="module")
def table():
    """A ladder of four sizes and budgets, and a larger model trained longer."""
    sizes = [(n, s) for n in (1e3, 3e3, 1e4, 3e4) for s in (100, 200, 400, 800)]
    rows = [(f"n{n:.0f}_s{s}", n, s) for n, s in sizes] + [("large", 1e5, 3200)]
    losses = {arm: chinchilla(n, 1024.0 * s, 0) for arm, n, s in rows}
    return [
        run(arm, 0, losses[arm], n, s, **{"val/accuracy": accuracy(losses[arm])})
        for arm, n, s in rows
    ]


def test_the_accuracy_of_a_larger_run_is_predicted(table):
    found = ladder.two_steps(table, held_out=["large"])
    assert found["loss_error"][0] < 1e-4
    assert found["of_loss"][0] < 1e-3
    assert found["error"][0] < 1e-3 < found["one_step"][0]


def test_the_sigmoid_is_found_again():
    losses = np.linspace(1.5, 3.5, 12)
    curve = ladder.sigmoid(losses, accuracy(losses))
    between = np.linspace(0.5, 4, 50)
    assert curve(between) == pytest.approx(accuracy(between), abs=1e-4)


def test_an_arm_that_is_not_there(table):
    with pytest.raises(ValueError, match=r"^held_out: no arm is 'larger'"):
        ladder.two_steps(table, held_out=["larger"])
