import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from study.analyses import averages
from study.probes.reconstruction import ReconstructionError
from techniques.callback.posthoc_ema import PowerEMA
from tests.cli.invoke import invoke
from training.errors import UsageError


def row(seed, short, long):
    values = {"0.05": short, "0.1": long}
    metrics = {f"post/posthoc_ema/{s}/val/loss": v for s, v in values.items()}
    return {"arm": "a", "seed": seed, "metrics": metrics | {"post/posthoc_ema/val/loss": 0.0}}


def test_length_is_chosen_on_the_other_seeds():
    """The means without seed 0 are 4.5 and 4, without 1 they are 3 and 3.5, without 2, 2.5 and
    3.5."""
    table = [row(0, 1.0, 3.0), row(1, 4.0, 4.0), row(2, 5.0, 4.0), {**row(3, 0, 0), "metrics": {}}]
    found = averages.chosen(table, arm="a")
    assert found["length"] == {0: 0.1, 1: 0.05, 2: 0.05}
    assert found["value"] == {0: 3.0, 1: 4.0, 2: 5.0}
    higher = averages.chosen(table, arm="a", direction="higher")
    assert higher["length"] == {0: 0.05, 1: 0.1, 2: 0.1}
    with pytest.raises(ValueError, match="fewer than two runs of 'b'"):
        averages.chosen(table, arm="b")
    with pytest.raises(ValueError, match="direction"):
        averages.chosen(table, arm="a", direction="up")


def test_error_of_a_reconstruction_by_hand(tmp_path):
    """One weight that is t at step t, by telescoped sums; a length that is tracked has no error."""
    layer = nn.Linear(1, 1, bias=False).double()
    kept, probe = PowerEMA((0.05, 0.1), every=5), ReconstructionError([0.05, 0.2])
    seen: dict[str, float] = {}
    run = SimpleNamespace(
        **{"objective": layer, "step": 0, "max_steps": 30, "folder": tmp_path, "main": True},
        callbacks={"posthoc_ema": kept},
        record=seen.update,
    )
    for part in (kept, probe):
        part.on_fit_start(run)
    for run.step in range(1, 31):
        with torch.no_grad():
            layer.weight.fill_(run.step)
        for part in (kept, probe):
            part.on_step_end(run)
    probe.on_eval_end(run)
    made = kept.reconstruct(run, 0.2)["weight"].item()
    edges = (np.arange(31) / 30) ** (probe.direct.exponents[0.2] + 1)
    tracked = float(np.diff(edges) @ np.arange(1, 31))
    expected = abs(made - tracked) / (30 - tracked)
    assert seen["probe/reconstruction/0.2"] == pytest.approx(expected, rel=1e-6)
    assert seen["probe/reconstruction/0.05"] < 1e-9


def test_it_is_recorded(tmp_path):
    probe = "study.probes.reconstruction.ReconstructionError,sigma_rel:[0.2]"
    result = invoke(
        *("run", "task=digits", "model=mlp", "model.width=8", "tracker=none", "trainer.device=cpu"),
        *("trainer.max_steps=4", "technique=posthoc_ema", "callbacks.posthoc_ema.every=2"),
        *(f"+callbacks.probe={{_target_:{probe}}}", f"outputs={tmp_path}", "--quiet", "--json"),
    )
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1])["metrics"]["probe/reconstruction/0.2"] > 0


def test_refusals():
    with pytest.raises(ValueError, match="sigma_rel: must be between"):
        ReconstructionError([0.5])
    with pytest.raises(UsageError, match="posthoc_ema is not a PowerEMA"):
        ReconstructionError([0.2]).on_fit_start(SimpleNamespace(callbacks={}))
