import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from study.probes.collapse import Collapse, effective_rank
from study.probes.linear_probe import LinearProbe
from study.probes.representations import represent
from tests.cli.invoke import lines
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

TINY = (
    *("tracker=none", "trainer.device=cpu", "trainer.max_steps=3", "trainer.log_every=1"),
    *("model.width=16", "trainer.eval_every=3", "trainer.eval_samples=64"),
)
PAIRS = ("task=pairs", "model.depth=1", "model.heads=2", "model.patch_size=4", *TINY)
PROBES = (
    "+callbacks.linear={_target_:study.probes.linear_probe.LinearProbe,samples:200}",
    "+callbacks.collapse={_target_:study.probes.collapse.Collapse}",
)
NAMES = ("embedding_std", "embedding_rank", "feature_std", "feature_rank", "linear_accuracy")


def test_effective_rank():
    """Orthogonal columns of equal length count in full, one direction as 1; and exp of the entropy
    by NumPy."""
    assert effective_rank(torch.eye(5)[:, :3]) == pytest.approx(3)
    assert effective_rank(torch.ones(6, 4)) == pytest.approx(1, abs=1e-5)
    x = np.random.default_rng(0).standard_normal((9, 4))
    shares = np.linalg.svd(x, compute_uv=False)
    shares /= shares.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "task", [PAIRS, (*PAIRS, "task.text_column=caption"), ("task=digits", *TINY)]
)
def test_probes_record_and_leave_no_other_trace(tmp_path, task):
    with_, without = lines(tmp_path / "a", *task, *PROBES), lines(tmp_path / "b", *task)
    assert ["probe/linear_accuracy" in line for line in with_] == [False, False, True]
    found = {name: with_[-1].pop(f"probe/{name}") for name in NAMES}
    assert with_ == without
    assert 0 < found["linear_accuracy"] <= 1
    assert found["embedding_std"] > 0
    assert 1 < found["feature_rank"] < 16


def test_accuracy_and_spread_of_known_features(tmp_path):
    """Features that are the pixels, against scikit-learn's own on the digits."""
    run = assemble(compose([*PAIRS, f"outputs={tmp_path}", "trainer.eval_samples=null"]))
    run.model.image.forward = lambda pixels: pixels.flatten(1)
    run.model.head.forward = lambda hidden: 3 * hidden
    LinearProbe().on_eval_end(run)
    Collapse().on_eval_end(run)

    (x, y), (held_out, labels) = (
        (np.array(split["pixels"]), np.array(split["labels"]))
        for split in (run.task.train, run.task.validation)
    )
    x, held_out = ((v - run.task.digits.mean) / run.task.digits.std for v in (x, held_out))
    expected = LogisticRegression(max_iter=1000).fit(x, y).score(held_out, labels)
    assert run.recorded["probe/linear_accuracy"] == pytest.approx(expected, abs=0.003)
    std = held_out.std(0).mean()
    assert run.recorded["probe/feature_std"] == pytest.approx(std, rel=1e-4)
    assert run.recorded["probe/embedding_std"] == pytest.approx(3 * std, rel=1e-4)


def test_batches_of_any_size_give_the_same_features(tmp_path):
    run = assemble(compose([*PAIRS, f"outputs={tmp_path}"]))
    whole, parts = (represent(run, run.task.train, 50, size).features for size in (50, 7))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    assert len(represent(run, run.task.train, 50).labels) == 50


def test_refuse(tmp_path):
    with pytest.raises(ValueError, match=r"^samples"):
        LinearProbe(samples=0)
    code = assemble(compose(["task.path=tasks", "model.width=16", "model.depth=1"]))
    with pytest.raises(UsageError, match="one vector of features"):
        Collapse().on_fit_start(code)
