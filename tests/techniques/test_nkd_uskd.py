import math

import pytest
import torch
import torch.nn.functional as F

from techniques.distill.nkd_uskd import NKD
from training.compose import compose
from training.configs import card


def draw(*shape, classes=5):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(*shape, classes, generator=generator, dtype=torch.float64) * 3 for _ in range(2)
    )
    return student, teacher, torch.randint(classes, shape, generator=generator)


def loss_of(loss, student, teacher, labels):
    return loss({"logits": student}, {"labels": labels, "teacher_logits": teacher})


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0)])
def test_against_plain_python(gamma, temperature):
    student, teacher, labels = draw(7)
    found = loss_of(NKD(gamma, temperature), student, teacher, labels)
    for i in range(7):
        s, t, y = student[i].tolist(), teacher[i].tolist(), labels[i].item()
        log_s = math.log(softmax(s)[y])
        others = [[z / temperature for j, z in enumerate(x) if j != y] for x in (t, s)]
        rest = sum(a * math.log(b) for a, b in zip(*map(softmax, others)))
        expected = -log_s - softmax(t)[y] * log_s - gamma * temperature**2 * rest
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_gradient():
    student, teacher, labels = draw(2, 3)
    labels[0, 1] = -100
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(NKD(1.5, 2.0), x, teacher, labels), student)


def test_only_the_label_pulls_once_the_others_agree_with_the_teacher():
    """N(S) = N(T) where all but the label's logits are the teacher's, shifted."""
    student, teacher, labels = draw(6)
    own = F.one_hot(labels, 5).bool()
    student = (teacher + 2.5).masked_scatter(own, student[own]).requires_grad_()
    loss_of(NKD(3.5, 3.0), student, teacher, labels).sum().backward()
    p, target = student.detach().softmax(-1), teacher.softmax(-1)[own]
    expected = (1 + target)[:, None] * (p - own.double())
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-12)


def test_of_two_classes_the_others_say_nothing():
    student, teacher, labels = draw(4, classes=2)
    found = loss_of(NKD(), student, teacher, labels)
    target = teacher.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    expected = (1 + target) * F.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits_have_finite_losses_and_bounded_gradients(dtype):
    signs = torch.tensor([[1.0, -1, 1], [-1, -1, 1]])
    student = (signs * 1e4).to(dtype).requires_grad_()
    teacher = (signs.flip(0) * 1e4).to(dtype)
    losses = loss_of(NKD(1.5, 3.0), student, teacher, torch.tensor([1, 0]))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert student.grad.abs().max() <= 2 + 1.5 * 3


def test_ignored_labels_the_overlay_and_mistakes():
    student, teacher, labels = draw(4)
    labels[1] = -100
    assert loss_of(NKD(), student, teacher, labels)[1] == 0
    config = compose([*card("nkd_uskd")["natural"], "technique=nkd_uskd"])
    assert (config["task"]["loss"]["gamma"], config["task"]["loss"]["temperature"]) == (1.5, 1.0)
    for name, arguments in {"gamma": (-1.0,), "temperature": (1.0, 0.0)}.items():
        with pytest.raises(ValueError, match=name):
            NKD(*arguments)
