import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from study.probes.rollout import Rollout
from tests.cli.invoke import invoke
from training import checkpoint
from training.assemble import assemble
from training.compose import compose

SMALL = (
    *("task=pendulum", "task.trajectories=2", "task.horizon=5", "model.width=8", "tracker=none"),
    *("trainer.device=cpu", "trainer.max_steps=4", "trainer.eval_every=2", "schedule=constant"),
)
PROBE = "+callbacks.rollout={_target_:study.probes.rollout.Rollout}"
EMA = "+callbacks.ema={_target_:techniques.callback.averaging.EMA,decay:0.5,final:true}"


def test_records_what_the_average_would_get(tmp_path):
    """Listed before the average, it sees the weights that are in the last checkpoint."""
    overrides = [*SMALL, PROBE, EMA, f"outputs={tmp_path}"]
    result = invoke("run", *overrides, "--quiet", "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out.splitlines()[-1])
    run = assemble(compose(overrides))
    checkpoint.load_model_of(checkpoint.found(Path(summary["run_dir"]))[0], run.model)
    run.model.eval()
    rewards = run.task.rewards(lambda x: run.model(features=x)["logits"][:, 0].detach())
    metrics = summary["metrics"]
    assert metrics["probe/rollout/reward"] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert metrics["probe/rollout/worst"] == pytest.approx(np.min(rewards), rel=1e-5)


def test_needs_somewhere_to_act():
    with pytest.raises(ValueError, match="needs a task to act in"):
        Rollout().on_fit_start(SimpleNamespace(task=object()))
