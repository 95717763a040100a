import torch

from techniques.distill.hinton import Hinton
from techniques.reparam.adapters import LowRank, adapters
from training.assemble import assemble
from training.compose import compose
from training.configs import card
from training.trainer import Step


def assembled(*overrides):
    natural = [*card("kd_lora")["natural"], "technique=kd_lora", "tracker=none"]
    small = ["model.width=16", "model.depth=2", "model.heads=2", "trainer.batch_size=8"]
    return assemble(compose([*natural, *small, "trainer.device=cpu", *overrides]))


def test_lora_is_in_attention_and_alone_learns_with_the_classifier(tmp_path):
    run = assembled()
    assert isinstance(run.objective.loss, Hinton)
    assert (run.objective.loss.temperature, run.objective.loss.alpha) == (2.0, 0.5)
    found = adapters(run.model)
    assert [name.rpartition(".")[2] for name in found] == ["qkv", "qkv"]
    for adapter in found.values():
        assert isinstance(adapter, LowRank)
        assert (len(adapter.A), adapter.scale.item()) == (8, 2.0)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name or name.startswith("head.") for name in trained)
    assert len(trained) == 2 * 2 + 2

    run.open(tmp_path)
    run.callbacks["teacher"].on_fit_start(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    Step(run)(run.batches[0])
    Step(run)(run.batches[1])  # A learns once B is not 0
    moved = {name for name, p in run.model.named_parameters() if not p.equal(before[name])}
    assert moved == trained


def test_the_gradient_is_half_that_of_the_labels_and_half_the_teachers(tmp_path):
    """Of the classifier's bias: the mean of α(p − y) + (1 − α)·T(p_T − q_T), T = 2."""
    run = assembled("trainer.clip_norm=null")
    run.open(tmp_path)
    teacher = run.callbacks["teacher"]
    teacher.on_fit_start(run)
    (batch,) = run.batches[0]
    run.gradient(run.wrapped, run.model, [batch], torch.Tensor.backward)
    with torch.no_grad():
        s = run.model(pixel_values=batch["pixel_values"])["logits"]
        t = teacher.model(pixel_values=batch["pixel_values"])["logits"]
    hard = s.softmax(-1) - torch.nn.functional.one_hot(batch["labels"], 10)
    soft = 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1))
    expected = (0.5 * hard + 0.5 * soft).mean(0)
    torch.testing.assert_close(run.model.head.bias.grad, expected, rtol=1e-4, atol=1e-6)


def test_targets_are_queries_and_values_of_known_models():
    import re

    pattern = compose([*card("kd_lora")["natural"], "technique=kd_lora"])["reparam"]["kd_lora"]
    found = re.compile(pattern["targets"])
    for name in ("a.query", "a.value", "a.query_proj", "a.v_proj", "q_lin", "blocks.0.qkv"):
        assert found.search(name)
    for name in ("a.key", "a.key_proj", "a.out_proj", "k_lin", "a.dense"):
        assert not found.search(name)
