from typing import Any

import numpy as np
import pytest
import torch

from techniques.callback.active_layers import (
    LayerDropping,
    LayerStacking,
    linear_in_budget,
    skip,
)
from training.assemble import assemble
from training.compose import compose
from training.schedules import linear
from training.trainer import Step

TINY = (
    *("tracker=none", "trainer.device=cpu", "model.width=8", "model.depth=4", "model.heads=1"),
    *("task.path=tasks", "task.context_length=8", "trainer.batch_size=2", "trainer.max_steps=8"),
)


def tiny(*overrides):
    return assemble(compose([*TINY, *overrides]))


def blocks(run) -> Any:
    return run.model.transformer.blocks


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def working(run):
    """Which blocks do something to their input."""
    x = torch.randn(1, 8, 8)
    return [
        not torch.equal(block(x, None, run.model.transformer.position), x) for block in blocks(run)
    ]


def test_stacking_doubles_and_copies():
    run, stacking = tiny(), LayerStacking(at=[2, 3])
    run.callbacks["stacking"] = stacking
    stacking.on_fit_start(run)
    take_step, starts = Step(run), [flat(block) for block in blocks(run)]
    for step, count in enumerate((1, 1, 2, 4, 4)):
        before = [flat(block) for block in blocks(run)]
        take_step(run.batches[step])
        assert working(run) == [number < count for number in range(4)]
        after = [flat(block) for block in blocks(run)]
        for number in range(count, 4):  # those that wait are left alone
            torch.testing.assert_close(after[number], starts[number], rtol=0, atol=0)
        if step == 3:
            moves = [a - before[n % 2] for n, a in enumerate(after)]
            # Each is one step of Adam from the block it was copied of.
            assert all(0 < m.abs().max() < 0.01 for m in moves)
            assert {int(s["step"]) for s in run.optimizer.state.values()} == {1}


def test_stacking_refuses():
    with pytest.raises(ValueError, match="at:"):
        LayerStacking(at=[3, 2])
    with pytest.raises(ValueError, match=r"model\.depth"):
        LayerStacking(at=[1, 2, 3]).on_fit_start(tiny())


def test_dropping_is_as_likely_as_the_formula():
    """Over many draws, within four standard deviations; and evaluation has all blocks."""
    run, dropping = tiny(), LayerDropping(theta=0.4, gamma=5.0)
    run.step, draws = 3, 2000
    counts = np.zeros(4)
    torch.manual_seed(0)
    for _ in range(draws):
        dropping.on_batch(run)
        counts += ["forward" in vars(block) for block in blocks(run)]
    p = np.array([1, 2, 3, 4]) / 4 * 0.6 * (1 - np.exp(-5 * 3 / 8))
    assert (np.abs(counts / draws - p) < 4 * np.sqrt(p * (1 - p) / draws)).all()
    dropping.on_step_end(run)
    assert all(working(run))


def test_dropping_nothing_at_first_and_with_theta_1():
    assert LayerDropping().probabilities(4, 0.0).max() == 0
    assert LayerDropping(theta=1.0).probabilities(4, 1.0).max() == 0
    with pytest.raises(ValueError, match="theta"):
        LayerDropping(theta=2.0)
    with pytest.raises(ValueError, match="gamma"):
        LayerDropping(gamma=-1.0)


def test_a_skipped_block_is_the_identity_and_has_no_gradient():
    run = tiny()
    skip(blocks(run)[1], True)
    run.model(torch.randint(9, (1, 8)))["logits"].sum().backward()
    assert [any(p.grad is not None for p in b.parameters()) for b in blocks(run)] == [
        *(True, False, True, True)
    ]


def rates(schedule_of):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = schedule_of(optimizer, 10), []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_schedule_follows_what_is_spent():
    """Warm-up over what the first four steps take, and as in a schedule of equal steps after it."""
    keys = {"warmup": 0.2, "floor": 0.1, "steps": [4], "spent": [0.2]}
    found = rates(lambda *args: linear_in_budget(*args, **keys))
    expected = [0.5, 1.0, 1.5, 2.0, *(2 * (1 - 0.9 * np.arange(6) / 6))]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_of_equal_steps_the_schedule_is_the_linear_one():
    keys = {"warmup": 0.5, "floor": 0.0}
    found = rates(lambda *args: linear_in_budget(*args, **keys, steps=[], spent=[]))
    np.testing.assert_allclose(found, rates(lambda *args: linear(*args, **keys)), atol=1e-12)
