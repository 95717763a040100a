import math

import pytest
import torch

from techniques.callback.attention_entropy_probe import AttentionEntropyProbe
from tests.conformance.runs import fitted, tiny
from training.assemble import assemble


def test_uniform_attention_has_the_largest_entropy(tmp_path):
    """With queries at zero the k-th row is uniform over k keys: log k."""
    run = assemble(tiny("attention_entropy_probe", tmp_path)[0])
    run.batch = run.batches[0][0]
    with torch.no_grad():
        for block in run.model.transformer.blocks:
            block.attention.qkv.weight[:32] = 0
    probe = AttentionEntropyProbe(every=1)
    probe.on_step_end(run)
    expected = sum(math.log(k) for k in range(1, 33)) / 32
    assert len(run.recorded) == 2
    for value in run.recorded.values():
        assert value == pytest.approx(expected, rel=1e-5)


def test_leaves_the_run_as_it_was(tmp_path):
    every = "callbacks.attention_entropy_probe.every="
    watched, _ = fitted(
        "attention_entropy_probe", tmp_path / "a", "trainer.max_steps=3", every + "1"
    )
    plain, _ = fitted("attention_entropy_probe", tmp_path / "b", "trainer.max_steps=3", every + "9")
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters()):
        assert ours.equal(theirs)
    assert all("attend" not in m.__dict__ for m in watched.model.modules())
    assert "probe/attention_entropy/1" in watched.last


def test_refusals():
    with pytest.raises(ValueError, match="every"):
        AttentionEntropyProbe(every=0)
