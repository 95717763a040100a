import pytest
import torch
from torch import nn

from models.moe import MixtureOfExperts
from techniques.callback.loss_free_balancing import LossFreeBalancing, balance


def layer(**keys):
    torch.manual_seed(0)
    return MixtureOfExperts(8, nn.GELU, experts=4, **keys).double()


def test_output_is_the_gated_sum_of_the_chosen_experts():
    moe = layer(top_k=2)
    moe.bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.0]))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    out = moe(x)
    for sample in range(2):
        for position in range(5):
            token = x[sample, position]
            scores = torch.sigmoid(moe.router.weight @ token)
            chosen = sorted(range(4), key=lambda i: -(scores[i].float() + moe.bias[i]))[:2]
            expected = sum(scores[i].float() * moe.experts[i](token) for i in chosen)
            torch.testing.assert_close(out[sample, position], expected)
    assert moe.load.sum().item() == 2 * 5 * 2


def test_bias_decides_who_is_chosen_and_not_the_gates():
    moe = layer(top_k=4)
    x = torch.randn(3, 8, dtype=torch.float64)
    before = moe(x)
    moe.bias.copy_(torch.tensor([3.0, -2.0, 1.0, 0.0]))
    torch.testing.assert_close(moe(x), before)


def test_update_by_hand():
    bias = torch.zeros(4)
    balance(bias, torch.tensor([10.0, 2.0, 4.0, 0.0]), 0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.001])


def test_balances_a_skewed_router():
    """Tokens that all prefer one expert are spread by nothing but the biases."""
    moe = layer(top_k=1)
    with torch.no_grad():
        moe.router.weight.mul_(0.5)
        moe.router.weight[0] += 0.5
    x = torch.randn(512, 8, dtype=torch.float64) + 1
    violations = []
    for _ in range(400):
        moe.load = None
        moe(x)
        load = moe.load.float()
        violations.append((load.max() / load.mean() - 1).item())
        balance(moe.bias, load, 0.005)
    assert violations[0] > 1
    assert violations[-1] < 0.2


def test_refusals():
    with pytest.raises(ValueError, match="top_k"):
        layer(top_k=5)
    with pytest.raises(ValueError, match="rate"):
        LossFreeBalancing(rate=0.0)
