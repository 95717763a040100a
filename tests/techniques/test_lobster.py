import math

import numpy as np
import pytest
import torch

from techniques.callback import lobster
from techniques.callback.lobster import Lobster, bisect, prunable, shrink, sparsity
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.compose import compose
from training.evaluate import evaluate
from training.metrics import read
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import Step, fit

PLAIN = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0")


def opened(tmp_path, *overrides):
    run = assemble(tiny("lobster", tmp_path, *overrides)[0])
    run.open(tmp_path)
    return run


def test_step_is_the_papers_update(tmp_path):
    """w − η·g, then minus λ·w·max(0, 1 − |g|), in NumPy; other parameters take the first alone."""
    run = opened(tmp_path, *PLAIN, "trainer.clip_norm=null", "callbacks.lobster.coefficient=0.25")
    with torch.no_grad():  # some gradients over 1, some below
        run.model.head.weight.mul_(30)
    before = {n: p.detach().double().numpy() for n, p in run.model.named_parameters()}
    before = {n: value.copy() for n, value in before.items()}
    gradients, rate = {}, run.optimizer.param_groups[0]["lr"]
    callback = run.callbacks["lobster"]

    class Watch:
        def on_gradients(self, run):
            gradients.update({n: p.grad.clone() for n, p in run.model.named_parameters()})

    run.callbacks["watch"] = Watch()
    Step(run)(run.batches[0])
    callback.on_step_end(run)
    sizes = np.concatenate([g.abs().flatten().numpy() for g in gradients.values()])
    assert (sizes > 1).any()
    assert ((sizes > 0) & (sizes < 1)).any()
    for name, parameter in run.model.named_parameters():
        g = gradients[name].double().numpy()
        expected = before[name] - rate * g
        if name in prunable(run.model):
            expected -= 0.25 * expected * np.maximum(0, 1 - np.abs(g))
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_shrinking_in_float64_and_at_gradients_that_overflow():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = 2 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
    gradient[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    expected = [
        w - 0.1 * w * (1 - abs(g)) if abs(g) < 1 else w
        for w, g in zip(weight.tolist(), gradient.tolist())
    ]
    shrink(weight, gradient, 0.1)
    assert weight.tolist() == pytest.approx(expected, abs=1e-10)


def test_linear_layers_are_pruned_and_norms_are_not(tmp_path):
    run = opened(tmp_path)
    assert set(prunable(run.model)) == {
        *(f"layers.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")),
        *("head.weight", "head.bias"),
    }


@pytest.mark.parametrize("mean", [0.1, 2.0])
def test_bisection_finds_where_a_known_loss_meets_the_bound(mean):
    """1 + T² is 1.05 at T = √0.05; the ends' losses are within 5% of the bound then."""
    asked = []

    def loss_at(threshold):
        asked.append(threshold)
        return 1 + threshold**2

    found = bisect(loss_at, 1.0, 0.05, (0.0, mean, 4.0))
    assert asked[0] == mean
    assert 0.95 * 1.05 < 1 + found**2 < 1.05 * 1.05
    assert len(asked) < 30


def test_bisection_ends_at_a_step():
    """At a threshold just below the one weight that matters."""
    found = bisect(lambda t: 9.0 if t > 0.3 else 1.0, 1.0, 0.05, (0.1, 0.2, 1.0))
    assert 0.3 - 1e-9 <= found <= 0.3


def test_a_plateau_restores_the_best_weights_and_prunes_for_good(tmp_path):
    extra = ("callbacks.lobster.patience=2", "callbacks.lobster.tolerance=0.5")
    run = opened(tmp_path, *PLAIN, *extra)
    callback = run.callbacks["lobster"]
    start = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.evaluation = 0, evaluate(run)
    loss = run.evaluation[1]["val/loss"]
    for worse in (1.0, 1.005, 1.02, 1.02):  # a hundredth worse is no worse
        run.evaluation = 0, {"val/loss": worse * loss}
        callback.on_eval_end(run)
        if worse == 1.0:
            with torch.no_grad():
                run.model.head.weight.add_(1)
    assert (callback.waited, callback.pruned) == (0, True)
    after = dict(run.model.named_parameters())
    for name in start:
        assert (after[name].eq(start[name]) | after[name].eq(0)).all()
    assert 0 < sparsity(run.model) == run.recorded["probe/sparsity"] < 1
    names = prunable(run.model)
    sizes = torch.cat([start[n].abs().flatten() for n in names])
    zero = torch.cat([after[n].eq(0).flatten() for n in names])
    assert sizes[zero].max() < sizes[~zero].min()
    assert run.recorded["val/loss"] == evaluate(run)["val/loss"] <= 1.6 * loss

    gone = {n: p.detach() == 0 for n, p in prunable(run.model).items()}
    resumed = Lobster(patience=2)
    resumed.load_state_dict(callback.state_dict())
    resumed.on_fit_start(run)
    run.callbacks["lobster"] = resumed
    Step(run)(run.batches[0])
    resumed.on_step_end(run)
    assert all((p[gone[n]] == 0).all() for n, p in prunable(run.model).items())


def test_without_tolerance_and_patience_every_evaluation_prunes(tmp_path):
    extra = ("callbacks.lobster.patience=0", "trainer.max_steps=30", "trainer.eval_every=10")
    run = opened(tmp_path, *PLAIN, *extra, "callbacks.lobster.coefficient=0.01")
    assert fit(run, NoTracker(), Progress()) == "completed"
    lines = [x for x in read(tmp_path / "metrics.jsonl") if "probe/sparsity" in x]
    shares = [line["probe/sparsity"] for line in lines]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert lines[-1]["val/loss"] == pytest.approx(evaluate(run)["val/loss"])


def test_composes():
    callback = compose(["technique=lobster", "task=digits"])["callbacks"]["lobster"]
    assert (callback["coefficient"], callback["tolerance"], callback["patience"]) == (
        1e-4,
        0.05,
        20,
    )


@pytest.mark.parametrize("key", ["coefficient", "tolerance", "patience"])
def test_refusals(key):
    with pytest.raises(ValueError, match=f"^{key}: must not be negative"):
        Lobster(**{key: -1})


def test_a_model_without_such_layers_is_refused(tmp_path, monkeypatch):
    run = opened(tmp_path)
    monkeypatch.setattr(lobster, "LAYERS", ())
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        Lobster().on_fit_start(run)
