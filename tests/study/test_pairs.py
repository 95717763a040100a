"""Analyses of models in pairs and in ensembles, of losses that are known."""

import math

import numpy as np
import pytest

from study import laws
from study.analyses import data_constrained, loss_to_loss, transfer
from study.fitting import fit


def run(arm, loss, seed=0, parameters=1e4, steps=100, rate=0.1, **metrics):
    return {
        "arm": arm,
        "seed": seed,
        "metrics": {"val/loss": loss, "parameters": parameters, "step": steps, **metrics},
        "config": {
            "trainer": {"batch_size": 10},
            "task": {"context_length": 32},
            "optimizer": {"lr": rate},
        },
        "run_dir": "there",
        "lines": [],
    }


def kaplan(n, d, floor, nc, dc):
    return floor + ((nc / n) ** 1.2 + dc / d) ** 0.3


def test_a_loss_from_another_of_one_law():
    """Two corpora whose losses above their floors are in proportion: κ = 1, K = 1.5."""
    table = []
    for i, n in enumerate((1e3, 3e3, 1e4)):
        for j, steps in enumerate((50, 200, 800)):
            first = kaplan(n, 320.0 * steps, 1.2, 5e4, 8e4)
            second = 0.7 + 1.5 * (first - 1.2)
            table.append(run(f"code_{i}{j}", first, 0, n, steps))
            table.append(run(f"prose_{i}{j}", second, 0, n, steps))
    first = kaplan(1e5, 320.0 * 5000, 1.2, 5e4, 8e4)
    table.append(run("code_large", first, 0, 1e5, 5000))
    table.append(run("prose_large", 0.7 + 1.5 * (first - 1.2), 0, 1e5, 5000))
    given = {"first": "code", "second": "prose", "metrics": ["val/loss"] * 2, "held_out": "large"}
    found = loss_to_loss.predicted(table, **given)
    assert found["kappa"][0] == pytest.approx(1, rel=1e-2)
    assert found["K"][0] == pytest.approx(1.5, rel=1e-2)
    assert found["error"][0] < 1e-3
    assert found["r2"][0] == pytest.approx(1, abs=1e-6)
    lowest = min(r["metrics"]["val/loss"] for r in table[1:-2:2])
    measured = table[-1]["metrics"]["val/loss"]
    assert found["nearest"][0] == pytest.approx(lowest / measured - 1)
    with pytest.raises(ValueError, match="seed 0 has no pair of runs that end in 'huge'"):
        loss_to_loss.predicted(table, **{**given, "held_out": "huge"})


def test_a_best_value_that_moves():
    losses = {"narrow": [3.0, 2.0, 1.0, 2.5], "wide": [1.5, 0.5, 0.9, 7.0]}
    table = [
        run(f"{name}_{i}", loss, rate=10.0**-i, diverged=float(loss == 7.0))
        for name, own in losses.items()
        for i, loss in enumerate(own)
    ]
    found = transfer.best(table, narrow="narrow", wide="wide", key="optimizer.lr")
    assert found == {"shift": {0: 1.0}, "lost": {0: pytest.approx(0.4)}}
    drawn = transfer.basins(table[:7], key="optimizer.lr")
    assert [line.get_label() for line in drawn.axes[0].lines[::2]] == ["narrow", "wide"]
    with pytest.raises(ValueError, match=r"seed 0 has not the same optimizer.lr as of 'narrow'"):
        transfer.best(table[:-1], narrow="narrow", wide="wide", key="optimizer.lr")


def test_losses_of_ensembles():
    """Of two members and three labels, by hand; averaging never loses to the members' mean."""
    first, second = np.array([0.5, 0.1, 0.9]), np.array([0.25, 0.3, 0.9])
    alone = -(np.log(first).mean() + np.log(second).mean()) / 2
    both = -(math.log(0.375) + math.log(0.2) + math.log(0.9)) / 3
    assert data_constrained.ensembles([first, second]) == pytest.approx([alone, both], rel=1e-12)


def test_floors_of_sizes_and_ensembles(monkeypatch):
    """Members whose errors are independent have a lower floor than their loss."""
    rng = np.random.default_rng(0)
    said = {seed: np.exp(-rng.uniform(0.5, 1.5, 400)) for seed in range(8)}
    monkeypatch.setattr(data_constrained, "probabilities", lambda row: said[row["seed"]])
    sizes = {"a": 1e3, "b": 4e3, "c": 1.6e4, "d": 6.4e4}
    table = [run(arm, 1 + 20 / n**0.5, seed, n) for arm, n in sizes.items() for seed in range(8)]
    found = data_constrained.asymptotes(table, single=list(sizes), member="b")
    assert found["single"] == pytest.approx({0: 1, 4: 1}, rel=1e-3)
    assert found["largest"][0] == pytest.approx(1 + 20 / 6.4e4**0.5)
    assert found["ensemble"][0] < found["together"][0]
    mean = np.mean([said[seed] for seed in range(4)], axis=0)
    assert found["together"][0] == pytest.approx(-np.log(mean).mean(), rel=1e-12)
    with pytest.raises(ValueError, match="8 seeds with a run of every arm make no group of 9"):
        data_constrained.asymptotes(table, single=list(sizes), member="b", size=9)


def test_the_law_of_the_forward_area_has_no_annealing():
    x = np.geomspace(0.1, 3, 12)
    columns = {"forward": x, "annealing": np.linspace(0, 1, 12)}
    found = fit(laws.find("forward"), columns, 2 + 0.5 * x**-0.4)
    assert found.values["alpha"] == pytest.approx(0.4, rel=1e-3)
