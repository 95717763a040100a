import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.outputs import Outputs
from tasks.losses import cross_entropy
from techniques.loss import emo_loss
from techniques.loss.emo_loss import EMOLoss, distance, emo, freeze
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError

DIM, VOCAB = 5, 11


def outputs_and_batch(scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    classifier = nn.Linear(DIM, VOCAB, bias=False, dtype=dtype)
    hidden = (scale * torch.randn(3, 7, DIM, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (3, 7), generator=generator)
    labels[0, :3] = -100
    return Outputs(hidden=hidden, classifier=classifier), {"labels": labels}


def with_copy(embedding):
    loss = EMOLoss()
    loss.embedding = F.normalize(embedding, dim=1)
    return loss


def by_hand(outputs, batch, embedding):
    """The losses, and gradients of their sum by logits: the paper's formulas, token by token."""
    hidden, weight, embedding = (
        t.detach().numpy() for t in (outputs["hidden"], outputs["classifier"].weight, embedding)
    )
    unit = embedding / np.sqrt((embedding**2).sum(1, keepdims=True))
    losses, gradients = np.zeros((3, 7)), np.zeros((3, 7, VOCAB))
    for i, j in np.ndindex(3, 7):
        label = int(batch["labels"][i, j])
        if label == -100:
            continue
        logits = weight @ hidden[i, j]
        q = np.exp(logits - logits.max())
        q = q / q.sum()
        p = np.eye(VOCAB)[label]
        ce = -math.log(q[label])
        moved = 1 - (unit.T @ q) @ (unit.T @ p)
        ratio = ce / (moved + 1e-10)
        losses[i, j] = 0.5 * (ce + ratio * moved)
        # Of 1 − Σ qᵥ cᵥ by the logits, through the softmax's Jacobian.
        jacobian = np.diag(q) - np.outer(q, q)
        gradients[i, j] = 0.5 * (q - p - ratio * jacobian @ (unit @ unit[label]))
    return losses, gradients, hidden, weight


@pytest.mark.parametrize("at_once", [2**22, 2 * VOCAB])
def test_is_the_papers_formula(at_once, monkeypatch):
    """Values, and the gradients of an upstream one that differs by token; in one block or nine."""
    monkeypatch.setitem(emo_loss.AT_ONCE, "cpu", at_once)
    outputs, batch = outputs_and_batch()
    copy = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = with_copy(copy)(outputs, batch)
    expected, by_logits, hidden, weight = by_hand(outputs, batch, copy)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-10)
    losses.square().sum().backward()
    by_logits = 2 * expected[..., None] * by_logits
    np.testing.assert_allclose(outputs["hidden"].grad, by_logits @ weight, atol=1e-10)
    expected = np.einsum("ijv,ijd->vd", by_logits, hidden)
    np.testing.assert_allclose(outputs["classifier"].weight.grad, expected, atol=1e-10)


def test_value_is_the_cross_entropy():
    outputs, batch = outputs_and_batch()
    losses = with_copy(outputs["classifier"].weight.detach())(outputs, batch)
    torch.testing.assert_close(losses, cross_entropy(outputs, batch).double(), rtol=1e-6, atol=1e-6)


def test_gradcheck():
    """Of D, and of the loss with its ratio, a constant in the backward, held."""
    outputs, batch = outputs_and_batch()
    copy = F.normalize(outputs["classifier"].weight.detach(), dim=1)
    targets = batch["labels"].flatten()[3:]
    hidden = outputs["hidden"].detach().flatten(0, 1)[3:].requires_grad_()
    weight = outputs["classifier"].weight.detach().clone().requires_grad_()
    moved = lambda h, w: distance((h @ w.T).log_softmax(-1), targets, copy)  # noqa: E731
    assert torch.autograd.gradcheck(moved, (hidden, weight))

    def held(h, w):
        return (F.cross_entropy(h @ w.T, targets, reduction="none") + ratio * moved(h, w)) / 2

    ce = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    ratio = (ce / (moved(hidden, weight) + 1e-10)).detach()
    ours = torch.autograd.grad(emo(lambda h: h @ weight.T, hidden, targets, copy).sum(), hidden)
    assert torch.autograd.gradcheck(held, (hidden, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(held(hidden, weight).sum(), hidden))


def test_distance_is_an_earth_movers():
    """Of one-dimensional points at angles the plan's cost; 0 at the label, 2 at its opposite."""
    angles = torch.tensor([0.0, 0.3, 1.0, math.pi], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    cost = 0.2 * (1 - math.cos(0.3)) + 0.3 * (1 - math.cos(1.0)) + 0.4 * 2
    assert distance(q.log(), torch.tensor([0]), points).item() == pytest.approx(cost, abs=1e-12)
    certain = torch.eye(4, dtype=torch.float64).log()
    found = distance(certain, torch.zeros(4, dtype=torch.long), points)
    assert found[0] == 0
    assert found[3] == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits(dtype):
    """±1e4: finite, 0 where right; where wrong the logits' distance and half CE's gradient."""
    classifier = nn.Linear(VOCAB, VOCAB, bias=False, dtype=dtype)
    nn.init.eye_(classifier.weight)
    hidden = torch.full((1, 2, VOCAB), -1e4, dtype=dtype)
    hidden[..., 4] = 1e4
    outputs = Outputs(hidden=hidden.requires_grad_(), classifier=classifier)
    copy = torch.randn(VOCAB, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    losses = with_copy(copy)(outputs, {"labels": torch.tensor([[4, 7]])})
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([[0.0, 2e4]], dtype=dtype))
    expected = torch.zeros(2, VOCAB, dtype=dtype)
    expected[1, 4], expected[1, 7] = 0.5, -0.5
    torch.testing.assert_close(hidden.grad[0], expected)


def test_keeps_no_logits(monkeypatch):
    monkeypatch.setitem(emo_loss.AT_ONCE, "cpu", 4 * VOCAB)
    outputs, batch = outputs_and_batch()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with_copy(outputs["classifier"].weight.detach())(outputs, batch)
    assert "logits" not in outputs
    assert max(kept) <= outputs["hidden"].numel()  # the logits are 18·11, the states 21·5


def test_nothing_counts():
    outputs, batch = outputs_and_batch()
    batch["labels"].fill_(-100)
    losses = with_copy(outputs["classifier"].weight.detach())(outputs, batch)
    losses.sum().backward()
    assert not losses.any()
    assert not outputs["hidden"].grad.any()


def test_overlay_freezes_the_classifier_it_starts_from():
    """The copy is there before the first step, of length 1, and training leaves it alone."""
    small = ["task.path=tasks", "task.context_length=16", "model.width=16", "model.depth=1"]
    small += ["model.heads=2", "trainer.batch_size=4", "trainer.device=cpu"]
    run = assemble(compose([*small, "technique=emo_loss"]))
    head = run.model.head.weight.detach()
    copy = run.objective.loss.embedding
    torch.testing.assert_close(copy, head / head.square().sum(1, keepdim=True).sqrt())
    assert "loss.embedding" in run.objective.state_dict()
    assert run.model.training
    run.objective(run.batches.part(0, 0)).total.backward()
    assert copy.grad is None
    assert run.model.head.weight.grad.any()


def test_refusals():
    outputs, batch = outputs_and_batch()
    with pytest.raises(UsageError, match="freeze"):
        EMOLoss()(outputs, batch)
    with pytest.raises(UsageError, match="returns logits"):
        EMOLoss()({"logits": torch.zeros(1, 2)}, batch)
    outputs["classifier"] = nn.Sequential(nn.Linear(DIM, VOCAB))
    with pytest.raises(UsageError, match="Sequential"):
        EMOLoss()(outputs, batch)


def test_freeze_runs_the_model_without_a_trace():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.drop = nn.Linear(DIM, VOCAB), nn.Dropout(0.5)

        def forward(self, hidden):
            return Outputs(hidden=self.drop(hidden), classifier=self.head)

    model, loss = Model(), EMOLoss()
    state = torch.get_rng_state()
    freeze(model, iter([{"hidden": torch.ones(2, DIM)}]), loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    torch.testing.assert_close(loss.embedding.norm(dim=1), torch.ones(VOCAB))
