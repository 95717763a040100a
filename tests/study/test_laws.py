"""Laws fitted to tables of runs whose losses come from a known law."""

import numpy as np
import pytest

from study import figures
from study.analyses import laws

SIZES, STEPS = (1e3, 3e3, 1e4, 3e4), (100, 200, 400, 800)


def run(arm, seed, loss, parameters, steps, **metrics):
    """A row of the table: batches of 16 windows of 64 tokens."""
    return {
        "arm": arm,
        "seed": seed,
        "lines": [],
        "metrics": {
            "val/loss": loss,
            "parameters": parameters,
            "step": steps,
            "diverged": 0.0,
            **metrics,
        },
        "config": {
            "model": {"width": 8 * (1 + int(np.log10(parameters))), "depth": 2},
            "trainer": {"batch_size": 16, "max_steps": steps},
            "task": {"context_length": 64},
        },
        "run_dir": "there",
    }


def grid(law, seeds=(0, 1)):
    """Runs of every size and budget, with the losses law(N, D, seed)."""
    return [
        run(f"n{n:.0f}_s{s}", seed, law(n, 1024.0 * s, seed), n, s)
        for n in SIZES
        for s in STEPS
        for seed in seeds
    ]


def chinchilla(n, d, seed):
    return 1.5 + seed / 10 + 4 / n**0.3 + 30 / d**0.4


def test_each_seed_has_its_law_back():
    table = grid(chinchilla)
    found = laws.fitted(table, law="chinchilla", held_out=["n30000_s800", "n10000_s800"])
    assert found["E"] == pytest.approx({0: 1.5, 1: 1.6}, rel=1e-3)
    for name, value in {"A": 4, "B": 30, "alpha": 0.3, "beta": 0.4}.items():
        assert found[name] == pytest.approx({0: value, 1: value}, rel=5e-3)
    assert found["r2"] == pytest.approx({0: 1, 1: 1}, abs=1e-6)
    assert max(*found["error"].values(), *found["fitted_error"].values()) < 1e-4
    measured = [chinchilla(n, 1024 * 800, 0) for n in (3e4, 1e4)]
    lowest = chinchilla(3e4, 1024 * 400, 0)
    nearest = np.mean([abs(lowest - m) / m for m in measured])
    assert found["nearest"][0] == pytest.approx(nearest, rel=1e-9)


def test_of_some_arms_and_one_quantity():
    """Along one budget the law's other term is a constant."""
    found = laws.fitted(grid(chinchilla), law="power", arms=["*_s400"], x="parameters")
    assert found["E"][0] == pytest.approx(1.5 + 30 / (1024 * 400) ** 0.4, rel=1e-3)
    assert found["alpha"][1] == pytest.approx(0.3, rel=5e-3)
    assert "error" not in found
    by_tokens = laws.fitted(grid(chinchilla), law="power", arms=["n1000_*"], x="tokens")
    assert by_tokens["alpha"][0] == pytest.approx(0.4, rel=5e-3)


def test_without_a_floor_a_power_law_is_a_line_of_logarithms():
    """NumPy's line through the logarithms is that of least squares; Huber's is near it for losses
    that lie on one."""
    table = grid(lambda n, d, seed: 7 / n**0.2)
    found = laws.fitted(table, law="pure_power", arms=["*_s100"], x="parameters")
    slope, start = np.polyfit(np.log(SIZES), np.log([7 / n**0.2 for n in SIZES]), 1)
    assert found["alpha"][0] == pytest.approx(-slope, rel=1e-6)
    assert found["A"][0] == pytest.approx(np.exp(start), rel=1e-5)


