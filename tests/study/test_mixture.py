"""The law of mixtures, its columns from files and runs, and its analysis."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from study import laws
from study.analyses import mixtures
from study.fitting import evaluate, fit, shown
from study.laws import mixture
from study.points import from_csv, from_runs
from training.errors import UsageError

LAW = {"E": 1.2, "A": 40.0, "B": 90.0, "alpha": 0.4, "beta": 0.35}
WORTH, POWERS = {"code": 0.8, "prose": 0.3}, {"code": 0.3, "prose": 0.7}


def truth(n, d, h):
    """The paper's additive law, in NumPy."""
    worth = sum(WORTH[i] * h[i] ** POWERS[i] for i in h)
    return LAW["E"] + 1 / worth + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


def coordinates(law):
    """Those of the truth, in the law's order."""
    given = {f"log_{k}": np.log(LAW[k]) for k in ("E", "A", "B")}
    given |= {k: LAW[k] for k in ("alpha", "beta")}
    given |= {f"log_C_{i}": np.log(v) for i, v in WORTH.items()}
    given |= {f"log_gamma_{i}": np.log(v) for i, v in POWERS.items()}
    return {name: given[name] for name in law.starts}


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    code = np.concatenate([rng.uniform(0, 1, 24), [0.0, 1.0]])
    n, d = 10 ** rng.uniform(3, 7, 26), 10 ** rng.uniform(4, 8, 26)
    columns = {"parameters": n, "tokens": d, "weight_code": code, "weight_prose": 1 - code}
    return columns, truth(n, d, {"code": code, "prose": 1 - code})


def test_the_law_is_the_papers(points):
    """A domain that is not in the mixture counts for nothing."""
    columns, losses = points
    law = laws.find("mixture").over(columns)
    assert law.columns == tuple(columns)
    assert "C_code*weight_code^gamma_code + C_prose*weight_prose^gamma_prose" in law.formula
    found = evaluate(law, np.array([list(coordinates(law).values())]), columns)
    assert np.exp(found[0]) == pytest.approx(losses, rel=1e-12)


def test_losses_made_from_it_give_it_back(points):
    """From one start, to save time."""
    columns, losses = points
    law = mixture.of(("code", "prose"))
    one = {name: (value + 0.2,) for name, value in coordinates(law).items()}
    found = fit(replace(law, starts=one), columns, losses)
    values = {name: value for name, value, _ in shown(found)}
    expected = LAW | {f"C_{i}": v for i, v in WORTH.items()}
    expected |= {f"gamma_{i}": v for i, v in POWERS.items()}
    assert values == pytest.approx(expected, rel=1e-2)


def test_the_optimum_is_that_of_a_grid():
    best = mixture.optimum(coordinates(mixture.of(("code", "prose"))))
    grid = np.linspace(0, 1, 100_001)
    losses = truth(1e6, 1e8, {"code": grid, "prose": 1 - grid})
    assert best["code"] == pytest.approx(grid[losses.argmin()], abs=1e-4)
    assert sum(best.values()) == pytest.approx(1, abs=1e-12)


def test_columns_of_a_file(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("parameters,tokens,weight_a,weight_b,loss\n10,100,1,3,2.5\n20,100,1,0,2.0\n")
    found = from_csv(path, laws.find("mixture"))
    assert found.columns["weight_a"].tolist() == [0.25, 1.0]
    assert found.columns["weight_b"].tolist() == [0.75, 0.0]
    path.write_text("parameters,tokens,loss\n10,100,2.5\n")
    with pytest.raises(UsageError, match="needs columns weight_DOMAIN"):
        from_csv(path, laws.find("mixture"))


def run(arm, weights, loss, width=1e4, steps=100):
    return {
        "arm": arm,
        "seed": 0,
        "lines": [],
        "metrics": {"val/loss": loss, "parameters": width, "step": steps, "diverged": 0.0},
        "config": {
            "trainer": {"batch_size": 10},
            "task": {"context_length": 32},
            "data": {"sampler": {"weights": weights} if weights else {}},
        },
        "run_dir": Path("there"),
    }


def test_columns_of_runs():
    """In any unit, and without those that are not drawn."""
    runs = [run("a", {"code": 3, "prose": 1}, 2.0), run("b", {"prose": 0.5}, 3.0)]
    found = from_runs(runs, laws.find("mixture"))
    assert found.columns["weight_code"].tolist() == [0.75, 0.0]
    assert found.columns["weight_prose"].tolist() == [0.25, 1.0]
    assert found.columns["tokens"].tolist() == [32_000, 32_000]
    with pytest.raises(UsageError, match=r"there has no data.sampler.weights"):
        from_runs([*runs, run("c", None, 2.0)], laws.find("mixture"))


def test_the_mixture_a_law_chooses(monkeypatch):
    """The truth's fit chooses the best of the held-out mixtures."""
    law = mixture.of(("code", "prose"))
    near = replace(law, starts={name: (v,) for name, v in coordinates(law).items()})
    monkeypatch.setattr(mixture, "LAW", replace(mixture.LAW, domains=lambda domains: near))
    rng = np.random.default_rng(1)
    table = []
    for number, code in enumerate([*rng.uniform(0.05, 0.95, 12), 0.2, 0.5, 0.8]):
        n, steps = 10 ** rng.uniform(3, 6), int(rng.uniform(50, 5000))
        if number >= 12:
            n, steps = 1e6, 5000
        loss = truth(n, 320.0 * steps, {"code": code, "prose": 1 - code})
        name = f"large_{number}" if number >= 12 else f"small_{number}"
        table.append(run(name, {"code": code, "prose": 1 - code}, loss, n, steps))
    found = mixtures.predicted(table, targets=["val/loss"], held_out=["large_*"])
    held = [r["metrics"]["val/loss"] for r in table[12:]]
    assert found["chosen"][0] == found["best"][0] == min(held)
    assert found["average"][0] == pytest.approx(np.mean(held))
    assert found["order"][0] == pytest.approx(1)
    assert found["val/loss_code"][0] + found["val/loss_prose"][0] == pytest.approx(1)
