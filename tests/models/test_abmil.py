"""Attention-based multiple-instance learning."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import entropy

from models.abmil import GatedAttention
from tests.models.conftest import DIGITS

BAG = {"in_features": 6, "out_features": 3}


def test_weights_are_the_papers_gated_attention(generator):
    """Equation 9, one bag and head at a time, in NumPy."""
    attention = GatedAttention(6, 4, 2).double()
    x = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    weights = attention(x, mask)
    v, bv, u, bu, w = (
        p.detach().numpy()
        for layer in (attention.value, attention.gate, attention.score)
        for p in layer.parameters()
    )
    for i, size in enumerate((5, 3, 1)):
        h = x[i, :size].numpy()
        hidden = np.tanh(h @ v.T + bv) * expit(h @ u.T + bu)
        for k in range(2):
            expected = softmax(hidden @ w[k])
            np.testing.assert_allclose(weights[i, k, :size].detach().numpy(), expected, atol=1e-12)
            spread = entropy(expected)
            assert attention.entropy[i, k].item() == pytest.approx(spread, abs=1e-12)
    assert (weights[1, :, 3:] == 0).all()


def test_a_masked_bags_entropy_has_a_gradient(generator):
    attention = GatedAttention(6, 4).double()
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])

    def entropies(x):
        attention(x, mask)
        return attention.entropy

    assert torch.autograd.gradcheck(entropies, x)
    far = (1e4 * x.detach()).requires_grad_()
    entropies(far).sum().backward()
    assert far.grad.isfinite().all()


def test_a_bag_is_a_set_and_filling_it_up_changes_nothing(build, generator):
    model = build("abmil", BAG, width=8, heads=2)
    x = torch.randn(3, 5, 6, generator=generator)
    expected = model(features=x)["logits"]
    shuffled = x[:, torch.randperm(5, generator=generator)]
    torch.testing.assert_close(model(features=shuffled)["logits"], expected)
    filled = torch.cat([x, torch.randn(3, 2, 6, generator=generator)], dim=1)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0]).expand(3, -1)
    torch.testing.assert_close(model(features=filled, attention_mask=mask)["logits"], expected)


def test_a_bag_of_one_is_classified_as_its_instance(build, generator):
    model = build("abmil", DIGITS, width=8)
    x = torch.randn(3, 1, 1, 8, 8, generator=generator)
    outputs = model(pixel_values=x)
    torch.testing.assert_close(outputs["hidden"], model.layers(x.flatten(1)))
    assert (outputs["attention"] == 1).all()


@pytest.mark.parametrize("key", ["width", "depth", "heads", "attention_width"])
def test_a_mistake_is_named(key, build):
    with pytest.raises(ValueError, match=rf"model\.{key}: "):
        build("abmil", BAG, **{key: -1})


def test_needs_an_output_size(build):
    with pytest.raises(ValueError, match="out_features"):
        build("abmil", {"in_features": 6})
