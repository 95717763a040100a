import math

import pytest
import torch
import torch.nn.functional as F

from techniques.distill.hinton import Hinton
from training.errors import UsageError


def draw(*shape, classes=5):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(*shape, classes, generator=generator, dtype=torch.float64) * 3 for _ in range(2)
    )
    return student, teacher, torch.randint(classes, shape, generator=generator)


def loss_of(loss, student, teacher, labels):
    return loss({"logits": student}, {"labels": labels, "teacher_logits": teacher})


@pytest.mark.parametrize(("temperature", "alpha"), [(4.0, 0.5), (1.0, 0.0), (2.0, 0.9)])
def test_against_plain_python(temperature, alpha):
    student, teacher, labels = draw(7)
    found = loss_of(Hinton(temperature, alpha), student, teacher, labels)
    for i in range(7):
        s, t = ([math.exp(z / temperature) for z in x[i].tolist()] for x in (student, teacher))
        p, q = [v / sum(s) for v in s], [v / sum(t) for v in t]
        soft = sum(b * math.log(b / a) for a, b in zip(p, q))
        plain = [math.exp(z) for z in student[i].tolist()]
        hard = -math.log(plain[labels[i]] / sum(plain))
        expected = alpha * hard + (1 - alpha) * temperature**2 * soft
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_gradient():
    student, teacher, labels = draw(2, 3)
    labels[0, 1] = -100
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(Hinton(), x, teacher, labels), student)


def test_its_minimum_at_temperature_one_mixes_labels_and_teacher():
    _, teacher, labels = draw(3)
    best = 0.3 * F.one_hot(labels, 5).double() + 0.7 * teacher.softmax(-1)
    logits = best.log().requires_grad_()
    loss_of(Hinton(1.0, 0.3), logits, teacher, labels).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits_have_finite_losses_and_bounded_gradients(dtype):
    signs = torch.tensor([[1.0, -1, 1], [-1, -1, 1]])
    student = (signs * 1e4).to(dtype).requires_grad_()
    teacher = (signs.flip(0) * 1e4).to(dtype)
    losses = loss_of(Hinton(4.0, 0.5), student, teacher, torch.tensor([1, 0]))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert student.grad.abs().max() <= 0.5 + 0.5 * 4


def test_ignored_labels_and_mistakes():
    student, teacher, labels = draw(4)
    labels[1] = -100
    assert loss_of(Hinton(), student, teacher, labels)[1] == 0
    with pytest.raises(UsageError, match=r"needs a teacher, callbacks\.teacher"):
        Hinton()({"logits": student}, {"labels": labels})
    with pytest.raises(UsageError, match=r"\(4, 4\), the model's of \(4, 5\)"):
        loss_of(Hinton(), student, teacher[:, :4], labels)
    for name, arguments in {"temperature": (0.0,), "alpha": (1.0, 1.5)}.items():
        with pytest.raises(ValueError, match=name):
            Hinton(*arguments)
