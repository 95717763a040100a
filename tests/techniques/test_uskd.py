import math

import pytest
import torch
from torch import nn

from models.outputs import Outputs
from techniques.distill import nkd_uskd
from techniques.distill.nkd_uskd import USKD, others_log_p, soft_labels, weak_classifier
from training.assemble import assemble
from training.compose import compose
from training.configs import card
from training.errors import UsageError


def draw(count, classes=6):
    generator = torch.Generator().manual_seed(0)
    logits, weak = (
        torch.randn(count, classes, generator=generator, dtype=torch.float64) * 2 for _ in range(2)
    )
    return logits, weak, torch.randint(classes, (count,), generator=generator)


def loss_of(loss, logits, weak, labels):
    loss.head, loss.features = nn.Identity(), weak
    return loss({"logits": logits}, {"labels": labels})


def softmax(values):
    top = max(values)
    total = sum(math.exp(v - top) for v in values)
    return [math.exp(v - top) / total for v in values]


def in_plain_python(logits, weak, labels, alpha, beta, mu):
    """Sample by sample, as the authors' code goes."""
    rows = list(zip(logits.tolist(), weak.tolist(), labels.tolist()))
    mean = sum(softmax(s)[y] ** 2 for s, _, y in rows) / len(rows)
    losses = []
    for s, w, y in rows:
        p, weak_p = softmax(s), softmax(w)
        log_p = [math.log(v) for v in p]
        score = [
            b / (1 - weak_p[y] + 1e-6) + a / (1 - log_p[y] + 1e-6) for a, b in zip(log_p, weak_p)
        ]
        place = {c: n for n, c in enumerate(sorted(range(len(s)), key=lambda c: -score[c]), 1)}
        zipf = {c: 1 / place[c] for c in place if c != y}
        others = dict(zip(zipf, softmax([s[c] for c in zipf])))
        rest = sum(z / sum(zipf.values()) * math.log(others[c]) for c, z in zipf.items())
        smooth = [0.1 / len(s) + 0.9 * (c == y) for c in range(len(s))]
        losses.append(
            -log_p[y]
            - alpha * (p[y] ** 2 + 1 - mean) * log_p[y]
            - beta * rest
            - mu * sum(a * math.log(b) for a, b in zip(smooth, weak_p))
        )
    return losses


@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.005), (0.1, 0.7, 0.3)])
def test_against_plain_python(weights):
    logits, weak, labels = draw(9)
    found = loss_of(USKD(*weights), logits, weak, labels)
    expected = in_plain_python(logits, weak, labels, *weights)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_gradient_with_the_soft_labels_constant(monkeypatch):
    logits, weak, labels = draw(3)
    constant = soft_labels(logits, weak, labels, True)
    monkeypatch.setattr(nkd_uskd, "soft_labels", lambda *_: constant)
    inputs = logits.requires_grad_(), weak.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: loss_of(USKD(), x, w, labels), inputs)


def test_no_gradient_through_the_soft_labels():
    logits, weak, labels = draw(4)
    logits.requires_grad_()
    loss_of(USKD(1.0, 0.1, 0.0), logits, weak.requires_grad_(), labels).sum().backward()
    target, others = soft_labels(logits.detach(), weak.detach(), labels, True)
    own = nn.functional.one_hot(labels, 6).double()
    expected = (1 + target)[:, None] * (logits.detach().softmax(-1) - own)
    expected += 0.1 * (others_log_p(logits.detach(), labels).exp() * (1 - own) - others)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-12)
    assert weak.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits_have_finite_losses_and_bounded_gradients(dtype):
    signs = torch.tensor([[1.0, -1, 1], [-1, -1, 1]])
    logits = (signs * 1e4).to(dtype).requires_grad_()
    weak = (signs.flip(0) * 1e4).to(dtype).requires_grad_()
    losses = loss_of(USKD(), logits, weak, torch.tensor([1, 0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.abs().max() <= 1 + 2 + 0.1
    assert weak.grad.isfinite().all()


def test_samples_without_a_label_count_nowhere():
    logits, weak, labels = draw(6)
    short = loss_of(USKD(), logits[:4], weak[:4], labels[:4])
    labels[4:] = -100
    found = loss_of(USKD(), logits, weak, labels)
    torch.testing.assert_close(found[:4], short)
    assert (found[4:] == 0).all()


class Model(nn.Module):
    """An image model whose middle layer has `channels`."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.middle, self.unused = nn.Conv2d(1, channels, 3), nn.Identity()
        self.head = nn.Linear(channels, 4)

    def forward(self, pixel_values):
        return Outputs(logits=self.head(self.middle(pixel_values).mean((2, 3))))


def test_the_weak_classifier_finds_its_features():
    model, loss = Model(), USKD()
    batch = {"pixel_values": torch.randn(5, 1, 8, 8), "labels": torch.randint(4, (5,))}
    weak_classifier(model, iter([batch]), loss, layer="middle")
    assert (loss.head.in_features, loss.head.out_features) == (3, 4)
    loss(model(batch["pixel_values"]), batch).sum().backward()
    assert loss.head.weight.grad.abs().max() > 0
    assert loss.features is None
    with pytest.raises(UsageError, match=r"reparam\.uskd"):
        loss({"logits": torch.zeros(5, 4)}, batch)
    for layer, message in {None: "name one", "midle": "did you mean", "unused": "not use"}.items():
        with pytest.raises(ValueError, match=message):
            weak_classifier(model, iter([batch]), USKD(), layer=layer)
    with pytest.raises(ValueError, match="uskd"):
        weak_classifier(model, iter([batch]), nn.Identity(), layer="middle")


def test_overlay():
    overrides = [*card("uskd")["natural"], "technique=uskd", "tracker=none", "trainer.device=cpu"]
    run = assemble(compose(overrides))
    loss = run.objective.loss
    assert (loss.alpha, loss.beta, loss.mu) == (1.0, 0.1, 0.005)
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert id(loss.head.weight) in trained
    for i, name in enumerate(("alpha", "beta", "mu")):
        with pytest.raises(ValueError, match=name):
            USKD(*[-1.0 if j == i else 1.0 for j in range(3)])
