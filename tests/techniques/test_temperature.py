import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from tasks.transforms import confused_labels
from techniques.post.held_out import halves, said
from techniques.post.temperature import Temperature, fitted
from tests.conformance.runs import TINY
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

MLP = ["task=digits", "model.width=8", "tracker=none", "trainer.device=cpu", "seed=3"]


def made(*overrides):
    return assemble(compose([*MLP, *overrides]))


def test_of_one_confidence_it_is_the_closed_form():
    """Logits (a, 0), right with frequency p: σ(a/T) = p."""
    logits = torch.tensor([[4.0, 0.0]], dtype=torch.float64).expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    assert fitted(logits, labels) == pytest.approx(4 / math.log(0.7 / 0.3), rel=1e-9)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_is_where_the_slope_vanishes(scale):
    rng = np.random.default_rng(0)
    logits = scale * rng.normal(size=(400, 5))
    labels = np.where(rng.random(400) < 0.6, logits.argmax(1), rng.integers(0, 5, 400))

    def slope(beta):  # of the mean of log Σ exp(βz) − βz_y
        shifted = beta * (logits - logits.max(1, keepdims=True))
        p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        return ((p * logits).sum(1) - logits[np.arange(400), labels]).mean()

    beta = brentq(slope, 1e-4 / scale, 1e3 / scale, xtol=1e-14, rtol=1e-13)
    found = fitted(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found == pytest.approx(1 / beta, rel=1e-6)


def test_is_folded_into_the_classifier_and_recorded():
    run = made()
    held, rest = halves(run, 0.25, seed=1)
    assert (len(held), len(rest)) == (90, 270)
    rows = [row["pixels"] for part in (held, rest) for row in part]
    assert sorted(rows) == sorted(run.task.validation["pixels"])
    before, labels = said(run, rest)
    t = fitted(*said(run, held))
    Temperature(share=0.25, seed=1)(run)
    after, _ = said(run, rest)
    assert t != pytest.approx(1, abs=1e-2)
    torch.testing.assert_close(after, before / t, rtol=1e-5, atol=1e-6)
    found = {name.removeprefix("post/temperature/"): v for name, v in run.recorded.items()}
    assert found["t"] == t
    for name, logits in (("before_nll", before), ("nll", after)):
        log = logits - logits.logsumexp(-1, keepdim=True)
        expected = -log[torch.arange(270), labels].mean().item()
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert found["before_ece"] != found["ece"]


def test_labels_may_be_noisy_for_the_fit_alone():
    def noise(dataset):
        return confused_labels(dataset, fraction=0.5)

    plain, noisy = made(), made()
    Temperature()(plain)
    Temperature(transform=noise)(noisy)
    prefix = "post/temperature/"
    assert plain.recorded[f"{prefix}before_nll"] == noisy.recorded[f"{prefix}before_nll"]
    assert plain.recorded[f"{prefix}t"] != noisy.recorded[f"{prefix}t"]


def test_of_every_position_of_a_text():
    tiny = [f"{name}={value}" for name, value in TINY.items() if name.startswith(("model", "task"))]
    run = made("task=code", "model=gpt", *tiny)
    run.task.validation = run.task.validation.select(range(20))
    logits, labels = said(run, run.task.validation)
    assert logits.shape == (20 * 32, run.task.dims["vocab_size"])
    assert labels.shape == (640,)


def test_refusals():
    with pytest.raises(ValueError, match=r"^share: expected above 0 and below 1, got 1"):
        Temperature(share=1)
    with pytest.raises(ValueError, match=r"^bins"):
        Temperature(bins=0)
    with pytest.raises(UsageError, match="is none or all"):
        Temperature(share=1e-3)(made())
    run = made()
    run.model.head = nn.Sequential(run.model.head)
    with pytest.raises(UsageError, match="classifier is Sequential, not"):
        Temperature()(run)
    run = made("model.depth=1")
    run.model.other = nn.Linear(1, 1)
    run.model.other.weight = run.model.head.weight
    with pytest.raises(UsageError, match=r"head.weight and other.weight are one parameter"):
        Temperature()(run)
