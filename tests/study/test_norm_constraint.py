from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import softmax
from torch import nn

from study.probes.norm_constraint import NormConstraint
from techniques.callback.probing import training_batch
from training.assemble import assemble
from training.compose import compose

TINY = ("task=digits", "model.depth=0", "trainer.max_steps=3", "tracker=none")


def stub(weight, lr=0.1) -> Any:
    model = nn.Module()
    model.w = nn.Parameter(weight)
    return SimpleNamespace(model=model, optimizer=torch.optim.SGD([model.w], lr=lr))


def test_overshoot_is_measured_from_the_exponential_bound():
    """λ·max|w| − 1 starts at 3; with lr·λ = 0.2 its bounds are 2.4 and 1.92."""
    run, probe = stub(torch.tensor([[2.0, -1.0]])), NormConstraint(decay=2.0)
    probe.on_fit_start(run)
    for size, expected in ((1.5, -0.4), (1.56, 0.2)):
        probe.on_gradients(run)
        run.model.w.data = torch.tensor([[size, 0.0]])
        probe.on_step_end(run)
        assert probe.overshoot == pytest.approx(expected, abs=1e-6)
    again = NormConstraint(decay=2.0)
    again.load_state_dict(probe.state_dict())
    again.on_fit_start(run)
    assert again.bounds == probe.bounds
    assert again.overshoot == probe.overshoot


def test_matrices_that_start_within_must_stay():
    run, probe = stub(torch.tensor([[0.1, 0.1]])), NormConstraint(decay=2.0, p=2.0)
    probe.on_fit_start(run)
    run.model.w.data = torch.tensor([[0.6, 0.8]])
    probe.on_step_end(run)
    assert probe.overshoot == pytest.approx(1.0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_the_gap_is_what_the_best_point_within_would_gain(p):
    """max ⟨g, w − s⟩ over ‖s‖_q ≤ 1/λ by SciPy, with softmax regression's gradient by hand."""
    torch.manual_seed(0)
    run: Any = assemble(compose([*TINY]))
    recorded: dict[str, float] = {}
    run.record = recorded.update
    probe = NormConstraint(decay=4.0, p=p, samples=32)
    probe.on_fit_start(run)
    probe.on_step_end(run)
    probe.on_eval_end(run)
    batch, head = training_batch(run, 32), run.model.head
    x, w = batch["pixel_values"].flatten(1).double().numpy(), head.weight.detach().double().numpy()
    wrong = softmax(x @ w.T + head.bias.detach().numpy(), axis=1)
    wrong -= np.eye(10)[batch["labels"].numpy()]
    g, q = wrong.T @ x / 32, np.inf if p == 1 else p / (p - 1)
    unit = lambda s: s / np.linalg.norm(s, q) / 4.0  # noqa: E731
    if p == 1:  # a linear function of a box is least in a corner
        s = -np.sign(g.ravel()) / 4.0
    else:
        s = unit(minimize(lambda s: g.ravel() @ unit(s), -g.ravel(), method="L-BFGS-B").x)
    assert recorded["probe/gap"] == pytest.approx((g * w).sum() - g.ravel() @ s, rel=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="decay"):
        NormConstraint(decay=0.0)
    with pytest.raises(ValueError, match="p:"):
        NormConstraint(decay=1.0, p=0.5)
