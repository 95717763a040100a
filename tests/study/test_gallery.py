import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from study.activations import activations, measure, measure_all
from study.gallery import braille
from techniques.activation.activation_zoo import ZOO
from tests.cli.invoke import invoke


@pytest.mark.parametrize(
    ("made", "mean", "variance"),
    [
        (nn.ReLU(), 1 / math.sqrt(2 * math.pi), 0.5 - 0.5 / math.pi),
        (nn.Identity(), 0.0, 1.0),
        (nn.GELU(), 0.5 / math.sqrt(math.pi), None),
        (nn.Softplus(), None, None),
    ],
)
def test_moments(made, mean, variance):
    """Closed forms, and a million draws."""
    found = measure("a", made)
    drawn = made(torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)))
    assert found.numbers["mean"] == pytest.approx(drawn.mean().item(), abs=0.005)
    assert found.numbers["variance"] == pytest.approx(drawn.var().item(), abs=0.005)
    if mean is not None:
        assert found.numbers["mean"] == pytest.approx(mean, abs=1e-5)
    if variance is not None:
        assert found.numbers["variance"] == pytest.approx(variance, abs=1e-5)


def test_slopes_are_those_of_the_values():
    found = measure("a", nn.SiLU())
    inside = slice(1, -1)
    numeric = np.gradient(found.y, found.x)
    assert found.slope[inside] == pytest.approx(numeric[inside], abs=1e-3)


def test_every_activation_technique_and_all_of_the_zoo():
    names = set(activations())
    assert {"golu", "hermite_activation", "pade_activation_unit"} | set(ZOO) <= names
    first, second = ({m.name: m.numbers["mean"] for m in measure_all()} for _ in range(2))
    assert first == second
    assert set(first) == names


def test_braille_draws_where_the_curve_is():
    """A line that rises from the lowest dot on the left to the highest on the right."""
    lines = braille(np.linspace(0.0, 1.0, 50), width=2, height=1, low=0.0, high=1.0)
    # Four columns of dots at heights 0 to 3: bits of the left and right columns of two cells.
    assert lines == [chr(0x2800 + 0x40 + 0x20) + chr(0x2800 + 0x02 + 0x08)]
    outside = braille(np.full(10, 5.0), width=3, height=2, low=0.0, high=1.0)
    assert set("".join(outside)) == {"\u2800"}


def test_show_activations(tmp_path):
    target = tmp_path / "new" / "picture.png"
    result = invoke("show", "activations", "--png", str(target))
    assert result.code == 0
    assert "golu" in result.out
    assert "mean 0.40 var 0.34" in result.out
    assert target.read_bytes().startswith(b"\x89PNG")
    result = invoke("show", "activations", "--png", str(target), "--json")
    listed = json.loads(result.out.splitlines()[-1])
    assert listed["path"] == str(target)
    assert next(a for a in listed["activations"] if a["name"] == "selu")["variance"] == (
        pytest.approx(1, abs=1e-3)
    )
    result = invoke("show", "golu", "--png", str(target))
    assert result.code == 2
    assert "--png: only with 'assay show activations or losses'" in result.err
