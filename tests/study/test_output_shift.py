"""The shift of outputs on another task, against SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from study.probes.output_shift import OutputShift
from tasks.code import code
from tasks.fetch import fetch
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.trainer import Step

TINY = [
    *("task.path=json", "task.context_length=8", "model.width=8", "model.depth=1", "model.heads=2"),
    *("tracker=none", "trainer.device=cpu", "schedule.warmup=0", "optimizer.lr=0.1"),
]
DIGITS = list(range(48, 58))


def elsewhere(**keys):
    return code(path="asyncio", context_length=8, **keys)


def said(run, samples):
    """Logits and labels of every position of the samples."""
    windows = elsewhere().validation
    rows = torch.arange(samples) * len(windows) // samples
    tokens = fetch(windows, rows)["tokens"].long()
    with torch.no_grad():
        logits = run.model.eval()(input_ids=tokens[:, :-1])["logits"]
    return logits.double().flatten(0, 1).numpy(), tokens[:, 1:].flatten().numpy()


def test_equals_scipy():
    run = assemble(compose(TINY))
    probe = OutputShift(elsewhere, samples=100, tokens=DIGITS)
    probe.on_fit_start(run)
    before = softmax(said(run, 100)[0], axis=1).mean(0)
    step = Step(run)
    for number in range(5):
        step(run.batches[number])
    probe.on_eval_end(run)
    logits, labels = said(run, 100)
    p = softmax(logits, axis=1)
    found = run.recorded
    assert found["probe/output_shift"] == pytest.approx(entropy(p.mean(0), before), rel=1e-9)
    assert found["probe/output_shift"] > 0.1
    assert found["probe/token_bias"] == pytest.approx(p[:, DIGITS].sum(1).mean(), rel=1e-9)
    assert found["probe/token_bias_max"] == pytest.approx(p[:, DIGITS].max(1).mean(), rel=1e-9)
    losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    assert found["probe/held_out_loss"] == pytest.approx(losses.mean(), rel=1e-6)
    right = (logits.argmax(1) == labels).mean()
    assert found["probe/held_out_accuracy"] == pytest.approx(right)


def test_remembers_what_it_started_from():
    """After it has been resumed, when the model is another."""
    run = assemble(compose(TINY))
    probe, resumed = (OutputShift(elsewhere, samples=10) for _ in range(2))
    probe.on_fit_start(run)
    Step(run)(run.batches[0])
    resumed.load_state_dict(probe.state_dict())
    resumed.on_fit_start(run)
    probe.on_eval_end(run)
    expected = run.recorded
    run.recorded = {}
    resumed.on_eval_end(run)
    assert run.recorded == expected
    assert "probe/token_bias" not in expected


def test_mistakes():
    run = assemble(compose(TINY))
    with pytest.raises(ValueError, match=r"^samples: must be at least 1, got 0"):
        OutputShift(elsewhere, samples=0)
    with pytest.raises(UsageError, match=r"tokens: from 0 to 255, \[256\]"):
        OutputShift(elsewhere, tokens=[256]).on_fit_start(run)
    with pytest.raises(UsageError, match=r"task: it has 257 classes, not 256"):
        OutputShift(lambda: elsewhere(objective="masked")).on_fit_start(run)
