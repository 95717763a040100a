"""`assay fit` on points and on runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from study.fitting import shown
from tests.cli.invoke import invoke

POINTS = Path(__file__).parents[1] / "study" / "data" / "chinchilla.csv"


def fitted(*arguments):
    result = invoke("fit", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.fixture
def points(tmp_path):
    x = np.geomspace(10, 1e5, 12)
    rows = [f"{v},{2 + 3 * v**-0.3},made" for v in x]
    path = tmp_path / "points.csv"
    path.write_text("\n".join(["width,loss,note", *rows]))
    return path


def test_a_law_of_published_points(points, tmp_path):
    given = ("power", "--csv", str(points), "--x", "width", "--hold-out", "3", "--resamples", "5")
    found = fitted(*given, "--plot", str(tmp_path / "fit.png"))
    assert found["values"] == pytest.approx({"E": 2, "A": 3, "alpha": 0.3}, rel=1e-3)
    assert (found["rows"], found["held_out"]) == (9, 3)
    assert found["held_out_error"] < 1e-4
    assert found["intervals"]["alpha"] == pytest.approx([0.3, 0.3], rel=1e-2)
    assert (tmp_path / "fit.png").stat().st_size > 5000
    result = invoke("fit", *given, "--plot", str(tmp_path / "fit.png"))
    assert "L = E + A/x^alpha" in result.out
    assert "held out" in result.out


def test_tokens_of_parameters_and_compute(tmp_path):
    """A file with compute in place of tokens gives the same law."""
    table = np.genfromtxt(POINTS, delimiter=",", names=True)[::12]
    path = tmp_path / "compute.csv"
    rows = [f"{n:.9g},{6 * n * d:.9g},{loss:.9g}" for n, d, loss in table]
    path.write_text("\n".join(["parameters,compute,loss", *rows]))
    whole = tmp_path / "whole.csv"
    rows = [f"{n:.9g},{d:.9g},{loss:.9g}" for n, d, loss in table]
    whole.write_text("\n".join(["parameters,tokens,loss", *rows]))
    plot = ("--resamples", "0", "--plot", str(tmp_path / "fit.png"))
    first, second = (fitted("kaplan", "--csv", str(p), *plot) for p in (path, whole))
    assert first["objective"] == pytest.approx(second["objective"], rel=1e-4)


def test_a_law_of_runs(tmp_path):
    """Four widths of a network; the law of its width goes through their losses."""
    folders = []
    for width in (4, 8, 16, 32):
        given = ("task=digits", "tracker=none", "trainer.max_steps=30", f"model.width={width}")
        result = invoke("run", *given, f"outputs={tmp_path}", "--quiet", "--json")
        folders.append(json.loads(result.out.splitlines()[-1])["run_dir"])
    plot = ("--resamples", "0", "--plot", str(tmp_path / "fit.png"))
    found = fitted("power", "--runs", *folders, "--x", "model.width", *plot)
    assert found["rows"] == 4
    assert found["error"] < 0.1
    of_size = fitted("power", "--runs", *folders, "--x", "parameters", *plot, "--hold-out", "1")
    assert of_size["held_out"] == 1
    result = invoke("fit", "power", "--runs", *folders, "--x", "model.with", "--plot", "x.png")
    assert result.code == 2
    assert "--x: parameters, tokens, compute or a number's key" in result.err
    result = invoke("fit", "power", "--runs", *folders, "--metric", "val/los", "--x", "tokens")
    assert result.code == 2
    assert "did you mean 'val/loss'" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chinchila", "--csv", "{}"], "law: no 'chinchila'; did you mean 'chinchilla'"),
        (["power"], "give runs, or a file of points"),
        (["power", "--csv", "{}"], "no column of numbers 'x'"),
        (["power", "--csv", "{}", "--x", "widht"], "'widht'; did you mean 'width'"),
        (["power", "--csv", "{}", "--x", "width", "--hold-out", "12"], "below the 12 there are"),
        (["power", "--csv", "{}", "--x", "width", "--hold-out", "10"], "too few for 3 coordinates"),
        (["power", "--csv", "nowhere.csv"], "--csv nowhere.csv: cannot be read"),
    ],
)
def test_mistakes(arguments, message, points):
    result = invoke("fit", *(a.format(points) for a in arguments))
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_coefficients_are_shown_and_not_their_logarithms():
    from study import laws
    from study.fitting import fit

    x = np.geomspace(1, 100, 10)
    names = [name for name, _, _ in shown(fit(laws.find("power"), {"x": x}, 1 + 1 / x))]
    assert names == ["E", "A", "alpha"]
