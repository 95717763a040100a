"""Pictures of calibration, of tables made by hand and of a trained run."""

import numpy as np
import pytest

from study.analyses import calibration
from training.compose import compose
from training.progress import Progress
from training.train import ensure

TINY = [
    *("task=digits", "model.width=8", "trainer.max_steps=4", "optimizer.lr=3e-2", "tracker=none"),
    *("trainer.device=cpu", "trainer.eval_samples=null", "schedule.warmup=0"),
]


def row(arm, prefix, **metrics):
    return {"arm": arm, "seed": 0, "metrics": {f"post/{prefix}/{k}": v for k, v in metrics.items()}}


def test_reliability_is_the_accuracy_by_confidence(tmp_path):
    step = "+post.temperature={_target_:techniques.post.temperature.Temperature,share:0.25}"
    given = [*TINY, step, f"outputs={tmp_path}"]
    summary = ensure(compose(given), given, Progress())
    run = {
        **{"arm": "a", "seed": 0, "config": compose(given)},
        **{"metrics": summary["metrics"], "run_dir": summary["run_dir"]},
    }
    drawn = calibration.reliability([run], arms={"A": "a"}, bins=15)
    bars, scaled, shares, _ = drawn.axes
    assert [axes.get_title() for axes in (bars, scaled)] == ["A", "A, T fitted"]
    heights = [[bar.get_height() for bar in axes.patches] for axes in (bars, shares)]
    accuracy, share = np.array(heights)
    assert share.sum() == pytest.approx(1)
    before, after = calibration._confidences(run)
    assert before.shape == (2, 270)
    assert accuracy @ share == pytest.approx(before[1].mean())
    assert (before[1] == after[1]).all()
    for (confidence, correct), name in ((before, "before_ece"), (after, "ece")):
        gaps = 0.0
        for low in np.arange(15) / 15:
            inside = (confidence > low) & (confidence <= low + 1 / 15)
            gaps += abs((correct - confidence)[inside].sum()) / 270
        assert gaps == pytest.approx(summary["metrics"][f"post/temperature/{name}"], abs=1e-6)
    with pytest.raises(ValueError, match=r"no finished run of 'b' has post.temperature"):
        calibration.reliability([run], arms={"B": "b"})


def test_risks_by_the_number_of_samples():
    rows = [
        row(
            *(f"a_{n}", "conformal_risk_control"),
            **{"samples": n, "risk": 0.1 - 1 / n, "size": 2.0, "naive_risk": 0.1, "naive_size": 1},
        )
        for n in (50, 20)
    ]
    risk, size = calibration.risks([*rows, {"arm": "a", "metrics": {}}], alpha=0.1).axes
    assert [list(line.get_ydata()) for line in risk.lines[:2]] == [[0.05, 0.08], [0.1, 0.1]]
    assert list(size.lines[0].get_xdata()) == [20, 50]
    with pytest.raises(ValueError, match=r"have no post.conformal_risk_control"):
        calibration.risks([{"arm": "a", "metrics": {}}], alpha=0.1)


def test_predictions_over_what_they_are_of():
    metrics = {"blur/accuracy": 0.8, "blur/ac": 0.9, "turn/accuracy": 0.4, "turn/ac": 0.5}
    table = [row("a", "atc_accuracy_prediction", **metrics, **{"error/ac": 0.1})]
    table[0]["metrics"]["post/atc_accuracy_prediction/val/accuracy"] = 0.95
    (axes,) = calibration.predicted(table, ways={"average": "ac"}).axes
    points = list(zip(axes.lines[0].get_xdata(), axes.lines[0].get_ydata()))
    assert points == [(0.8, 0.9), (0.4, 0.5)]
    with pytest.raises(ValueError, match=r"have no post.atc_accuracy_prediction"):
        calibration.predicted([{"arm": "a", "metrics": {}}], ways={"average": "ac"})
