import itertools

import numpy as np
import pytest
import torch

from techniques.post import grids
from techniques.post.adaround import (
    AdaRound,
    RandomRounding,
    annealed,
    fraction,
    rounded,
    soft,
    start,
)
from techniques.post.layers import linear_layers
from techniques.post.layers import matrix as matrix_of
from techniques.post.quantise import Quantise
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.errors import UsageError
from training.evaluate import evaluate


def weights(rows=5, columns=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_the_start_is_the_weight_itself():
    weight = weights()
    scale, zero = grids.minmax(weight, 4)
    found = rounded(weight, scale, zero, 4, soft(start(weight, scale)))
    inside = (codes := weight / scale + zero).ge(0) & codes.le(15)
    assert inside.float().mean() > 0.8  # a zero that was rounded leaves some outside
    torch.testing.assert_close(found[inside], weight[inside], rtol=0, atol=1e-12)


def test_up_where_the_fraction_is_a_half_is_rounding_to_nearest():
    weight = weights()
    scale, zero = grids.minmax(weight, 3)
    up = (start(weight, scale) >= 0).double()
    assert up.equal((fraction(weight, scale) >= 0.5).double())
    nearest = grids.quantised(weight, scale, zero, 3)
    torch.testing.assert_close(rounded(weight, scale, zero, 3, up), nearest, rtol=0, atol=1e-12)


def test_soft_is_the_stretched_sigmoid():
    v = np.linspace(-6, 6, 25)
    expected = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
    np.testing.assert_allclose(soft(torch.from_numpy(v)).numpy(), expected, rtol=0, atol=1e-15)
    assert expected[0] == 0
    assert expected[-1] == 1


def test_beta_is_none_then_falls_in_a_line():
    """As BRECQ counts: its first step is 1, and the penalty is left out before 0.2 · steps."""
    found = [annealed(step, 100, 0.2, (20.0, 2.0)) for step in range(100)]
    assert found[:19] == [None] * 19
    expected = [2 + 18 * (1 - (count - 20) / 80) for count in range(20, 101)]
    assert found[19:] == pytest.approx(expected, rel=1e-12)


def test_it_comes_near_the_best_of_all_roundings():
    """Correlated inputs, six weights: against a search of all 64, over six draws."""
    errors: dict[str, float] = {"learned": 0.0, "nearest": 0.0, "best": 0.0}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 1, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
        weight = weights(1, 6, seed).float()
        scale, zero = grids.minmax(weight, 3)
        step = AdaRound(bits=3, steps=300, batch=64, lr=3e-2, coefficient=0.3)
        wanted = x @ weight.T
        learned = step.learned(weight, scale, zero, x, wanted, generator) >= 0
        choices = torch.tensor(list(itertools.product((0, 1), repeat=6)))
        every = torch.cat([choices, learned, fraction(weight, scale) >= 0.5])
        value = rounded(weight, scale, zero, 3, every.float())
        found = (x @ value.T - wanted).square().mean((0, 1))
        errors["learned"] += float(found[-2])
        errors["nearest"] += float(found[-1])
        errors["best"] += float(found[:-2].min())
    assert errors["learned"] < 0.8 * errors["nearest"]
    assert errors["learned"] < 1.3 * errors["best"]


def run_of(tmp_path, *settings):
    config, _ = tiny("adaround", tmp_path, *settings)
    return assemble(config)


def test_overlay_and_a_quantised_run(tmp_path):
    run = run_of(tmp_path, "post.adaround.bits=3", "post.adaround.samples=40")
    (step,) = run.post.values()
    assert isinstance(step, AdaRound)
    assert (step.bits, step.samples, step.steps, step.beta) == (3, 40, 10, (20.0, 2.0))
    before = {name: matrix_of(layer) for name, layer in linear_layers(run.model).items()}
    step(run)
    assert 0 <= run.recorded["post/adaround/flipped"] < 1
    for name, layer in linear_layers(run.model).items():
        scale, _ = grids.minmax(before[name], 3)
        found = matrix_of(layer)
        assert (
            run.grids[f"{name}.weight"]
            .values(run.grids[f"{name}.weight"].codes(found))
            .equal(found)
        )
        assert ((found - before[name]).abs() <= scale * 1.0001).all()  # up or down, never further


def test_a_run_is_the_same_again(tmp_path):
    found = []
    for _ in range(2):
        run = run_of(tmp_path, "post.adaround.bits=2", "post.adaround.samples=20")
        next(iter(run.post.values()))(run)
        found.append(torch.cat([matrix_of(x).flatten() for x in linear_layers(run.model).values()]))
    assert found[0].equal(found[1])


def test_random_rounding_leaves_the_nearest_and_counts(tmp_path):
    run, other = run_of(tmp_path), run_of(tmp_path)
    RandomRounding(bits=3, draws=5)(run)
    Quantise(bits=3)(other)
    pairs = zip(linear_layers(run.model).values(), linear_layers(other.model).values())
    assert all(matrix_of(a).equal(matrix_of(b)) for a, b in pairs)
    best, mean, better = (
        run.recorded[f"post/random_rounding/{x}"] for x in ("best", "mean", "better")
    )
    assert best <= mean
    assert (better > 0) == (best < evaluate(run)["val/loss"])
    with pytest.raises(UsageError, match="val/loss"):
        RandomRounding(metric="val/los", draws=1)(run)


def test_random_rounding_is_unbiased():
    weight = weights(2, 3)
    scale, zero = grids.minmax(weight, 2)
    generator = torch.Generator().manual_seed(0)
    count = 20000
    many, spread = weight.repeat(count, 1), scale.repeat(count, 1)
    up = torch.rand(many.shape, generator=generator) < fraction(many, spread)
    drawn = rounded(many, spread, zero.repeat(count, 1), 2, up.double())
    mean = drawn.view(count, 2, 3).mean(0)
    inside = (codes := weight / scale + zero).ge(0) & codes.le(3)
    error = (mean - weight).abs() / scale
    assert (error[inside] < 4 * 0.5 / count**0.5).all()


@pytest.mark.parametrize(
    "settings", [{"bits": 1}, {"steps": 0}, {"warmup": 1.0}, {"lr": 0.0}, {"beta": [2.0]}]
)
def test_what_it_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdaRound(**settings)
