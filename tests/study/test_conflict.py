from types import SimpleNamespace

import numpy as np
import pytest
import torch

from study.probes.conflict import Conflict
from tests.techniques.gradients import microbatches
from tests.techniques.several_losses import Point, flat, gradients, objective
from training.objective import backprop


def test_cosines_of_a_known_gradient():
    """The run's is the sum of the parts', the second of which it is against."""
    model, recorded = Point(), {}
    whole, batches = objective(model), microbatches()
    backprop(whole, model, batches, torch.Tensor.backward)
    before = flat(model)[1]
    run = SimpleNamespace(
        step=3,
        device=torch.device("cpu"),
        objective=whole,
        wrapped=whole,
        model=model,
        microbatches=batches,
        record=recorded.update,
    )
    Conflict(every=3).on_gradients(run)
    assert not recorded
    Conflict(every=4).on_gradients(run)
    assert np.array_equal(flat(model)[1], before)
    rows = gradients()
    total = rows.sum(0)
    cosines = rows @ total / np.linalg.norm(rows, axis=1) / np.linalg.norm(total)
    found = [recorded[f"probe/cosine/{name}"] for name in ("loss", "first", "second")]
    assert found == pytest.approx(cosines.tolist(), rel=1e-10)
    assert recorded["probe/cosine"] == min(found)


def test_refuses_no_steps():
    with pytest.raises(ValueError, match="every"):
        Conflict(every=0)
