import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from techniques.callback.posthoc_ema import PowerEMA, coefficients, correlation, exponent, snapshot
from techniques.post.posthoc_ema import PosthocEMA
from tests.cli.invoke import invoke
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.errors import EnvironmentFault, UsageError
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import fit

SIGMAS = (0.02, 0.05, 0.10, 0.20, 0.28)


def walk(folder, callback: PowerEMA, steps: int) -> tuple[np.ndarray, SimpleNamespace]:
    """A layer's weights at every step of a random walk that a callback follows, in float64."""
    layer = nn.Linear(4, 3, bias=False).double()
    run = SimpleNamespace(objective=layer, step=0, max_steps=steps, folder=folder, main=True)
    callback.on_fit_start(run)
    generator, seen = torch.Generator().manual_seed(0), []
    for run.step in range(1, steps + 1):
        with torch.no_grad():
            layer.weight.add_(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        seen.append(layer.weight.detach().numpy().copy())
        callback.on_step_end(run)
    return np.stack(seen), run


def direct(seen: np.ndarray, sigma: float) -> np.ndarray:
    """Step τ weighs (τ^(γ+1) − (τ − 1)^(γ+1)) / t^(γ+1): the product of the updates, telescoped."""
    power = exponent(sigma) + 1
    edges = (np.arange(len(seen) + 1) / len(seen)) ** power
    return np.einsum("t,tij->ij", np.diff(edges), seen)


def test_exponents_the_paper_names():
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_exponent_is_that_of_the_profiles_deviation(sigma):
    gamma = exponent(sigma)

    def moment(k):
        return quad(lambda x: x**k * (gamma + 1) * x**gamma, 0, 1, epsabs=1e-13)[0]

    assert np.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("a", [(30, 0.05), (100, 0.10)])
@pytest.mark.parametrize("b", [(70, 0.20), (100, 0.05)])
def test_correlation_is_the_profiles_integral(a, b):
    (s, f), (t, g) = ((step, exponent(sigma)) for step, sigma in (a, b))

    def product(x):
        return (f + 1) * x**f / s ** (f + 1) * (g + 1) * x**g / t ** (g + 1)

    found = correlation(*(np.float64(v) for v in (s, f, t, g)))
    expected = quad(product, 0, min(s, t), epsabs=1e-14, epsrel=1e-12)[0]
    assert found == pytest.approx(expected, rel=1e-10)
    assert found == pytest.approx(correlation(*(np.float64(v) for v in (t, g, s, f))), rel=1e-12)


def test_coefficients_minimise_the_distance_of_profiles():
    """Before they are made to sum to 1: against least squares on a fine grid."""
    sources = [(step, sigma) for step in (20, 40, 60) for sigma in (0.05, 0.1)]
    wanted = (60, 0.15)
    x = (np.arange(200_000) + 0.5) / 200_000 * 60

    def profile(step, sigma):
        gamma = exponent(sigma)
        return np.where(x < step, (gamma + 1) * (x / step) ** gamma / step, 0)

    matrix = np.stack([profile(*source) for source in sources], 1)
    expected = np.linalg.lstsq(matrix, profile(*wanted), rcond=None)[0]
    np.testing.assert_allclose(coefficients(sources, wanted), expected / expected.sum(), rtol=1e-3)


def test_tracked_average_is_the_power_functions(tmp_path):
    callback = PowerEMA(sigma_rel=(0.05, 0.2), every=1000)
    seen, _ = walk(tmp_path, callback, 50)
    for sigma, average in callback.averages.items():
        found = average.tensors["weight"].numpy()
        np.testing.assert_allclose(found, direct(seen, sigma), rtol=1e-10)


@pytest.mark.parametrize("sigma", [0.03, 0.075, 0.15, 0.25])
def test_reconstruction_is_near_the_average_itself(tmp_path, sigma):
    """At steps with and without a snapshot. A profile is only approximated: within 2% of how far
    the average is from the last weights."""
    for steps in (400, 395):
        callback = PowerEMA(every=10)
        seen, run = walk(tmp_path, callback, steps)
        found = callback.reconstruct(run, sigma)["weight"].numpy()
        expected = direct(seen, sigma)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected - seen[-1])
        assert error < 0.02


def test_reconstruction_of_what_is_tracked_is_that(tmp_path):
    callback = PowerEMA(every=10)
    seen, run = walk(tmp_path, callback, 40)
    found = callback.reconstruct(run, 0.05)["weight"].numpy()
    np.testing.assert_allclose(found, direct(seen, 0.05), rtol=1e-9)


def fitted(tmp_path, *overrides):
    few = ("trainer.max_steps=6", "callbacks.posthoc_ema.every=2", "trainer.log_every=1")
    run = assemble(tiny("posthoc_ema", tmp_path, *few, *overrides)[0])
    run.open(tmp_path)
    assert fit(run, NoTracker(), Progress()) == "completed"
    return run


def test_settings_reach_the_parts_and_the_model_has_the_average(tmp_path):
    run = fitted(
        tmp_path, "callbacks.posthoc_ema.sigma_rel=[0.07,0.2]", "post.posthoc_ema.sigma_rel=[0.07]"
    )
    callback = run.callbacks["posthoc_ema"]
    assert (list(callback.averages), callback.every) == ([0.07, 0.2], 2)
    for name, average in callback.averages[0.07].tensors.items():
        parameter = run.objective.get_parameter(name)
        torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-7)
    assert "post/posthoc_ema/val/loss" in run.last


def test_of_several_lengths_the_best_is_left(tmp_path):
    run = fitted(tmp_path, "post.posthoc_ema.sigma_rel=[0.05,0.1,0.25]")
    found = [run.last[f"post/posthoc_ema/{s}/val/loss"] for s in ("0.05", "0.1", "0.25")]
    assert len(set(found)) == 3
    assert run.last["post/posthoc_ema/val/loss"] == min(found)


def test_another_length_after_the_run_has_ended(tmp_path):
    overrides = [*tiny("posthoc_ema", tmp_path, "trainer.max_steps=4")[1]]
    first = invoke("run", *overrides, "callbacks.posthoc_ema.every=2", "--quiet", "--json")
    folder = json.loads(first.out.splitlines()[-1])["run_dir"]
    again = invoke(
        *("run", "--resume", folder, "post.posthoc_ema.sigma_rel=[0.2]", "--quiet", "--json")
    )
    assert again.code == 0, again.err
    metrics = [json.loads(r.out.splitlines()[-1])["metrics"] for r in (first, again)]
    name = "post/posthoc_ema/val/loss"
    assert metrics[0][name] != metrics[1][name]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"sigma_rel: must be between 0 and 0\.289, got 0\.3"):
        PowerEMA(sigma_rel=[0.3])
    with pytest.raises(ValueError, match="sigma_rel: expected at least one"):
        PosthocEMA(sigma_rel=[])
    with pytest.raises(ValueError, match="every: must be at least 1"):
        PowerEMA(every=0)
    callback = PowerEMA(every=10)
    _, run = walk(tmp_path, callback, 20)
    snapshot(tmp_path, 10, 0.05).unlink()
    with pytest.raises(EnvironmentFault, match="cannot read the snapshot"):
        callback.reconstruct(run, 0.2)
    with pytest.raises(UsageError, match=r"callbacks\.posthoc_ema is not a PowerEMA"):
        PosthocEMA()(SimpleNamespace(callbacks={}))
