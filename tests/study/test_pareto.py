import pytest

from study.analyses.pareto import hypervolume, lowest


def run(arm, seed, loss=None, bound=None, lines=()):
    metrics = {} if loss is None else {"loss": loss, "bound": bound}
    return {"arm": arm, "seed": seed, "metrics": metrics, "lines": list(lines)}


def test_area_by_hand():
    """In units of the seed's ranges, 0 to 4 and 0 to 10, the arms are at these places."""
    places = {"a": (0, 1), "b": (0.5, 0.5), "c": (0.75, 0.75), "d": (1, 0), "e": (0.25, 0.25)}
    table = [run(arm, 3, 4 * x, 10 * y) for arm, (x, y) in places.items()]
    groups = {"corners": ["a", "d"], "steps": ["a", "b", "d"], "hidden": ["b", "c"], "best": ["e"]}
    found = hypervolume(table, metrics=["loss", "bound"], groups=groups)
    expected = {"corners": 0, "steps": 0.25, "hidden": 0.25, "best": 0.5625}
    assert {group: values[3] for group, values in found.items()} == pytest.approx(expected)


def test_logarithm():
    table = [run("a", 0, 1.0, 1.0), run("b", 0, 10.0, 0.0), run("c", 0, 100.0, 0.5)]
    found = hypervolume(table, metrics=["loss", "bound"], groups={"b": ["b"]}, log=["loss"])
    assert found["b"][0] == pytest.approx(0.5)


def test_refusals():
    table = [run("a", 0, 1.0, 1.0), run("b", 0)]
    with pytest.raises(ValueError, match="expected two"):
        hypervolume(table, metrics=["loss"], groups={})
    with pytest.raises(ValueError, match="arm 'b'"):
        hypervolume(table, metrics=["loss", "bound"], groups={"g": ["a", "b"]})


def test_lowest_moment():
    lines = [{"step": 1, "cosine": 0.3}, {"step": 2}, {"step": 3, "cosine": -0.1}]
    table = [run("a", 0, 1.0, 1.0, lines), run("b", 0, 1.0, 1.0)]
    assert lowest(table, metric="cosine") == {"a": {0: -0.1}}
