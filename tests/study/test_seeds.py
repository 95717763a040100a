import numpy as np
import pytest
from scipy import stats

from study.analyses import seeds
from training.assemble import build_task
from training.compose import compose
from training.progress import Progress
from training.train import start


def row(arm, seed, **metrics):
    return {"arm": arm, "seed": seed, "metrics": metrics}


def test_deviation_of_two_arms():
    """Of 400 normal numbers each, near the true ones, with a standard error near σ/√(2n)."""
    rng = np.random.default_rng(0)
    table = [row("a", s, x=v) for s, v in enumerate(rng.normal(0, 2, 400))]
    table += [row("b", s, x=v) for s, v in enumerate(rng.normal(5, 1, 400))]
    found = seeds.deviation(table, metric="x")
    assert set(found) == {"a", "b"}
    assert np.mean(list(found["a"].values())) == pytest.approx(2, rel=0.1)
    assert np.mean(list(found["b"].values())) == pytest.approx(1, rel=0.1)
    error = stats.sem(list(found["b"].values()))
    assert error == pytest.approx(1 / np.sqrt(800), rel=0.2)


def test_pseudo_values_of_a_mean_are_the_values():
    values = {3: 1.0, 5: 4.0, 9: 10.0}
    found = seeds.pseudo_values(values, lambda v: float(np.mean(v)), "a")
    assert found == pytest.approx(values)


def test_pseudo_values_of_the_variance_have_its_mean():
    values = dict(enumerate([1.0, 2.0, 4.0, 8.0]))
    found = seeds.pseudo_values(values, lambda v: float(np.var(v, ddof=1)), "a")
    assert np.mean(list(found.values())) == pytest.approx(np.var([1, 2, 4, 8], ddof=1))


def test_apart_counts_pairs():
    """0 and 1 differ in 1 of 4 columns, 0 and 2 in 2, 1 and 2 in 3."""
    rows = [np.array(r) for r in ([0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0])]
    assert seeds.apart(rows) == pytest.approx((1 + 2 + 3) / 3 / 4)


def test_predictions_are_the_last_models(tmp_path):
    """Their accuracy is the one that the run has recorded."""
    overrides = [
        *("task=tabular", "tracker=none", "trainer.device=cpu", "trainer.max_steps=3"),
        *("model.width=8", f"outputs={tmp_path}"),
    ]
    config = compose(overrides)
    summary = start(config, overrides, Progress())
    found = seeds.predictions({"config": config, "run_dir": summary["run_dir"]})
    labels = np.array(build_task(config["task"]).validation["labels"])
    assert (found == labels).mean() == pytest.approx(summary["metrics"]["val/accuracy"])


def test_refusals():
    table = [row("a", s, x=1.0) for s in (0, 1)]
    with pytest.raises(ValueError, match="arm 'a': needs three seeds, has 2"):
        seeds.deviation(table, metric="x")
