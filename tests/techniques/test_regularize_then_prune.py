import numpy as np
import pytest
import torch
from torch import nn

from models.feedforward import FeedForward, GatedFeedForward
from techniques.callback.probing import training_batch
from techniques.penalty.regularize_then_prune import RegularizeThenPrune
from techniques.post.hidden import hidden_units
from techniques.post.regularize_then_prune import RegularizeThenPrune as Remove
from techniques.reparam.regularize_then_prune import regularize_then_prune
from tests.conformance.runs import fitted, tiny
from training.assemble import assemble
from training.errors import UsageError

SMALL = ("task.path=json", "task.context_length=16", "model.width=16", "model.depth=1")
BATCH = {"labels": torch.zeros(2, dtype=torch.long)}


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
@pytest.mark.parametrize("norm", [1, 2])
def test_penalty_is_the_norm_of_the_part_that_goes(kind, norm):
    """In NumPy: the weights, flattened, of the units of lowest norm; biases do not count."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, nn.GELU).double())
    regularize_then_prune(model, amount=0.25)
    ffn = model[0]
    into = [m.weight.detach().numpy() for m in (ffn.up, getattr(ffn, "gate", None)) if m]
    size = np.sqrt(sum((w**2).sum(1) for w in into))
    gone = np.argsort(size)[: round(0.25 * len(size))]
    parts = [w[gone].ravel() for w in into] + [ffn.down.weight.detach().numpy()[:, gone].ravel()]
    expected = sum(np.linalg.norm(part, norm) for part in parts)
    found = RegularizeThenPrune(norm)(model, {}, BATCH)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_sign_of_what_goes_and_nothing_elsewhere():
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward(6, nn.GELU))
    regularize_then_prune(model, by="random", seed=3)
    RegularizeThenPrune(1)(model, {}, BATCH).backward()
    down, up = model[0].down, model[0].up
    assert int(down.removed.sum()) == 12
    assert down.weight.grad.equal(down.weight.sign() * down.removed)
    assert up.weight.grad.equal(up.weight.sign() * down.removed[:, None])
    assert up.bias.grad is None


def test_units_whose_weights_are_zero_go_without_a_trace(tmp_path):
    """What full regularisation leads to: the pruned model computes what the whole one does."""
    run = assemble(tiny("regularize_then_prune", tmp_path, *SMALL)[0])
    for hidden in hidden_units(run.model).values():
        with torch.no_grad():
            hidden.out.weight[:, hidden.out.removed] = 0
    batch, names = training_batch(run, 4), set(run.model.state_dict())
    run.model.eval()
    with torch.no_grad():
        before = run.objective.predict(batch)["logits"]
        Remove()(run)
        after = run.objective.predict(batch)["logits"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert {n for n in names if not n.endswith("removed")} == set(run.model.state_dict())
    assert run.recorded["post/units"] == 0.5
    assert RegularizeThenPrune()(run.model, {}, batch).item() == 0  # as fine-tuning has it
    with pytest.raises(UsageError, match="has marked no hidden units"):
        Remove()(run)


def test_it_brings_the_marked_weights_down_and_leaves_the_others(tmp_path):
    settings = (
        "trainer.max_steps=60",
        "optimizer.lr=3e-3",
        "schedule=constant",
        "optimizer.weight_decay=0",
    )
    strong = "penalties.regularize_then_prune.coefficient=1"
    run, _ = fitted("regularize_then_prune", tmp_path, *SMALL, *settings, strong, post=False)
    for hidden in hidden_units(run.model).values():
        weight, removed = hidden.out.weight.detach().abs(), hidden.out.removed
        assert weight[:, removed].mean() < 0.2 * weight[:, ~removed].mean()


def test_composes_and_its_settings_reach_it(tmp_path):
    settings = (
        *("reparam.regularize_then_prune.amount=0.75", "reparam.regularize_then_prune.by=random"),
        *("penalties.regularize_then_prune.norm=2", "trainer.max_steps=2"),
    )
    run, _ = fitted("regularize_then_prune", tmp_path, *SMALL, *settings)
    assert run.objective.penalties["regularize_then_prune"][0].norm == 2
    assert [h.size for h in hidden_units(run.model).values()] == [16]
    assert run.last["post/units"] == 0.25
    assert run.last["post/regularize_then_prune/bytes"] < run.last["post/bytes"]


def test_refusals():
    model = nn.Sequential(FeedForward(6, nn.GELU))
    with pytest.raises(ValueError, match="amount: must be at least 0 and below 1, got 1"):
        regularize_then_prune(model, amount=1)
    with pytest.raises(ValueError, match="by: one of magnitude, random, got 'size'"):
        regularize_then_prune(model, by="size")
    with pytest.raises(ValueError, match="norm: 1 or 2, got 3"):
        RegularizeThenPrune(3)
