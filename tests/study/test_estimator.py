import numpy as np
import pytest
import torch
from torch import nn

from study import figures
from study.analyses import estimators
from study.probes.estimator import Estimator, Moments, measure
from study.probes.flops import GradientFlops
from techniques.callback.probing import exact
from tests.cli.invoke import lines
from training.assemble import assemble
from training.compose import compose
from training.data import move
from training.objective import backprop

DIGITS = (
    *("task=digits", "tracker=none", "trainer.device=cpu", "trainer.max_steps=4"),
    *("trainer.log_every=1", "model.width=32", "trainer.eval_every=4", "trainer.eval_samples=32"),
    *("trainer.batch_size=16", "trainer.accumulate=2", "schedule.warmup=0"),
)
PROBE = "+callbacks.estimator={_target_:study.probes.estimator.Estimator,draws:3,batches:2}"


@pytest.fixture
def run():
    """A run about to take its first step, and its exact gradient."""
    torch.manual_seed(0)
    found = assemble(compose([*DIGITS]))
    found.microbatches = [move(batch, found.device) for batch in found.batches[0]]
    found.batch = found.microbatches[-1]
    found.objective.train()
    return found


def gradient_of(run, microbatches):
    """By `torch.autograd.grad` of the mean loss, in float64."""
    parameters = list(run.objective.parameters())
    total = sum(run.objective(batch).total * batch["share"] for batch in microbatches)
    grads = torch.autograd.grad(total, parameters)
    return torch.cat([g.flatten() for g in grads]).double().numpy()


def test_noise_of_known_variance(run):
    """N(0, σ²) on n numbers: variance nσ²/‖g‖², and a bias of its noise floor."""
    run.gradient = assemble(
        compose([*DIGITS, "technique=gradient_noise", "gradient.eta=0.01"])
    ).gradient
    run.gradient.load_state_dict({"step": 9})
    norm = np.linalg.norm(gradient_of(run, run.microbatches))
    size = sum(p.numel() for p in run.objective.parameters())
    found = measure(run, draws=50)
    expected = size * 0.01 / 10**0.55 / norm**2
    # The draws' own spread: √(2 / (50 n)), with n above 3000, is 0.4%.
    assert found["estimator/variance"] == pytest.approx(expected, rel=0.02)
    assert found["estimator/bias_error"] == pytest.approx((expected / 50) ** 0.5, rel=0.01)
    assert found["estimator/bias"] == pytest.approx((expected / 50) ** 0.5, rel=0.06)
    assert found["estimator/cosine"] == pytest.approx((1 + expected / 50) ** -0.5, abs=0.02)
    assert "estimator/batch_variance" not in found
    assert run.gradient.state_dict() == {"step": 9}
    assert run.gradient.seed == run.config["seed"]


@pytest.mark.parametrize(("factor", "cosine"), [(0.7, 1.0), (-0.5, -1.0)])
def test_scaled_gradient(run, factor, cosine):
    """c·g has the bias |c − 1| and no variance."""

    def scaled(objective, model, microbatches, backward):
        return backprop(objective, model, microbatches, lambda loss: backward(factor * loss))

    run.gradient = scaled
    found = measure(run, draws=2)
    assert found["estimator/bias"] == pytest.approx(abs(factor - 1), rel=1e-5)
    assert found["estimator/variance"] == pytest.approx(0, abs=1e-20)
    assert found["estimator/cosine"] == pytest.approx(cosine, rel=1e-6)


def test_variance_of_batches(run):
    """Against NumPy's variance of gradients by `torch.autograd.grad`."""
    found = measure(run, draws=2, batches=5)
    assert found["estimator/bias"] == found["estimator/variance"] == 0
    others = [[move(part, run.device) for part in run.batches[k]] for k in range(1, 6)]
    rows = np.stack([gradient_of(run, batch) for batch in others])
    norm = np.linalg.norm(gradient_of(run, run.microbatches))
    expected = rows.var(0, ddof=1).sum() / norm**2
    assert found["estimator/batch_variance"] == pytest.approx(expected, rel=1e-5)


def test_moments_are_numpys():
    rows = np.random.default_rng(0).normal(3, 2, (7, 11))
    moments = Moments()
    for row in rows:
        moments.add(torch.from_numpy(row))
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), rtol=1e-13)
    assert moments.variance == pytest.approx(rows.var(0, ddof=1).sum(), rel=1e-13)


