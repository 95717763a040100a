import math

import numpy as np
import pytest
import torch

from models.outputs import Outputs
from techniques.post.conformal_risk_control import ConformalRiskControl, first, least, tabulated
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

RNG = np.random.default_rng(0)
PREFIX = "post/conformal_risk_control/"


def test_tables_by_definition():
    """A text's loss is the share of its labels outside {c: p(c) ≥ 1 − λ}; ignored ones count
    neither in it nor in the size."""
    logits = RNG.normal(size=(4, 3, 5))
    labels = RNG.integers(0, 5, (4, 3))
    labels[0, 1] = labels[2] = -100
    grid = np.linspace(0, 1, 41)
    risks, sizes = tabulated(*map(torch.from_numpy, (logits, labels, grid)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for sample in range(4):
        for place, value in enumerate(grid):
            sets = 1 - p[sample] <= value
            known = [i for i in range(3) if labels[sample, i] >= 0]
            missed = [not sets[i, labels[sample, i]] for i in known]
            expected = np.mean(missed) if known else 0.0
            assert risks[sample, place] == pytest.approx(expected, abs=1e-12)
            size = np.mean([sets[i].sum() for i in known]) if known else 0.0
            assert sizes[sample, place] == pytest.approx(size, abs=1e-12)
    assert (risks.diff(dim=1) <= 0).all()


def test_choice_by_definition():
    """n/(n + 1)·R̂ + B/(n + 1) < α, tried at every λ."""
    risks = np.sort(RNG.random((7, 30, 50)), axis=2)[..., ::-1]
    for alpha in (0.5, 0.2, 0.03, 1e-3):
        found = least(risks.sum(1), 30, alpha)
        for table, place in zip(risks, found):
            fits = [30 / 31 * table[:, k].mean() + 1 / 31 < alpha for k in range(50)]
            assert place == (fits.index(True) if True in fits else 49)


@pytest.mark.parametrize(("n", "alpha"), [(25, 0.1), (60, 0.25), (13, 0.3)])
def test_of_one_label_it_is_split_conformal_prediction(n, alpha):
    """λ is the ⌈(n + 1)(1 − α)⌉-th smallest 1 − p(y), rounded up to the grid."""
    logits, labels = RNG.normal(size=(n, 6)), RNG.integers(0, 6, n)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = np.sort(1 - p[np.arange(n), labels])
    quantile = scores[math.ceil((n + 1) * (1 - alpha)) - 1]
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    risks, _ = tabulated(torch.from_numpy(logits), torch.from_numpy(labels), grid)
    chosen = grid[least(risks.sum(0, keepdim=True).numpy(), n, alpha)[0]].item()
    assert quantile <= chosen < quantile + 1 / 2000


@pytest.mark.parametrize(("n", "alpha"), [(12, 0.1), (25, 0.1), (100, 0.2)])
def test_risk_over_many_draws(n, alpha):
    """Scores are uniform: the k-th smallest of n leaves 1 − k/(n + 1) uncovered in expectation."""
    draws, grid = 4000, np.linspace(0, 1, 1001)
    rng = np.random.default_rng(n)
    scores = rng.random((draws, n))
    sums = np.stack([n - np.searchsorted(np.sort(row), grid, side="right") for row in scores])
    risk = 1 - grid[least(sums, n, alpha)]  # of a new uniform score
    exact = 1 - math.ceil((n + 1) * (1 - alpha)) / (n + 1)
    assert exact <= alpha < exact + 2 / (n + 1)
    error = 4 * risk.std() / draws**0.5
    assert risk.mean() == pytest.approx(exact, abs=error + 1e-3)  # the grid rounds λ up
    assert risk.mean() < alpha + error
    naive = 1 - grid[first(sums / n <= alpha)]
    assert naive.mean() > risk.mean()


class Fixed(torch.nn.Module):
    """Says of image i the i-th row of logits; its first pixel is i."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, pixel_values):
        return Outputs(logits=self.logits[pixel_values[:, 0, 0, 0].round().long()])


def fixed_run(count=200):
    """A run whose model is right of 70 in a hundred samples, with some confidence."""
    run = assemble(compose(["task=digits", "model.width=8", "tracker=none", "trainer.device=cpu"]))
    labels = RNG.integers(0, 10, count)
    logits = RNG.normal(size=(count, 10))
    logits[np.arange(count), np.where(RNG.random(count) < 0.7, labels, (labels + 1) % 10)] += 3
    run.model = run.objective.model = Fixed(torch.from_numpy(logits))
    run.task.validation = run.task.validation.select(range(count))
    images = torch.arange(count).repeat_interleave(64).view(count, 1, 8, 8)

    def prepare(rows, generator, training):
        places = [run.places.pop(0) for _ in rows["labels"]]
        return {"pixel_values": images[places].double(), "labels": torch.tensor(labels)[places]}

    run.task.prepare, run.places = prepare, list(range(count))
    return run, logits, labels


def test_records_risk_and_size_of_the_rest():
    """Over random splits of a fixed set the mean risk is at most α, as the splits are
    exchangeable; and each split is what the definition says."""
    run, logits, labels = fixed_run()
    ConformalRiskControl(alpha=0.15, share=0.2, splits=3000, grid=501, seed=4)(run)
    found = {name.removeprefix(PREFIX): value for name, value in run.recorded.items()}
    assert found["samples"] == 40
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores, grid = 1 - p[np.arange(200), labels], np.linspace(0, 1, 501)
    rng = np.random.default_rng(4)
    values = []
    for _ in range(3000):
        part = np.zeros(200, bool)
        part[rng.permutation(200)[:40]] = True
        quantile = np.sort(scores[part])[math.ceil(41 * 0.85) - 1]
        chosen = grid[np.searchsorted(grid, quantile)]
        sizes = (1 - p[~part] <= chosen).sum(1)
        values.append([chosen, (scores[~part] > chosen).mean(), sizes.mean()])
    expected = np.mean(values, axis=0)
    assert [found["lambda"], found["risk"], found["size"]] == pytest.approx(expected, abs=1e-9)
    assert found["risk_std"] == pytest.approx(np.std([v[1] for v in values], ddof=1))
    assert found["risk"] <= 0.15 + 4 * found["risk_std"] / 3000**0.5
    assert found["naive_risk"] > found["risk"]
    assert found["naive_size"] < found["size"]


def test_composes():
    names = ["technique=conformal_risk_control", "task=digits", "model.width=8", "tracker=none"]
    run = assemble(compose([*names, "+post.conformal_risk_control.share=0.3"]))
    step = run.post["conformal_risk_control"]
    assert (step.alpha, step.share, step.splits) == (0.1, 0.3, 1000)


def test_refusals():
    for keys in ({"alpha": 0.0}, {"share": 1.0}, {"splits": 1}, {"grid": 1}):
        with pytest.raises(ValueError, match=rf"{next(iter(keys))}"):
            ConformalRiskControl(**keys)
    with pytest.raises(UsageError, match="is none or all"):
        ConformalRiskControl(share=1e-3)(fixed_run()[0])
    with pytest.raises(UsageError, match="labels that are classes"):
        tabulated(torch.zeros(2, 3), torch.zeros(2), torch.linspace(0, 1, 3).double())
