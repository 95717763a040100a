"""Ensembles of runs, against scikit-learn and a trained pair."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy, linregress
from sklearn.metrics import log_loss, roc_auc_score

from models.outputs import Outputs
from study.analyses import ensembles
from training import checkpoint
from training.compose import compose
from training.progress import Progress
from training.train import ensure

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 50)
SHIFTS = {"noise": {"_target_": "tasks.corruptions.noise", "std": 4}}
TINY = [
    *("model=mlp", "model.width=8", "trainer.max_steps=4", "optimizer.lr=3e-2", "tracker=none"),
    *("trainer.device=cpu", "trainer.eval_samples=null", "schedule.warmup=0"),
    *("trainer.checkpoint_every=2", "trainer.keep_checkpoints=2"),
]


def probabilities(*shape):
    return RNG.dirichlet(np.ones(3), shape)


def row(tmp_path, arm, seed, *overrides):
    given = [*TINY, *overrides, f"seed={seed}", f"outputs={tmp_path}"]
    config = compose(given)
    summary = ensure(config, given, Progress())
    return {
        **{"arm": arm, "seed": seed, "config": config},
        **{"metrics": summary["metrics"], "run_dir": summary["run_dir"]},
    }


def test_metrics_are_scikit_learns():
    p = probabilities(2, 50)
    for i, found in enumerate(ensembles._measured(p, LABELS, "nll")):
        assert found == pytest.approx(log_loss(LABELS, p[i]))
    for i, found in enumerate(ensembles._measured(p, LABELS, "brier")):
        expected = sum(((c == LABELS) - p[i, :, c]) ** 2 for c in range(3)).mean()
        assert found == pytest.approx(expected)
    wrong = ensembles._measured(p, LABELS, "error")
    assert wrong[0] == np.mean([p[0, n].argmax() != y for n, y in enumerate(LABELS)])


def test_ensemble_is_the_mean_of_probabilities():
    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, features):
            return Outputs(logits=self.logits + features)

    logits = [torch.tensor([[0.0, 1.0, -300.0]]), torch.tensor([[2.0, -1.0, -300.0]])]
    said = ensembles.Ensemble([Fixed(x) for x in logits])(features=torch.zeros(1, 3))["logits"]
    expected = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(said.softmax(-1), expected)
    assert said.isfinite().all()


def made(monkeypatch, arms, seeds):
    said = {(arm, seed): probabilities(2, 50) for arm in arms for seed in range(seeds)}
    monkeypatch.setattr(ensembles, "_said", lambda table, shifts: (said, LABELS))
    return said


def test_against_larger(monkeypatch):
    """Every number of the first group, written out with SciPy and scikit-learn."""
    said = made(monkeypatch, ("small", "large"), 5)
    found = ensembles.against_larger(
        [], ensembles=["small"], larger={"small": "large"}, shifts=SHIFTS, size=2
    )
    assert all(list(values) == [0, 2] for values in found.values())

    def nll(p):
        return -np.log([p[n, y] for n, y in enumerate(LABELS)])

    singles = [[log_loss(LABELS, p[i]) for i in (0, 1)] for (_, s), p in said.items() if s < 2]
    x, y = np.transpose(singles)
    line = linregress(x, y)
    mean = (said["small", 0] + said["small", 1]) / 2
    without, shifted = (log_loss(LABELS, p) for p in mean)
    robust = line.intercept + line.slope * without - shifted
    assert found["robust_nll"][0] == pytest.approx(robust)
    assert found["fit_nll"][0] == pytest.approx(line.rvalue**2)
    members = [log_loss(LABELS, said["small", s][1]) for s in (0, 1)]
    assert found["gain_nll"][0] == pytest.approx(np.mean(members) - shifted)

    for i, name in enumerate(("diverse_in", "diverse_out")):
        gap = np.mean([nll(said["small", s][i]) for s in (0, 1)], axis=0) - nll(mean[i])
        assert gap.min() >= -1e-12  # Jensen's
        others = np.mean([nll(said["small", s][i]) for s in (2, 3)], axis=0)
        large = np.mean([nll(said["large", s][i]) for s in (0, 1)], axis=0)
        assert found[name][0] == pytest.approx(np.corrcoef(gap, others - large)[0, 1])

    def area(uncertain):
        return roc_auc_score(np.repeat([0, 1], 50), np.concatenate(uncertain))

    together = [entropy(p, axis=-1) for p in mean]
    alone = [
        np.mean([entropy(said["small", s][i], axis=-1) for s in (0, 1)], axis=0) for i in (0, 1)
    ]
    assert found["detect_ensemble"][0] == pytest.approx(area(together))
    assert found["detect_average"][0] == pytest.approx(area(alone))


def test_needs_two_groups(monkeypatch):
    made(monkeypatch, ("a",), 5)
    with pytest.raises(ValueError, match=r"^size: 5 seeds do not make two groups of 3"):
        ensembles.against_larger([], ensembles=["a"], larger={}, shifts=SHIFTS, size=3)


def test_of_runs(tmp_path):
    """Two seeds of two arms: what each model says is read from its own run."""
    task = ("task=digits",)
    table = [
        row(tmp_path, arm, seed, *task, rate)
        for arm, rate in (("a", "optimizer.lr=3e-2"), ("b", "optimizer.lr=1e-2"))
        for seed in (0, 1)
    ]
    said, labels = ensembles._said(table, SHIFTS)
    for one in table:
        p = said[one["arm"], one["seed"]]
        assert p.shape == (2, 360, 10)
        accuracy = (p[0].argmax(-1) == labels).mean()
        assert accuracy == pytest.approx(one["metrics"]["val/accuracy"])
        assert not np.allclose(p[0], p[1], atol=0.01)
    drawn = ensembles.trends(table, ensembles=["a"], shifts=SHIFTS, size=1)
    assert len(drawn.axes) == 3

    found = ensembles.combined(table, arms=["a", "b"], metric="val/loss")
    assert found["member"][0] == pytest.approx(
        np.mean([r["metrics"]["val/loss"] for r in table if r["seed"] == 0])
    )
    mean = (said["a", 0][0] + said["b", 0][0]) / 2
    assert found["ensemble"][0] == pytest.approx(log_loss(labels, mean), rel=1e-5)
    run = ensembles.restored(table[0])
    weights = []
    for path in (ensembles._last(table[0]), ensembles._last(table[3])):
        checkpoint.load_model_of(path, run.model)
        weights.append({n: v.clone() for n, v in run.model.state_dict().items()})
    run.model.load_state_dict({n: (v + weights[1][n]) / 2 for n, v in weights[0].items()})
    apart = log_loss(labels, ensembles._probabilities(run, run.task.validation))
    assert found["apart"][0] == pytest.approx(apart, rel=1e-5)
    assert found["moving"][0] != found["member"][0]
    with pytest.raises(ValueError, match="no seed has a finished run of each of the arms a, c"):
        ensembles.combined(table, arms=["a", "c"])
