import pytest
import torch
import torch.nn.functional as F
from torch import nn

from techniques.optimizer.sgdp import SGDP


def gradients(steps=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(steps)]


def final(optimizer_of):
    weight = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    for gradient in gradients():
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_projection_and_decay_it_is_sgd(nesterov):
    keys = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov}
    torch.testing.assert_close(
        final(lambda p: SGDP(p, delta=0.0, **keys)), final(lambda p: torch.optim.SGD(p, **keys))
    )


def test_update_of_a_scale_invariant_weight_is_tangential():
    """cosine_similarity's gradient is orthogonal to the weight, and so must be the step."""
    torch.manual_seed(0)
    weight, goal = nn.Parameter(torch.randn(3, 50)), torch.randn(3, 50)
    optimizer = SGDP([weight], lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(5):
        optimizer.zero_grad()
        (1 - F.cosine_similarity(weight, goal)).sum().backward()
        before = weight.detach().clone()
        optimizer.step()
        radial = F.cosine_similarity(weight.detach() - before, before)
        assert radial.abs().max() < 1e-5


def test_weight_decay_is_of_sgds_strength_and_reduced_where_scale_invariant():
    keys = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2, "wd_ratio": 0.1}
    for delta, share in ((0.1, 0.1), (0.0, 1.0)):
        weight = nn.Parameter(torch.tensor([[1.0, 0.0]]))
        weight.grad = torch.zeros(1, 2)
        SGDP([weight], delta=delta, **keys).step()
        expected = 1 - 0.1 * 0.2 / (1 - 0.5) * share
        torch.testing.assert_close(weight.detach(), torch.tensor([[expected, 0.0]]))


def test_refusals():
    with pytest.raises(ValueError, match="lr"):
        SGDP([torch.zeros(1)], lr=-1.0)
    with pytest.raises(ValueError, match="momentum"):
        SGDP([torch.zeros(1)], momentum=1.0)
