"""A small recipe, of runs that take a second."""

import pytest

SMALL = """\
paper: "1"
base: [task=digits, model=mlp, model.width=8, trainer.max_steps=60, trainer.eval_every=60,
       trainer.checkpoint_every=20, trainer.eval_samples=64, schedule.warmup=0,
       tracker=none, trainer.device=cpu]
arms:
  slow: [optimizer.lr=1e-6]
  fast: [optimizer.lr=3e-2]
seeds: [0, 1, 2]
claims: [fast < slow, val/accuracy(fast) > val/accuracy(slow)]
"""


@pytest.fixture
def small(tmp_path):
    """Path of the recipe's file."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path
