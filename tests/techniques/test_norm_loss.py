import pytest
import torch
from torch import nn

from techniques.penalty.norm_loss import norm_loss


def penalty(model: nn.Module) -> torch.Tensor:
    return norm_loss(model, {}, {})


def test_by_hand():
    """Rows of norm 5, 1 and 0: (1−5)² + 0 + 1 = 17; biases, norms and embeddings do not count."""
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.0, 0.0]]))
    model = nn.Sequential(nn.Embedding(5, 2), linear, nn.LayerNorm(3))
    assert penalty(model).item() == 17.0
    penalty(model).backward()
    assert linear.weight.grad[2].tolist() == [0.0, 0.0]  # no direction to grow in, and no NaN


def test_a_filter_is_all_the_weights_of_an_output_channel():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    weight = conv.weight.detach().double()
    expected = sum((1 - weight[c].square().sum().sqrt()) ** 2 for c in range(6))
    assert penalty(conv).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_lies_along_the_weights():
    """2λ(1 − 1/‖w‖)·w, the correction of the published implementation."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 5)
    penalty(linear).backward()
    weight = linear.weight.detach()
    expected = 2 * (1 - 1 / weight.norm(dim=1, keepdim=True)) * weight
    torch.testing.assert_close(linear.weight.grad, expected)


def test_gradient_descent_reaches_the_oblique_manifold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        penalty(model).backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight.flatten(1).norm(dim=1), torch.ones(4))
    torch.testing.assert_close(model[2].weight.norm(dim=1), torch.ones(3))


def test_shared_weights_count_once():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    alone = penalty(first)
    second.weight = first.weight
    torch.testing.assert_close(penalty(nn.Sequential(first, second)), alone)


def test_refuses_a_model_without_weights_to_steer():
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        penalty(nn.LayerNorm(3))
