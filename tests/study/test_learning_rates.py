import math

import pytest

from study.analyses import learning_rates
from study.figures import over_arms
from study.plots import save


def row(arm, seed, lr=0.1, decay=0.0, lines=(), **metrics):
    config = {"optimizer": {"lr": lr, "weight_decay": decay}}
    own = {"arm": arm, "seed": seed, "config": config, "lines": list(lines)}
    return {**own, "metrics": {"diverged": 0.0, **metrics}}


def test_sensitivity_by_hand():
    """With ℓ₀ = 5: losses 2, 3, 7 and one that diverged count 2, 3, 5 and 5; their mean is 3.75."""
    table = [row("start", 0, loss=5.0), row("plain_a", 0, loss=2.0), row("plain_b", 0, loss=3.0)]
    table += [row("plain_c", 0, loss=7.0), row("plain_d", 0, diverged=1.0, loss=1.0)]
    table += [row(f"flat_{name}", 0, loss=2.5) for name in "abcd"]
    found = learning_rates.sensitivity(table, untrained="start", metric="loss")
    assert found == {"plain": {0: pytest.approx(1.75)}, "flat": {0: 0.0}}
    with pytest.raises(ValueError, match="different numbers of learning rates: \\[3, 4\\]"):
        learning_rates.sensitivity(table[:-1], untrained="start", metric="loss")
    with pytest.raises(ValueError, match="'begin' has no run of seed 0"):
        learning_rates.sensitivity(table[1:], untrained="begin", metric="loss")


def test_what_runs_have_in_common():
    middle, decayed = row("a", 0, 4e-3, 5.0), row("b", 0, 4e-3, 2.5)
    along, other = row("c", 0, 8e-3, 2.5), row("d", 0, 1e-3, 1.0)
    assert learning_rates.common(middle, decayed) == "lr"
    assert learning_rates.common(middle, along) == "elr"
    assert learning_rates.common(middle, other) is None
    assert learning_rates.common(middle, middle) is None


def test_trajectories_of_known_curves():
    """m = exp(−lr·t) until step 10, then exp(−lr·decay): arms of one rate are first the same, later
    |Δ(lr·decay)| apart, and arms of one product the other way about."""

    def lines(lr, decay):
        exponent = {t: lr * t if t <= 10 else lr * decay for t in range(1, 21)}
        return [{"step": t, "m": math.exp(-value)} for t, value in exponent.items()]

    rates = {"middle": (1.0, 2.0), "decayed": (1.0, 6.0), "slower": (0.5, 4.0)}
    table = [row(arm, s, *own, lines(*own)) for arm, own in rates.items() for s in (0, 1)]
    windows = {"early": (1, 10), "late": (11, 20)}
    found = learning_rates.trajectories(table, metric="m", **windows)
    mean = 0.5 * sum(range(1, 11)) / 10
    expected = {"lr_early": 0.0, "lr_late": 4.0, "elr_early": mean, "elr_late": 0.0}
    assert found == {key: pytest.approx({0: v, 1: v}) for key, v in expected.items()}
    with pytest.raises(ValueError, match="no 'x' between steps 1 and 10"):
        learning_rates.trajectories(table, metric="x", **windows)
    with pytest.raises(ValueError, match="no two arms have the same lr"):
        learning_rates.trajectories(
            [r for r in table if r["arm"] != "decayed"], metric="m", **windows
        )


def test_figures(tmp_path):
    lines = [{"step": t, "m": 1.0 / t} for t in range(1, 5)]
    table = [row(arm, 0, lr, 0.1, lines, m=lr) for arm, lr in (("x_a", 0.1), ("x_b", 1.0))]
    save(learning_rates.curves(table, metrics=["m"], lr=["x_a"], elr=["x_b"]), tmp_path / "a.png")
    drawn = over_arms([*table, row("untrained", 0, 0.0, m=3.0)], metric="m", log=True)
    (line,) = drawn.axes[0].lines
    assert list(line.get_xdata()) == [0.1, 1.0]
    assert drawn.axes[0].get_yscale() == "log"
