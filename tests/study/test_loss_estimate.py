import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import sem

from study.probes.loss_estimate import LossEstimate, errors
from tests.conformance.runs import fitted, tiny
from training.assemble import assemble
from training.errors import UsageError


def test_error_is_known():
    losses = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3
    assert errors(losses, np.array([3, 3]), None) == pytest.approx((1, 0))
    assert errors(losses, np.array([3, 0]), np.array([0.5, 1.0]))[0] == pytest.approx(1 / 3)


def test_standard_error_is_what_errors_are_by():
    """Their mean square over many uniform draws is that of the errors, Var(ℓ)/(m·ℓ̄²)."""
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=300)
    found = np.array([errors(losses, rng.integers(300, size=40), None) for _ in range(3000)])
    mean_square = (found**2).mean(0)
    assert mean_square[1] == pytest.approx(losses.var() / losses.mean() ** 2 / 40, rel=0.05)
    assert mean_square[0] == pytest.approx(mean_square[1], rel=0.1)


def test_is_the_error_under_the_other_runs_model(tmp_path, monkeypatch):
    technique = "cluster_sensitivity_sampling"
    pilot, _ = fitted(technique, tmp_path, "trainer.max_steps=1")
    (tmp_path / "config.yaml").write_text(json.dumps(pilot.config))
    run = assemble(tiny(technique, tmp_path)[0])
    recorded = {}
    monkeypatch.setattr(run, "record", recorded.update)
    LossEstimate(of=str(tmp_path)).on_fit_start(run)

    selection = run.transforms["sensitivity"].selection
    rows = selection.dataset.with_format("torch")[:]
    with torch.no_grad():
        x = (rows["pixels"] - run.task.mean) / run.task.std
        logits = pilot.model.eval()(pixel_values=x)["logits"]
        losses = F.cross_entropy(logits, rows["labels"], reduction="none").double().numpy()
    weighted = selection.weights * losses[selection.kept]
    assert recorded == pytest.approx(
        {
            "probe/loss_error": abs(weighted.mean() - losses.mean()) / losses.mean(),
            "probe/loss_standard_error": sem(weighted) / losses.mean(),
        },
        rel=1e-4,
    )


def test_needs_a_selection(tmp_path):
    run = assemble(tiny("vat", tmp_path)[0])
    with pytest.raises(UsageError, match="no selection"):
        LossEstimate(of="nowhere").on_fit_start(run)
