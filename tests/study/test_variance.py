import itertools

import numpy as np
import pytest
from scipy import stats

from study.analyses import variance
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.progress import Progress
from training.train import start


def drawn(rng, runs, samples, spread):
    """Rows of runs of which each has its own rate of being right, and the same for all samples."""
    rates = rng.normal(0.8, spread, (runs, 1)).clip(0, 1)
    return list((rng.random((runs, samples)) < rates).astype(float))


def test_share_is_unbiased_where_the_truth_is_known():
    """A run's accuracy on the distribution is its rate, of variance 0.05²: over 400 draws of 30
    runs and 60 samples the estimate's mean is that, within four standard errors; and 0 for equal
    rates."""
    rng = np.random.default_rng(0)
    for spread in (0.05, 0.0):
        found = []
        for _ in range(400):
            rows = drawn(rng, 30, 60, spread)
            found.append(variance.share(rows) * np.var(np.mean(rows, axis=1), ddof=1))
        assert abs(np.mean(found) - spread**2) < 4 * stats.sem(found)


def test_share_by_pairs_of_samples():
    """It is the mean covariance of two different samples."""
    rows = drawn(np.random.default_rng(1), 12, 9, 0.1)
    covariances = np.cov(np.array(rows).T, ddof=1)
    pairs = [covariances[i, j] for i, j in itertools.permutations(range(9), 2)]
    test = np.var(np.mean(rows, axis=1), ddof=1)
    assert variance.share(rows) == pytest.approx(np.mean(pairs) / test, abs=1e-12)


def test_halves_of_independent_and_of_common_errors():
    rng = np.random.default_rng(2)
    assert abs(variance.halves(drawn(rng, 400, 50, 0.0))) < 0.15
    same = [np.full(50, float(value)) for value in rng.integers(0, 2, 400)]
    assert variance.halves(same) == pytest.approx(1)


def test_distribution_of_independent_errors_is_binomial_for_equal_rates():
    found = variance.of_independent(np.full(20, 0.3))
    assert found == pytest.approx(stats.binom.pmf(np.arange(21), 20, 0.3), abs=1e-12)


def test_highest_of_a_few_by_all_draws():
    values = np.random.default_rng(3).normal(size=7)
    for count in range(1, 8):
        draws = [max(draw) for draw in itertools.combinations(values, count)]
        assert variance.highest(values, count) == pytest.approx(np.mean(draws), abs=1e-12)


def row(arm, seed, config=None, **metrics):
    return {"arm": arm, "seed": seed, "metrics": metrics, "config": config}


def test_retained_of_a_third():
    rng = np.random.default_rng(4)
    table = [row("all", s, x=v) for s, v in enumerate(rng.normal(0, 3, 400))]
    table += [row("init", s, x=v) for s, v in enumerate(rng.normal(1, 1, 400))]
    found = variance.retained(table, metric="x", to="all")
    assert set(found) == {"init"}
    assert np.mean(list(found["init"].values())) == pytest.approx(1 / 3, rel=0.15)


def test_calibrated_where_runs_draw_from_the_posterior():
    """Runs that say 1 with the probability q that the label is 1, independently for each sample,
    make up a calibrated ensemble: the ratio is 1."""
    rng, n, runs = np.random.default_rng(5), 360, 400
    q = rng.random(n)
    labels = rng.random(n) < q
    accuracies = ((rng.random((runs, n)) < q) == labels).mean(1)
    config = compose(["task=digits", "task.positive=[1,3,5,7,9]", "tracker=none"])
    table = [row("b", s, config, **{"val/accuracy": float(a)}) for s, a in enumerate(accuracies)]
    found = variance.calibrated(table, arm="b")
    assert np.mean(list(found["ratio"].values())) == pytest.approx(1, abs=0.15)
    digits = compose(["task=digits", "tracker=none"])
    ten = [{**r, "config": digits} for r in table]
    with pytest.raises(ValueError, match="'b' is not of two classes"):
        variance.calibrated(ten, arm="b")


def test_extremes_of_normal_accuracies():
    """The expected highest of ten normal numbers is 1.54 deviations above their mean."""
    rng = np.random.default_rng(6)
    config = compose(["task=digits", "tracker=none"])
    values = rng.normal(0.9, 0.01, 200)
    table = [row("a", s, config, **{"val/accuracy": v}) for s, v in enumerate(values)]
    found = {key: np.mean(list(v.values())) for key, v in variance.extremes(table, arm="a").items()}
    assert found["deviation"] == pytest.approx(0.01, rel=0.1)
    assert found["best"] == pytest.approx(0.01539, rel=0.1)
    assert found["worst"] == pytest.approx(0.01539, rel=0.1)
    assert found["noise"] == pytest.approx(0.01 / np.sqrt(0.09 / 360), rel=0.1)
    assert found["range"] == pytest.approx(np.ptp(values))
    with pytest.raises(ValueError, match="needs more than 10 seeds of 'a', has 10"):
        variance.extremes(table[:10], arm="a")


def test_decomposition_of_runs(tmp_path):
    """Its error is the one that the runs recorded."""
    table = []
    for seed in range(3):
        overrides = [
            *("task=tabular", "tracker=none", "trainer.device=cpu", "trainer.max_steps=3"),
            *("model.width=8", f"seed={seed}", f"outputs={tmp_path}"),
        ]
        config = compose(overrides)
        summary = start(config, overrides, Progress())
        own = {"run_dir": summary["run_dir"]}
        table.append({**row("a", seed, config, **summary["metrics"]), **own})
    found = variance.decomposition(table, arms=["a"])
    recorded = [1 - run["metrics"]["val/accuracy"] for run in table]
    assert np.mean(list(found["error"].values())) == pytest.approx(np.mean(recorded))


def first_batch(run):
    return run.batches.part(0, 0)


def test_sources_of_randomness_have_seeds_of_their_own():
    """What is given under `seeds` stays with another seed; all else changes."""
    base = ["task=code", "model=encoder", "model.width=16", "model.depth=1", "tracker=none"]
    base += ["model.heads=2", "task.context_length=16", "trainer.device=cpu", "task.path=json"]

    def made(*overrides):
        run = assemble(compose([*base, *overrides]))
        batch = first_batch(run)
        return next(run.model.parameters()).detach().clone(), batch

    weights, batch = made("seed=1")
    for source in ("init", "order", "batch"):
        fixed, other = made("seed=2", f"+seeds.{source}=1")
        assert fixed.equal(weights) == (source == "init")
        assert other["index"].equal(batch["index"]) == (source == "order")
    every = [f"+seeds.{source}=1" for source in ("init", "order", "batch")]
    same, all_same = made("seed=2", *every)
    assert same.equal(weights)
    assert all(all_same[key].equal(batch[key]) for key in ("input_ids", "labels", "index"))
    _, masked = made("seed=2", "+seeds.order=1")
    assert not masked["input_ids"].equal(batch["input_ids"])


def test_refusals():
    with pytest.raises(UsageError, match="no source of randomness 'ordr'; did you mean 'order'"):
        assemble(compose(["task=digits", "tracker=none", "+seeds.ordr=0"]))
    with pytest.raises(UsageError, match="between 0 and 4294967295, got -1"):
        assemble(compose(["task=digits", "tracker=none", "+seeds.order=-1"]))
    with pytest.raises(ValueError, match="no run of 'b' has ended"):
        variance.right([row("a", 0)], "b")
