"""Analyses of tables made by hand."""

import math

import numpy as np
import pytest

from study.analyses import attention, curves, layers, ranking, scaling
from study.analyses.quantisation import best_fraction


def run(arm="a", seed=0, lines=(), metrics=None, **config):
    """A row of the table."""
    given = {"trainer": {"max_steps": 100, "batch_size": 8}, **config}
    return {
        "arm": arm,
        "seed": seed,
        "lines": list(lines),
        "metrics": {"diverged": 0.0, "step": 100, **(metrics or {})},
        "config": given,
        "run_dir": None,
    }


FAILED = {**run(seed=9), "metrics": {}}


def test_steps_to():
    rising = [{"step": s, "val/accuracy": s / 100} for s in range(0, 100, 10)]
    table = [run(lines=rising), run(seed=1, lines=[{"step": 5, "loss": 1.0}]), FAILED]
    found = curves.steps_to(table, metric="val/accuracy", value=0.45)
    assert found == {"a": {0: 50, 1: 100}}
    falling = [run(lines=[{"step": s, "x": -s} for s in (1, 2, 3)])]
    assert curves.steps_to(falling, metric="x", value=-2, direction="lower") == {"a": {0: 2}}
    with pytest.raises(ValueError, match=r"^metric: no run has 'y'"):
        curves.steps_to(table, metric="y", value=0)
    with pytest.raises(ValueError, match=r"^direction"):
        curves.steps_to(table, metric="x", value=0, direction="up")


def test_gap():
    lines = [{"step": s, "train/loss": 10 / s, "val/accuracy": s / 90} for s in (10, 50, 90)]
    gap = curves.gap(
        [run(lines=lines)],
        first={"metric": "train/loss", "value": 0.2, "direction": "lower"},
        second={"metric": "val/accuracy", "value": 0.9},
    )
    assert gap == {"a": {0: 40}}


def alarming(losses, norms, signs, **keys):
    return run(
        lines=[
            {"step": i, "train/loss": x, "grad_norm": g, "probe/sign_diversity/x": d}
            for i, (x, g, d) in enumerate(zip(losses, norms, signs))
        ],
        **keys,
    )


def test_lead():
    """The loss doubles at step 6; signs collapse at 3, the gradient jumps at 5."""
    losses, norms = [4.0, 3.0, 2.0, 2.0, 2.0, 3.0, 9.0], [1.0] * 5 + [20.0, 99.0]
    signs = [0.3, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1]
    assert curves.lead([alarming(losses, norms, signs)]) == {
        "alignment": {0: 3.0},
        "gradient_norm": {0: 1.0},
    }
    # The alarm at 3 is a false one when it may be two steps early at most.
    assert curves.lead([alarming(losses, norms, signs)], window=2)["alignment"] == {0: 0.0}
    calm = alarming([1.0] * 7, [1.0] * 7, [0.4] * 7)
    assert curves.lead([calm]) == {"alignment": {}, "gradient_norm": {}}
    silent = alarming(losses, [1.0] * 7, [0.4] * 7)
    assert curves.lead([silent])["gradient_norm"] == {0: 0.0}
    gone = alarming([1.0, math.nan], [1.0] * 2, [0.4] * 2, metrics={"diverged": 1.0})
    assert curves.lead([gone])["alignment"] == {0: 0.0}


def test_tolerance():
    """Learning rates a decade apart; the best accuracy is 0.9 for one family, 0.5 for the other."""
    values = {"x": [0.2, 0.9, 0.895, 0.5], "y": [0.5, 0.5, 0.5, 0.1]}
    table = [
        run(f"{family}_{i}", metrics={"acc": value}, optimizer={"lr": 10.0**-i})
        for family, row in values.items()
        for i, value in enumerate(row)
    ]
    found = curves.tolerance(table, metric="acc", within=0.01)
    assert found == {"x": {0: pytest.approx(2.0)}, "y": {0: pytest.approx(3.0)}}
    table[1]["metrics"]["diverged"] = 1.0
    assert curves.tolerance(table, metric="acc", within=0.01)["x"] == {0: pytest.approx(1.0)}


def test_overload():
    heads = {f"probe/attention_entropy/{i}/{h}": e for i, h, e in [(0, 0, 3.9), (0, 1, 1.0)]}
    row = run(metrics=heads, task={"context_length": 64})  # log 64 is 4.16
    assert attention.overload([row]) == {"a": {0: 0.5}}
    assert attention.overload([row], above=0.2) == {"a": {0: 1.0}}
    with pytest.raises(ValueError, match="no probe/attention_entropy"):
        attention.overload([run(task={"context_length": 64})])


def test_lowest_entropy():
    lines = [
        {"step": 1, "probe/attention_entropy/0": 2.0, "probe/attention_entropy/1": 0.7},
        {"step": 2, "probe/attention_entropy/0": math.nan, "probe/attention_entropy/1/3": 0.1},
    ]
    assert attention.lowest_entropy([run(lines=lines), run(seed=1)]) == {"a": {0: 0.7}}


