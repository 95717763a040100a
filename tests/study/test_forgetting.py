import numpy as np
import pytest

from study.analyses.forgetting import learned, together
from tests.study.test_analyses import FAILED, run


def losses(**values):
    return [run(arm=arm, metrics={"val/loss": value}) for arm, value in values.items()]


def test_learned_is_a_share():
    table = [*losses(start=5.0, full=1.0, some=2.0), FAILED, run(arm="some", seed=1)]
    found = learned(table, before="start", most="full")
    assert found == {"start": {0: 0.0}, "full": {0: 1.0}, "some": {0: 0.75}}
    with pytest.raises(ValueError, match="no finished run of the arm 'none' has 'val/loss'"):
        learned(table, before="none", most="full")


def test_together_is_pearsons():
    x = np.array([[1.0, 2.0, 4.0], [3.0, 5.0, 4.0]])
    y = np.array([[2.0, 2.5, 9.0], [4.0, 4.0, 1.0]])

    def lines(i):
        return [{"step": n, "x": a, "y": b} for n, (a, b) in enumerate(zip(x[i], y[i]))]

    table = [run(arm=f"a{i}", lines=[*lines(i), {"step": 9, "x": 0.0}]) for i in (0, 1)]
    found = together([*table, run(arm="other", lines=lines(0)[::-1])], arms=["a0", "a1"], **XY)
    assert found["r"][0] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    with pytest.raises(ValueError, match="no seed has two values of 'x' and 'y'"):
        together([run(arm="a0", lines=[{"step": 0, "x": 1.0, "y": 1.0}])], arms=["a0"], **XY)


XY = {"first": "x", "second": "y"}
