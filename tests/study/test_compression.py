import math

import numpy as np
import pytest

from study.analyses.compression import at_bytes, ratio
from study.figures import over_bytes


def run(arm, seed, **metrics):
    return {"arm": arm, "seed": seed, "metrics": metrics, "lines": []}


def compressed(arm, seed, **steps):
    """A run of 1000 bytes and a loss of 1 before its steps, each with bytes and loss."""
    metrics = {"post/bytes": 1000.0, "val/loss": 1.0}
    for name, (size, loss) in steps.items():
        metrics |= {f"post/{name}/bytes": size, f"post/{name}/val/loss": loss}
    return run(arm, seed, **metrics)


TABLE = [
    compressed("a", 0, half=(500.0, 2.0), tenth=(100.0, 4.0)),
    compressed("a", 1, half=(250.0, 3.0), tenth=(100.0, 5.0)),
    compressed("b", 0, half=(400.0, 1.5)),
    run("c", 0),
]


def test_ratio():
    places = {"half": "a/half", "other": "b/half"}
    found = ratio(TABLE, places=places, to="a")
    assert found == {"half": {0: 0.5, 1: 0.25}, "other": {0: 0.4}}
    losses = ratio(TABLE, places=places, to="a/tenth", metric="val/loss")
    assert losses == {"half": {0: 0.5, 1: 0.6}, "other": {0: 0.375}}


def test_metric_at_a_size():
    curves = {"a": ["a", "a/half", "a/tenth"], "b": ["b/half", "b"]}
    size = math.sqrt(500 * 1000)
    found = at_bytes(TABLE, curves=curves, size=size)
    assert found["a"][0] == pytest.approx(1.5)
    share = math.log(1000 / size) / math.log(1000 / 250)
    assert found["a"][1] == pytest.approx(1 + 2 * share)
    assert found["b"] == {0: pytest.approx(1 + 0.5 * math.log(1000 / size) / math.log(2.5))}


def test_refusals():
    with pytest.raises(ValueError, match="places: no run of 'c' has 'post/half/bytes'"):
        ratio(TABLE, places={"x": "c/half"}, to="a")
    with pytest.raises(ValueError, match="size: b is from 400 to 1000 bytes"):
        at_bytes(TABLE, curves={"b": ["b", "b/half"]}, size=300)


def test_figure_has_a_line_with_a_point_for_each_place():
    drawn = over_bytes(TABLE, curves={"a": ["a/tenth", "a/half"], "b": ["b/half"]})
    lines = {
        line.get_label(): np.array(line.get_xydata()).tolist() for line in drawn.axes[0].get_lines()
    }
    assert lines == {"a": [[100, 4.5], [375, 2.5]], "b": [[400, 1.5]]}


def test_figure_of_what_each_seed_adds():
    drawn = over_bytes(TABLE, curves={"a": ["a/tenth"]}, above="a/half")
    (line,) = drawn.axes[0].get_lines()
    assert np.array(line.get_xydata()).tolist() == [[100, 2.0]]