def test_distance_from_one():
    lines = [{"step": 1, "r/0": 2.0, "r/1": 0.25}, {"step": 2, "r/0": 9.0}]
    assert layers.distance_from_one([run(lines=lines)], metric="r") == {"a": {0: 1.5}}
    with pytest.raises(ValueError, match="positive"):
        layers.distance_from_one([run(lines=[{"step": 1, "r/0": 0.0}])], metric="r")
    with pytest.raises(ValueError, match="no 'q/<layer>'"):
        layers.distance_from_one([run(lines=lines)], metric="q")


def chinchilla(n, d):
    """The law of the paper's approach 3."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def test_a_known_law_is_found():
    table = []
    for i, (n, steps) in enumerate((n, s) for n in (1e5, 4e5, 2e6) for s in (1e3, 8e3, 5e4)):
        metrics = {"val/loss": chinchilla(n, 8 * steps), "parameters": n, "step": steps}
        table.append(run(f"arm{i}", metrics=metrics))
    big = {"val/loss": chinchilla(1e7, 8e6), "parameters": 1e7, "step": 1e6}
    table.append(run("big", metrics=big))
    found = scaling.fit(table, held_out="big")
    assert found["error"][0] < 1e-3
    assert found["r2"][0] > 0.9999
    assert found["alpha"][0] == pytest.approx(0.34, abs=0.01)
    assert found["beta"][0] == pytest.approx(0.28, abs=0.01)
    best = min(r["metrics"]["val/loss"] for r in table[:-1])
    assert found["nearest"][0] == pytest.approx(best / big["val/loss"] - 1)
    with pytest.raises(ValueError, match=r"^held_out: a fit needs six"):
        scaling.fit(table[4:], held_out="big")


def test_r2_is_one_less_the_unexplained_share():
    rng = np.random.default_rng(0)
    table = [
        run(f"arm{i}", metrics={"val/loss": 3 + rng.normal(), "parameters": n, "step": s})
        for i, (n, s) in enumerate((n, s) for n in (1e3, 1e5) for s in (10, 100, 1000))
    ]
    table.append(run("big", metrics={"val/loss": 3.0, "parameters": 1e7, "step": 1e4}))
    assert scaling.fit(table, held_out="big")["r2"][0] < 0.99


def test_ranks_are_those_of_the_worst_set():
    """Two seeds, two sets: a is first and third, then twice tied for the first two."""
    values = {
        ("a-x", 0): 1.0, ("b-x", 0): 2.0, ("c-x", 0): 3.0,
        ("a-y", 0): 9.0, ("b-y", 0): 2.0, ("c-y", 0): 3.0,
        ("a-x", 1): 1.0, ("b-x", 1): 1.0, ("c-x", 1): 3.0,
        ("a-y", 1): 4.0, ("b-y", 1): 4.0, ("c-y", 1): math.nan,
    }  # fmt: skip
    table = [run(arm, seed, metrics={"e": value}) for (arm, seed), value in values.items()]
    groups = {"a": ["a"], "both": ["a", "b"], "c": ["c"]}
    found = ranking.ranks(table, metric="e", groups=groups)
    assert found == {"a": {0: 3, 1: 1.5}, "both": {0: 2, 1: 1.5}, "c": {0: 3, 1: 3}}
    higher = ranking.ranks(table[:6], metric="e", groups={"c": ["c"]}, direction="higher")
    assert higher == {"c": {0: 2}}
    with pytest.raises(ValueError, match="no finished run of arm 'd-x'"):
        ranking.ranks(table, metric="e", groups={"a": ["d"]})
    with pytest.raises(ValueError, match=r"^direction"):
        ranking.ranks(table, metric="e", groups={}, direction="up")


def test_best_fraction_is_where_a_parabola_is_least():
    """Losses (log f − log f*)² are least at f*, whatever the grid; beyond it at its end."""
    grid = (0.1, 0.3, 0.6, 0.85)
    runs = []
    for budget, best in {"short": 0.2, "long": 0.5, "longest": 0.99}.items():
        for seed in (0, 1):
            for f in grid:
                loss = 1 + seed + (math.log(f) - math.log(best)) ** 2
                runs.append({"arm": f"{budget}{f}", "seed": seed, "metrics": {"val/loss": loss}})
    arms = {b: {f: f"{b}{f}" for f in grid} for b in ("short", "long", "longest")}
    found = best_fraction(runs, budgets=arms)
    assert found["short"] == pytest.approx({0: 0.2, 1: 0.2})
    assert found["long"] == pytest.approx({0: 0.5, 1: 0.5})
    assert found["longest"] == {0: 0.85, 1: 0.85}
    with pytest.raises(ValueError, match="no finished run of arm 'other'"):
        best_fraction(runs, budgets={"short": arms["short"] | {0.7: "other"}})


def test_oscillation():
    """By hand: errors 2, 4, 2, 4 around −1 from the second half on, which change by 2 each."""
    lines = [{"step": 10, "x": 99.0}, {"step": 45, "x": -77.0}]
    lines += [{"step": 50 + k, "x": -3.0 - 2 * (k % 2), "y": 5.0} for k in range(4)]
    found = curves.oscillation([run(lines=lines), FAILED], metric="x", best=-1.0)
    assert found == {"a": {0: pytest.approx(2 / 3)}}
    assert curves.oscillation([run(lines=lines)], metric="y") == {"a": {0: 0.0}}
    with pytest.raises(ValueError, match=r"^metric: no run has 'z'"):
        curves.oscillation([run(lines=lines)], metric="z")
