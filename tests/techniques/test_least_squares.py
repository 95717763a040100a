import numpy as np
import pytest
import torch
from scipy import linalg

from techniques.post.least_squares import solve
from training.compose import compose
from training.errors import UsageError
from training.progress import Progress
from training.train import start


def test_least_norm_by_scipys_pseudo_inverse():
    """More samples than features, and fewer."""
    rng = np.random.default_rng(0)
    for samples, width in ((40, 7), (7, 40)):
        features, labels = rng.normal(size=(samples, width)), rng.normal(size=samples)
        design = np.hstack([features, np.ones((samples, 1))])
        found = solve(torch.tensor(features), torch.tensor(labels)).numpy()
        assert found == pytest.approx(linalg.pinv(design) @ labels, abs=1e-10)


def run(tmp_path, *overrides):
    own = ["tracker=none", "trainer.device=cpu", "trainer.max_steps=1", f"outputs={tmp_path}"]
    own += ["+post.solve={_target_:techniques.post.least_squares.LeastSquares}", *overrides]
    return start(compose(own), own, Progress())["metrics"]


def test_a_student_that_is_wide_enough_learns_the_teacher(tmp_path):
    """On 128 samples a random perceptron of width 256 learns a smooth function to 1% of its
    variance, where one untrained is at 1."""
    metrics = run(
        tmp_path,
        *("task=teacher", "task.features=2", "task.samples=128", "task.validation=256"),
        *("model.width=256", "model.depth=1", "optimizer.lr=0"),
        "model.norm={_target_:torch.nn.Identity}",
    )
    assert metrics["val/loss"] > 0.5
    assert metrics["post/solve/val/loss"] < 0.01


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="a linear head of one output"):
        run(tmp_path, "task=digits")
