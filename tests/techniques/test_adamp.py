import pytest
import torch
import torch.nn.functional as F
from torch import nn

from techniques.optimizer.adamp import AdamP


def train(optimizer_of, steps=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer, x = optimizer_of(model.parameters()), torch.randn(8, 5, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_without_projection_it_is_adamw():
    keys = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours = train(lambda p: AdamP(p, delta=0.0, **keys))
    torch.testing.assert_close(ours, train(lambda p: torch.optim.AdamW(p, **keys)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_update_of_a_scale_invariant_weight_is_tangential(nesterov):
    """cosine_similarity's gradient is orthogonal to the weight, and so must be the step."""
    torch.manual_seed(0)
    weight, goal = nn.Parameter(torch.randn(3, 50)), torch.randn(3, 50)
    optimizer = AdamP([weight], lr=0.01, weight_decay=0.0, nesterov=nesterov)
    for _ in range(5):
        optimizer.zero_grad()
        (1 - F.cosine_similarity(weight, goal)).sum().backward()
        before = weight.detach().clone()
        optimizer.step()
        radial = F.cosine_similarity(weight.detach() - before, before)
        assert radial.abs().max() < 1e-5


def test_weight_decay_of_a_scale_invariant_weight_is_reduced():
    weight = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    optimizer = AdamP([weight], lr=0.1, weight_decay=0.5, wd_ratio=0.1)
    weight.grad = torch.zeros(1, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[1 - 0.1 * 0.5 * 0.1, 0.0]]))


def test_refusals():
    with pytest.raises(ValueError, match="lr"):
        AdamP([torch.zeros(1)], lr=-1.0)
    with pytest.raises(ValueError, match="betas"):
        AdamP([torch.zeros(1)], betas=(1.0, 0.9))
