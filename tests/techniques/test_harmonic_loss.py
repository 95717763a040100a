import math

import pytest
import torch

from techniques.head.harmonic_loss import HarmonicHead


def head_and_input(exponent: float | None = None, eps: float = 1e-12):
    torch.manual_seed(0)
    head = HarmonicHead(16, 10, exponent=exponent, eps=eps).double()
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return head, x


@pytest.mark.parametrize("exponent", [1.0, 4.0, 16.0])
def test_softmax_is_the_harmonic_max(exponent):
    """pᵢ = dᵢ⁻ⁿ / Σ dⱼ⁻ⁿ with the distances formed by subtraction, in float64."""
    head, x = head_and_input(exponent)
    distance = (x[..., None, :] - head.weight).norm(dim=-1)
    expected = distance**-exponent / (distance**-exponent).sum(-1, keepdim=True)
    torch.testing.assert_close(head(x).softmax(-1), expected, rtol=1e-9, atol=1e-12)


def test_probabilities_do_not_change_with_scale():
    head, x = head_and_input()
    before = head(x).softmax(-1)
    with torch.no_grad():
        head.weight.mul_(7.0)
    torch.testing.assert_close(head(7 * x).softmax(-1), before, rtol=1e-9, atol=1e-12)


def test_finite_optimum_is_the_class_centre():
    """The centre of a class has its whole probability, with finite logits and a zero gradient."""
    head, _ = head_and_input(eps=1e-4)
    centres = head.weight.detach().clone().requires_grad_()
    logits = head(centres)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(-1).diagonal().min().item(), 1.0, atol=1e-3, rtol=0)
    torch.nn.functional.cross_entropy(logits, torch.arange(10)).backward()
    assert centres.grad.isfinite().all()
    assert centres.grad.norm(dim=-1).max() < 1e-3


def test_default_exponent_and_initial_scale():
    torch.manual_seed(0)
    head = HarmonicHead(400, 1000)
    assert head.exponent == 20.0
    assert head.weight.std().item() == pytest.approx(0.56 / math.sqrt(400), rel=0.01)


def test_gradient():
    head, x = head_and_input()
    x = x[:2, :1].requires_grad_()
    assert torch.autograd.gradcheck(head, (x,))


def test_half_precision_inputs_keep_distances_in_float32():
    """Near a centre the squares cancel; bfloat16 would lose the distance altogether."""
    torch.manual_seed(0)
    head = HarmonicHead(64, 8)
    x = (head.weight[:1] + 0.01 / 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.float32
    d2 = (x.double() - head.weight.double()).square().sum(-1) + 1e-4
    torch.testing.assert_close(logits[0].double(), -4 * d2.log(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["exponent", "eps"])
def test_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=name):
        HarmonicHead(4, 2, **{name: 0.0})


def test_refuses_a_bias():
    with pytest.raises(ValueError, match="bias"):
        HarmonicHead(4, 2, bias=True)