def test_parameters_but_the_embeddings():
    """12 · depth · width², whatever the run recorded."""
    table = grid(lambda n, d, seed: 1 + (24 * (8 * (1 + int(np.log10(n)))) ** 2) ** -0.25)
    table = [r for r in table if r["seed"] == 0]
    wide = run("wide", 0, 1 + (24 * 80**2) ** -0.25, 1e9, 100)  # width 8 · (1 + 9)
    (found,) = (
        columns
        for _, _, columns in laws.by_seed(
            [*table, wide], law="pure_power", x="parameters", embeddings=False, held_out=["wide"]
        )
    )
    assert found["x"].max() == 24 * 80**2
    assert found["x"].min() == 24 * 32**2


def test_intervals_hold_the_truth():
    rng = np.random.default_rng(1)
    table = grid(lambda n, d, seed: 7 / n**0.2 * np.exp(0.01 * rng.standard_normal()), (0,))
    found = laws.fitted(table, law="pure_power", x="parameters", resamples=50)
    assert found["alpha_low"][0] < 0.2 < found["alpha_high"][0] < found["alpha_low"][0] + 0.02
    assert found["A_low"][0] < 7 < found["A_high"][0]


def test_optimal_size_is_that_of_the_law():
    """N_opt ∝ C^(β/(α+β)), of sizes and budgets so close that steps between them hardly count."""
    table = [
        run(f"n{i}_{k}", 0, 1 + 60 * n**-0.6 + 60 * (1024 * s) ** -0.4, n, s)
        for i, n in enumerate(np.geomspace(50, 5e3, 40))
        for k, s in enumerate(np.geomspace(0.1, 100, 40))
    ]
    found = laws.optimal_size(table)
    assert found["beta"][0] == pytest.approx(0.4 / (0.4 + 0.6), abs=0.03)
    assert found["sizes"][0] > 20
    with pytest.raises(ValueError, match=r"^seed 0: no two sizes"):
        laws.optimal_size([run("a", 0, 1.0, 10, 1), run("b", 0, 1.0, 99, 9)])


def test_stopped_early():
    """The sum's fit is never the higher, and of a law of two coordinates they are one."""
    noise = np.random.default_rng(0)
    table = grid(lambda n, d, seed: chinchilla(n, d, seed) * np.exp(0.01 * noise.normal()), (0,))
    found = laws.stopped_early(table, law="kaplan")
    assert found["excess"][0] >= 1
    assert found.keys() == {"excess", "alpha_N_apart", "alpha_D_apart"}
    easy = laws.stopped_early(table, law="pure_power", x="parameters")
    assert easy["excess"][0] == pytest.approx(1, abs=0.01)


def test_diverged_and_failed_runs_are_left_out():
    table = grid(lambda n, d, seed: 7 / n**0.2, seeds=(0,))
    bad = run("n1000_s100", 0, 1e9, 1e3, 100, diverged=1.0)
    failed = {**run("n1000_s100", 0, 1.0, 1e3, 100), "metrics": {}}
    found = laws.fitted([*table, bad, failed], law="pure_power", x="parameters")
    assert found["fitted_error"][0] < 1e-4


def test_what_is_wrong():
    table = grid(chinchilla)
    with pytest.raises(ValueError, match=r"^held_out: no arm is 'huge'"):
        laws.fitted(table, law="chinchilla", held_out=["huge"])
    with pytest.raises(ValueError, match=r"^seed 0: 4 rows are too few for 5 coordinates"):
        laws.fitted(table, law="chinchilla", arms=["n1000_*"])


def test_figure():
    """Rows of all seeds, those held out apart, and a panel for each column."""
    table = grid(lambda n, d, seed: (7 + seed) / n**0.2)
    drawn = figures.fit(table, law="pure_power", x="parameters", held_out=["n30000_s800"])
    first, by_size = drawn.axes
    assert [len(np.asarray(dots.get_offsets())) for dots in first.collections] == [30, 2]
    assert (first.get_xlabel(), by_size.get_xlabel()) == ("predicted loss", "parameters")
    predicted, measured = np.asarray(first.collections[0].get_offsets()).T
    assert predicted == pytest.approx(measured, rel=1e-4)
