import numpy as np
import pytest
import torch
import torch.nn.functional as F

from techniques.distill.self_distillation_ground_truth_weight import GroundTruthWeight
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError


def batch_of(shape=(6,), classes=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (
        scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    labels = torch.randint(classes, shape, generator=generator)
    return logits, {"labels": labels, "teacher_logits": teacher}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_is_the_weighted_squared_error(alpha, shape):
    """In NumPy, entry by entry."""
    logits, batch = batch_of(shape)
    losses = GroundTruthWeight(alpha)({"logits": logits}, batch)
    assert losses.shape == shape
    softmax = lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    for i in np.ndindex(*shape):
        p, q = softmax(logits[i].numpy()), softmax(batch["teacher_logits"][i].numpy())
        expected = 0.0
        for c in range(5):
            hard = (p[c] - float(batch["labels"][i] == c)) ** 2
            expected += (alpha * hard + (1 - alpha) * (p[c] - q[c]) ** 2) / 5
        assert losses[i].item() == pytest.approx(expected, abs=1e-10)


def test_gradcheck():
    logits, batch = batch_of()
    loss = GroundTruthWeight()
    assert torch.autograd.gradcheck(
        lambda z: loss({"logits": z}, batch), logits.requires_grad_(), atol=1e-8
    )


def test_its_minimiser_and_its_least_value():
    _, batch = batch_of()
    q, one_hot = batch["teacher_logits"].softmax(-1), F.one_hot(batch["labels"], 5).double()
    best = (0.3 * one_hot + 0.7 * q).log().requires_grad_()
    losses = GroundTruthWeight(0.3)({"logits": best}, batch)
    losses.sum().backward()
    assert best.grad.abs().max() < 1e-12
    torch.testing.assert_close(losses, 0.3 * 0.7 * (one_hot - q).square().mean(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits(dtype):
    """Bounded, and without a gradient."""
    logits, batch = batch_of(scale=1e4)
    z = logits.to(dtype).requires_grad_()
    losses = GroundTruthWeight()({"logits": z}, batch)
    assert losses.dtype == torch.float64  # the teacher's
    losses.sum().backward()
    p, q = (F.one_hot(x.argmax(-1), 5) for x in (logits, batch["teacher_logits"]))
    hard = (p - F.one_hot(batch["labels"], 5)).double().square().mean(-1)
    soft = (p - q).double().square().mean(-1)
    torch.testing.assert_close(losses, 0.6 * hard + 0.4 * soft)
    assert (z.grad == 0).all()


def test_ignored_labels_and_no_teacher():
    logits, batch = batch_of()
    batch["labels"][2] = -100
    assert GroundTruthWeight()({"logits": logits}, batch)[2] == 0
    plain = {"labels": batch["labels"]}
    losses = GroundTruthWeight(1.0)({"logits": logits}, plain)
    torch.testing.assert_close(losses, GroundTruthWeight(1.0)({"logits": logits}, batch))
    with pytest.raises(UsageError, match="distillation needs a teacher"):
        GroundTruthWeight()({"logits": logits}, plain)


def test_overlay_and_refusals():
    name = "self_distillation_ground_truth_weight"
    teacher = "callbacks.teacher.of=runs/first"
    run = assemble(compose(["task=digits", f"technique={name}", teacher, "task.loss.alpha=0.2"]))
    assert run.objective.loss.alpha == 0.2
    assert run.callbacks["teacher"].of == "runs/first"
    with pytest.raises(ValueError, match="alpha: must be between 0 and 1"):
        GroundTruthWeight(-0.1)