class Doubled(nn.Linear):
    """Its gradient is twice the exact one, unless told."""

    exact = False

    def forward(self, x):
        weight = self.weight if self.exact else 2 * self.weight - self.weight.detach()
        return nn.functional.linear(x, weight, self.bias)


def test_layers_are_told_to_be_exact(run):
    norm = np.linalg.norm(gradient_of(run, run.microbatches))
    head = run.model.head
    doubled = Doubled(head.in_features, head.out_features)
    doubled.load_state_dict(head.state_dict())
    run.model.head = doubled
    found = measure(run, draws=2)
    run.model.head = head
    with exact(run.model):
        backprop(run.wrapped, run.model, run.microbatches, torch.Tensor.backward)
    expected = head.weight.grad.double().norm().item() / norm
    assert found["estimator/bias"] == pytest.approx(expected, rel=1e-5)
    assert doubled.exact is False


@pytest.mark.parametrize(
    "overrides",
    [
        ("technique=gradient_noise",),
        ("technique=sam", "+data.transforms.x={_target_:tasks.transforms.subset,samples:40}"),
        ("model=vit", "model.depth=1", "model.heads=2", "model.dropout=0.5"),
    ],
)
def test_a_run_goes_on_as_without_it(tmp_path, overrides):
    with_ = lines(tmp_path / "a", *DIGITS, *overrides, PROBE)
    without = lines(tmp_path / "b", *DIGITS, *overrides)
    measured = [
        {k: line.pop(k) for k in list(line) if k.startswith("estimator/")} for line in with_
    ]
    assert [bool(found) for found in measured] == [True, False, True, True]
    assert set(measured[0]) == {
        *("estimator/bias", "estimator/bias_error", "estimator/variance"),
        *("estimator/cosine", "estimator/batch_variance", "estimator/seconds"),
    }
    assert with_ == without
    if "model=vit" in overrides:  # dropout is not the estimator's noise
        assert all(found["estimator/bias"] == 0 for found in measured if found)


def test_refusals():
    for keys in ({"at": [1.5]}, {"draws": 1}, {"batches": 1}):
        with pytest.raises(ValueError, match=f"^{next(iter(keys))}"):
            Estimator(**keys)


def test_flops_of_gradients(tmp_path):
    """A linear layer of m to n on b rows: 2bmn forward and for its weight, and for its input where
    there is one below. Every third step of 4 stands for itself and those to come."""
    probe = "+callbacks.f={_target_:study.probes.flops.GradientFlops,every:3}"
    found = lines(tmp_path, *DIGITS, "model.depth=1", probe, PROBE)[-1]
    a_step = 2 * 16 * (2 * 64 * 32 + 3 * 32 * 10)
    assert found["probe/gradient_flops"] == 4 * a_step
    counted = GradientFlops()
    counted.load_state_dict({"total": 7})
    assert counted.state_dict() == {"total": 7}
    with pytest.raises(ValueError, match=r"^every"):
        GradientFlops(every=0)


def run_of(arm, seed, flops, measured=(), **metrics):
    return {
        "arm": arm,
        "seed": seed,
        "metrics": {"probe/gradient_flops": flops}
        | {f"estimator/{k}": v for k, v in metrics.items()},
        "lines": [{"step": n, "m": value} for n, value in enumerate(measured)],
    }


def test_analyses():
    table = [
        run_of("exact", 0, 100.0, variance=0.0, batch_variance=2.0),
        run_of("ours", 0, 40.0, measured=[5.0, 5.0], variance=0.5, batch_variance=2.0),
        run_of("ours", 1, 40.0),
    ]
    found = estimators.flops(table, baseline="exact", measuring="m")
    assert found == {"exact": {0: 1.0}, "ours": {0: 0.5}}
    assert estimators.noise(table) == {"exact": {0: 0.0}, "ours": {0: 0.25}}
    with pytest.raises(ValueError, match=r"^baseline"):
        estimators.flops(table, baseline="other")


def test_figure():
    line = {f"estimator/{k}": 0.1 for k in ("bias", "bias_error", "variance", "batch_variance")}
    table = [{"arm": a, "seed": s, "lines": [{"step": 1, **line}]} for a in "ab" for s in (0, 1)]
    panels = figures.estimator(table).axes
    assert [len(axes.lines) for axes in panels] == [4, 4]
    assert panels[0].get_ylabel() == "bias (dotted: bias error)"
