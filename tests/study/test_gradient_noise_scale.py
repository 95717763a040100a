import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from study.analyses import large_batch
from study.probes.gradient_noise_scale import GradientNoiseScale, divided, estimates, measure
from study.probes.target import Target
from tests.study.test_probes import DIGITS, lines
from training.objective import Objective

DIM, SIGMA = 5, 0.7
OFF = torch.linspace(-0.5, 1.0, DIM, dtype=torch.float64)  # w − w*


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(OFF.clone())

    def forward(self, features):
        return {"logits": features @ self.w}


def made(microbatches):
    """What the probe sees of a run that regresses y = ε, so that w* is 0."""
    model = Linear()
    objective = Objective(
        model,
        lambda outputs, batch: (outputs["logits"] - batch["labels"]).square() / 2,
        lambda losses, outputs, batch: losses.mean(),
        {},
        frozenset({"features"}),
    )
    accelerator = SimpleNamespace(num_processes=1, autocast=contextlib.nullcontext)
    return SimpleNamespace(
        model=model,
        objective=objective,
        accelerator=accelerator,
        microbatches=microbatches,
        device=torch.device("cpu"),
    )


def drawn(rows):
    x = torch.randn(rows, DIM, dtype=torch.float64)
    return {"features": x, "labels": SIGMA * torch.randn(rows, dtype=torch.float64)}


def test_unbiased_for_a_linear_regression():
    """With x ~ N(0, I) the mean gradient is w − w*, and Σ has the trace (d + 1)‖w − w*‖² + dσ²."""
    torch.manual_seed(0)
    run = made([drawn(6), drawn(6)])
    found = []
    for _ in range(1500):
        run.microbatches = [drawn(6), drawn(6)]
        found.append(measure(run, 3))
    mean, error = np.mean(found, 0), np.std(found, 0) / len(found) ** 0.5
    square = OFF.square().sum().item()
    expected = np.array([square, (DIM + 1) * square + DIM * SIGMA**2])
    assert np.all(np.abs(mean - expected) < 4 * error)
    assert np.all(error < 0.05 * expected)


def test_measurement_is_that_of_the_samples_gradients():
    """By NumPy; five rows make two parts of two."""
    torch.manual_seed(1)
    batches = [drawn(5), drawn(5)]
    x = np.stack([b["features"].numpy()[:4] for b in batches]).reshape(4, 2, DIM)
    y = np.stack([b["labels"].numpy()[:4] for b in batches]).reshape(4, 2)
    parts = ((x @ OFF.numpy() - y)[..., None] * x).mean(1)
    small, big = (parts**2).sum(1).mean(), (parts.mean(0) ** 2).sum()
    expected = (8 * big - 2 * small) / 6, (small - big) / (1 / 2 - 1 / 8)
    assert measure(made(batches), 2) == pytest.approx(expected, rel=1e-10)
    # Without noise both are the mean's square; without a mean tr Σ is s times the small one.
    assert estimates(3.0, 3.0, 2, 8) == pytest.approx((3.0, 0.0))
    assert estimates(3.0, 0.75, 2, 8) == pytest.approx((0.0, 6.0))


def test_ratio_of_averages(monkeypatch):
    values = iter([(1.0, 8.0), (3.0, 2.0), (-9.0, 1.0)])
    monkeypatch.setattr(
        "study.probes.gradient_noise_scale.measure", lambda run, parts: next(values)
    )
    probe, recorded = GradientNoiseScale(every=1, decay=0.5), []
    run = SimpleNamespace(step=0, record=recorded.append)
    for _ in range(3):
        probe.on_batch(run)
    assert recorded[0]["probe/noise_scale"] == pytest.approx(8.0)
    assert recorded[1]["probe/noise_scale"] == pytest.approx((8 / 4 + 2 / 2) / (1 / 4 + 3 / 2))
    assert "probe/noise_scale" not in recorded[2]
    again = GradientNoiseScale(every=1, decay=0.5)
    again.load_state_dict(probe.state_dict())
    assert (again.square, again.noise) == (probe.square, probe.noise)


def test_leaves_no_trace_and_training_ends_at_the_target(tmp_path):
    noise = (
        "+callbacks.noise={_target_:study.probes.gradient_noise_scale.GradientNoiseScale,every:2}"
    )
    target = "+callbacks.target={_target_:study.probes.target.Target,value:99}"
    plain = lines(tmp_path / "a", *DIGITS)
    found = lines(tmp_path / "b", *DIGITS, noise)
    assert ["probe/noise_scale" in line for line in found] == [True, False, True]
    assert found[0]["probe/gradient_noise"] > 0
    kept = [{k: v for k, v in line.items() if not k.startswith("probe/")} for line in found]
    assert kept == plain
    ended = lines(tmp_path / "c", *DIGITS, target, "trainer.eval_every=1")
    assert ended[-1]["step"] == 1


def runs(seed, s_min, e_min, noise):
    """Of batches that follow the hyperbola, and one that never got there."""
    found = []
    for batch in (8, 32, 128, 512, 2048):
        steps = s_min + e_min / batch
        pairs = [
            {"probe/gradient_noise": noise * k, "probe/gradient_square": 1.0} for k in (1, 2, 3)
        ]
        config = {"trainer": {"batch_size": batch, "max_steps": 10_000}}
        metrics = {"step": steps, "diverged": 0.0}
        found.append({"seed": seed, "config": config, "metrics": metrics, "lines": pairs})
    late = {"step": 10_000, "diverged": 0.0}
    config = {"trainer": {"batch_size": 4096, "max_steps": 10_000}}
    return [*found, {"seed": seed, "config": config, "metrics": late, "lines": []}]


def test_tradeoff_of_a_hyperbola():
    law = large_batch.tradeoff([*runs(0, 20.0, 4000.0, 50.0), *runs(1, 50.0, 1000.0, 10.0)])
    assert law["critical"] == pytest.approx({0: 200.0, 1: 20.0})
    assert law["s_min"] == pytest.approx({0: 20.0, 1: 50.0})
    assert law["e_min"] == pytest.approx({0: 4000.0, 1: 1000.0})
    assert law["r2"] == pytest.approx({0: 1.0, 1: 1.0})
    assert law["noise"] == pytest.approx({0: 100.0, 1: 20.0})
    assert law["decades"] == pytest.approx({0: np.log10(2), 1: 0.0}, abs=1e-6)
    assert law["growth"] == pytest.approx({0: 3.0, 1: 3.0})
    with pytest.raises(ValueError, match="three runs"):
        large_batch.tradeoff(runs(0, 20.0, 4000.0, 50.0)[3:])


def test_refusals():
    for keys, message in (
        ({"every": 0}, "every"),
        ({"parts": 1}, "parts"),
        ({"decay": 1.0}, "decay"),
    ):
        with pytest.raises(ValueError, match=f"^{message}: "):
            GradientNoiseScale(**keys)
    with pytest.raises(ValueError, match=r"^parts: a micro-batch of 3"):
        divided(drawn(3), 4)
    with pytest.raises(ValueError, match=r"^direction"):
        Target(1.0, direction="up")
