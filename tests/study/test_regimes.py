import numpy as np
import pytest

from study.analyses import regimes
from study.plots import save


def row(arm, seed, x, loss):
    return {"arm": arm, "seed": seed, "config": {"data": {"n": x}}, "metrics": {"loss": loss}}


def power(prefix, exponent, floor=0.0, seeds=(0, 1), noise=None):
    rows = []
    for x in (10, 40, 160):
        for seed in seeds:
            loss = floor + 3 * x**-exponent + (noise[seed] / np.sqrt(x) if noise is not None else 0)
            rows.append(row(f"{prefix}_{x}", seed, x, loss))
    return rows


def test_exponents_of_power_laws():
    table = power("a", 0.7) + power("b", 1.3)
    told = {"of": "data.n", "metric": "loss"}
    found = regimes.exponents(table, families={"one": "a_*", "two": "b_*"}, **told)
    assert found["one"] == pytest.approx({0: 0.7, 1: 0.7})
    assert found["two"] == pytest.approx({0: 1.3, 1: 1.3})
    dual = {"families": {"f": "a_*"}, **told}, {"families": {"f": "b_*"}, **told}
    ratio = regimes.duality(table, data=dual[0], width=dual[1], families=["f"])
    assert ratio["ratio"] == pytest.approx({0: 0.7 / 1.3, 1: 0.7 / 1.3})
    with pytest.raises(ValueError, match="no arm is 'c_\\*'"):
        regimes.exponents(table, families={"f": "c_*"}, **told)
    with pytest.raises(ValueError, match="'a_10' have one value"):
        regimes.exponents(table, families={"f": "a_10"}, **told)


def test_above_a_limit():
    """Exact without noise; with noise that has mean zero over seeds too, though single seeds may be
    below their limit."""
    told = {"families": {"f": "a_*"}, "of": "data.n", "metric": "loss", "limit": "a_limit"}
    seeds = (0, 1, 2, 3)
    limits = [row("a_limit", seed, 10**9, 2.0) for seed in seeds]
    exact = regimes.above_limit([*power("a", 1.0, 2.0, seeds), *limits], **told)
    assert exact["f"] == pytest.approx(dict.fromkeys(seeds, 1.0), abs=1e-5)
    noise = np.array([0.6, -0.6, 0.2, -0.2])
    table = [*power("a", 1.0, 2.0, seeds, noise), *limits]
    assert min(r["metrics"]["loss"] for r in table) < 2.0
    assert np.mean(list(regimes.above_limit(table, **told)["f"].values())) == pytest.approx(
        1.0, abs=0.3
    )


def test_decay_by_its_normal_equation():
    """At the solution the weighted residuals are orthogonal to the gradient in both parameters."""
    x, y = np.array([10.0, 40.0, 160.0]), np.array([0.3, 0.09, 0.01])
    alpha = regimes.decay(x, y)
    basis = x**-alpha
    amplitude = (basis * y * x).sum() / (basis * basis * x).sum()
    left = (amplitude * basis - y) * x
    assert (left * basis * np.log(x)).sum() == pytest.approx(0, abs=1e-5)


def test_figure(tmp_path):
    table = power("a", 1.0, 2.0, (0, 1, 2))
    table += [row("a_limit", s, 10**9, 2.0) for s in (0, 1, 2)]
    told = {"families": {"f": "a_*"}, "of": "data.n", "metric": "loss"}
    drawn = regimes.panels(table, panels={"all": told, "above": {**told, "limit": "a_limit"}})
    save(drawn, tmp_path / "regimes.png")
    assert drawn.axes[1].get_legend().get_texts()[0].get_text() == "f: 1.00"
