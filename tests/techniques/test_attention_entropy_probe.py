import json
import math

import pytest
import torch

from models.attention import SelfAttention
from techniques.callback.attention_entropy_probe import AttentionEntropyProbe
from tests.conformance.runs import fitted, tiny
from training.assemble import assemble
from training.data import move

LENGTH = 32  # of the tiny run


def built(technique: str, folder, *extra: str):
    """A run that has taken no step, with its first batch."""
    run = assemble(tiny(technique, folder, *extra)[0])
    run.batch = move(run.batches[0][0], run.device)
    run.step = 1
    return run


def attentions(run) -> list[SelfAttention]:
    return [m for m in run.model.modules() if isinstance(m, SelfAttention)]


def test_uniform_attention_has_the_largest_entropy(tmp_path):
    """Row k of causal attention sees k tokens: log(length!) / length on average."""
    run = built("attention_entropy_probe", tmp_path)
    with torch.no_grad():
        for layer in attentions(run):
            layer.qkv.weight.zero_()
    AttentionEntropyProbe().on_step_end(run)
    expected = math.lgamma(LENGTH + 1) / LENGTH
    assert run.recorded == pytest.approx(
        {f"probe/attention_entropy/{i}": expected for i in range(2)}, rel=1e-5
    )


def test_entropy_of_the_first_layer(tmp_path):
    """Against the weights of the layer, made here in float64."""
    run = built("attention_entropy_probe", tmp_path)
    block, ids = run.model.transformer.blocks[0], run.batch["input_ids"]
    with torch.no_grad():
        block.attention.qkv.weight.mul_(20)
        x = run.model.transformer.position.embed(run.model.embedding(ids))
        qkv = block.attention.qkv(block.attention_norm(x)).double().unflatten(-1, (3, 2, 16))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = (q @ k.mT / 4).masked_fill(ahead, -torch.inf).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean().item()
    AttentionEntropyProbe().on_step_end(run)
    assert run.recorded["probe/attention_entropy/0"] == pytest.approx(expected, rel=1e-4)


def test_temperature_counts(tmp_path):
    """A layer that keeps its own entropy is asked for it: hot heads are uniform."""
    run = built("entropy_guided_attention", tmp_path)
    for layer in attentions(run):
        torch.nn.init.constant_(layer.temperature, 1e6)
    AttentionEntropyProbe().on_step_end(run)
    expected = math.lgamma(LENGTH + 1) / LENGTH
    assert run.recorded["probe/attention_entropy/1"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("extra", [(), ("model.dropout=0.3",)])
def test_watching_changes_nothing(tmp_path, extra):
    """The same weights as without it, bit for bit, also with dropout."""
    extra = (*extra, "trainer.max_steps=3")
    every = "callbacks.attention_entropy_probe.every=1"
    watched, _ = fitted("attention_entropy_probe", tmp_path / "watched", *extra, every)
    plain, _ = fitted(
        "attention_entropy_probe",
        tmp_path / "plain",
        *extra,
        "~callbacks.attention_entropy_probe",
    )
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters()):
        assert ours.equal(theirs)
    assert not any("attend" in vars(layer) for layer in attentions(watched))
    assert watched.model.training


def test_is_recorded_after_the_first_step_and_then_every_so_many(tmp_path):
    extra = ("trainer.max_steps=5", "trainer.log_every=5")
    every = "callbacks.attention_entropy_probe.every=2"
    fitted("attention_entropy_probe", tmp_path, *extra, every)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "probe/attention_entropy/0" in line]
    assert steps == [1, 2, 4]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="every"):
        AttentionEntropyProbe(every=0)
    run, _ = fitted("lsuv", tmp_path, "trainer.max_steps=1")
    with pytest.raises(ValueError, match="no SelfAttention"):
        AttentionEntropyProbe().on_fit_start(run)
