import numpy as np
import pytest
import torch
import torch.nn.functional as F

from techniques.distill.ps_kd import PSKD
from training.assemble import assemble
from training.compose import compose

EPOCHS = 7


def batch_of(rows=6, classes=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    logits, past = (
        scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    batch = {
        "labels": torch.randint(classes, (rows,), generator=generator),
        "index": torch.arange(rows),
        "epoch": torch.arange(rows),
        "epochs": EPOCHS,
        "part": 0,
        "known_1_ago": torch.arange(rows) > 0,
        "logits_1_ago": past,
    }
    return logits, batch


def by_hand(logits, batch, alpha):
    """The code's: soft targets as rows of a matrix, then −t·log p, in NumPy."""
    z, past = logits.detach().numpy(), batch["logits_1_ago"].numpy()
    softmax = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)  # noqa: E731
    one_hot = np.eye(z.shape[1])[batch["labels"].numpy()]
    epoch = batch["epoch"].numpy()[:, None]
    previous = np.where(epoch == 0, one_hot, softmax(past))
    weight = alpha * (epoch + 1) / EPOCHS
    targets = (1 - weight) * one_hot + weight * previous
    return targets, -(targets * np.log(softmax(z))).sum(1)


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_is_cross_entropy_on_softened_targets(alpha):
    logits, batch = batch_of()
    losses = PSKD(alpha)({"logits": logits}, batch)
    _, expected = by_hand(logits, batch, alpha)
    np.testing.assert_allclose(losses.numpy(), expected, atol=1e-10, rtol=0)


def test_gradcheck():
    logits, batch = batch_of()
    loss = PSKD()
    assert torch.autograd.gradcheck(
        lambda z: loss({"logits": z}, batch), logits.requires_grad_(), atol=1e-8
    )


def test_the_targets_are_the_minimiser():
    logits, batch = batch_of()
    targets, _ = by_hand(logits, batch, 0.8)
    best = torch.tensor(targets[1:]).log().requires_grad_()  # in epoch 0 they are one-hot
    rest = {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    losses = PSKD()({"logits": best}, rest)
    losses.sum().backward()
    entropies = -(targets[1:] * np.log(targets[1:])).sum(1)
    np.testing.assert_allclose(losses.detach().numpy(), entropies, atol=1e-12)
    assert best.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits(dtype):
    """Finite, and the gradient is p − t for one-hot p."""
    logits, batch = batch_of(scale=1e4)
    z = logits.to(dtype).requires_grad_()
    batch["logits_1_ago"] = batch["logits_1_ago"].float()
    losses = PSKD()({"logits": z}, batch)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    losses.sum().backward()
    one_hot = lambda x: F.one_hot(x, 5).float()  # noqa: E731
    weight = 0.8 * (batch["epoch"] + 1)[:, None] / EPOCHS * (batch["epoch"] > 0)[:, None]
    past = one_hot(batch["logits_1_ago"].argmax(1))
    targets = (1 - weight) * one_hot(batch["labels"]) + weight * past
    expected = one_hot(logits.argmax(1)) - targets
    torch.testing.assert_close(z.grad.float(), expected, atol=1e-2, rtol=1e-2)


def test_is_cross_entropy_in_the_first_epoch_and_in_evaluation():
    logits, batch = batch_of()
    batch["labels"][0] = -100
    expected = F.cross_entropy(logits, batch["labels"], reduction="none")
    first = batch | {"known_1_ago": torch.zeros(6, dtype=torch.bool)}
    torch.testing.assert_close(PSKD()({"logits": logits}, first), expected)
    first["logits_1_ago"] = torch.zeros(6, 0)
    torch.testing.assert_close(PSKD()({"logits": logits}, first), expected)
    plain = {"labels": batch["labels"]}
    torch.testing.assert_close(PSKD().eval()({"logits": logits}, plain), expected)
    assert PSKD()({"logits": logits}, batch)[0] == 0


def test_notes_its_logits_for_the_memory():
    logits, batch = batch_of()
    loss = PSKD()
    loss({"logits": logits.requires_grad_()}, batch)
    loss({"logits": logits + 1}, batch)  # a second pass
    index, noted = loss.recent[0]
    assert index is batch["index"]
    assert noted.equal(logits)
    assert not noted.requires_grad


def test_overlay_and_refusals():
    run = assemble(compose(["task=digits", "technique=ps_kd", "task.loss.alpha=0.5"]))
    assert run.objective.loss.alpha == 0.5
    assert run.callbacks["ps_kd"].epochs == 1
    with pytest.raises(ValueError, match="alpha: must be between 0 and 1"):
        PSKD(1.2)
    with pytest.raises(ValueError, match="no logits_1_ago"):
        PSKD()({"logits": torch.zeros(2, 3)}, {"labels": torch.zeros(2, dtype=torch.int64)})
