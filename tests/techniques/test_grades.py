import pytest

from techniques.callback.grades import GradES, matrices
from tests.conformance.runs import tiny
from training.assemble import assemble
from training.progress import Progress
from training.tracking import NoTracker
from training.trainer import fit


def trained(tmp_path, *overrides):
    run = assemble(tiny("grades", tmp_path, "trainer.max_steps=10", *overrides)[0])
    run.open(tmp_path)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    assert fit(run, NoTracker(), Progress()) == "completed"
    return run, before


def test_nothing_freezes_below_the_threshold(tmp_path):
    run, before = trained(tmp_path, "callbacks.grades.tau=1e-30")
    assert run.step == 10
    assert not run.callbacks["grades"].frozen
    assert all(not p.equal(before[n]) for n, p in matrices(run.model).items())


def test_all_freeze_after_the_grace_period_and_the_run_stops(tmp_path):
    run, before = trained(tmp_path, "callbacks.grades.tau=1e30", "callbacks.grades.alpha=0.3")
    assert (run.step, run.stopped) == (4, "every matrix is frozen")
    watched = matrices(run.model)
    assert run.callbacks["grades"].frozen == set(watched)
    assert all(not p.equal(before[n]) for n, p in watched.items())


def test_without_a_grace_period_frozen_matrices_keep_their_first_values(tmp_path):
    """Weight decay included, while the embedding trains on."""
    run, before = trained(tmp_path, "callbacks.grades.tau=1e30", "callbacks.grades.alpha=0")
    assert run.step == 1
    assert all(p.equal(before[n]) for n, p in matrices(run.model).items())
    assert not run.model.embedding.weight.equal(before["embedding.weight"])


def test_watches_attention_and_feed_forward(tmp_path):
    run = assemble(tiny("grades", tmp_path)[0])
    kinds = {name.split(".", 3)[3] for name in matrices(run.model)}
    assert kinds == {
        "attention.qkv.weight",
        "attention.out.weight",
        "ffn.up.weight",
        "ffn.down.weight",
    }


def test_refusals():
    with pytest.raises(ValueError, match="tau"):
        GradES(tau=0.0)
    with pytest.raises(ValueError, match="alpha"):
        GradES(alpha=1.0)
    state = GradES()
    state.load_state_dict({"frozen": ["a"]})
    assert state.state_dict() == {"frozen": ["a"]}
