import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from techniques.weighting.eslm_token_selection import EslmTokenSelection


def random_losses(shape: tuple[int, ...] = (4, 25)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).square()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.33, 0.7, 0.99])
def test_keeps_what_reaches_the_empirical_quantile(alpha):
    """numpy's inverted_cdf quantile is inf{s : F(s) ≥ α}."""
    losses = random_losses()
    threshold = np.quantile(losses.numpy(), alpha, method="inverted_cdf")
    expected = losses[losses >= threshold].mean()
    torch.testing.assert_close(EslmTokenSelection(alpha)(losses, {}, {}), expected)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_converges_to_the_conditional_value_at_risk(alpha):
    """The loss is exponential: CVaR = 1 − log(1 − α), and Rockafellar-Uryasev's minimum."""
    n = 200_000
    losses = -torch.log1p(-(torch.arange(n, dtype=torch.float64) + 0.5) / n)
    loss = EslmTokenSelection(alpha)(losses, {}, {}).item()
    assert loss == pytest.approx(1 - math.log(1 - alpha), rel=1e-4)
    var = -math.log(1 - alpha)
    rockafellar = var + (losses - var).clamp(min=0).mean().item() / (1 - alpha)
    assert loss == pytest.approx(rockafellar, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_risk_is_entropy(alpha):
    """Tokens chosen by scipy's entropy, whatever their loss."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 25, 11, generator=generator)
    losses = random_losses()
    risk = entropy(logits.double().softmax(-1).numpy(), axis=-1)
    kept = risk >= np.quantile(risk, alpha, method="inverted_cdf") - 1e-6
    expected = losses[torch.from_numpy(kept)].mean()
    loss = EslmTokenSelection(alpha, risk="entropy")(losses, {"logits": logits}, {})
    torch.testing.assert_close(loss, expected)


def test_ignored_labels_are_neither_ranked_nor_kept():
    losses = random_losses()
    labels = torch.zeros(losses.shape, dtype=torch.int64)
    labels[:, 10:] = -100
    masked = losses.masked_fill(labels == -100, 0.0)
    loss = EslmTokenSelection(0.4)(masked, {}, {"labels": labels})
    torch.testing.assert_close(loss, EslmTokenSelection(0.4)(losses[:, :10], {}, {}))
    labels[:] = -100
    assert EslmTokenSelection(0.4)(torch.zeros(4, 25), {}, {"labels": labels}) == 0


def test_gradient_is_even_over_the_kept_tokens():
    losses = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0], requires_grad=True)
    EslmTokenSelection(0.6)(losses, {}, {}).backward()  # value-at-risk: the third smallest, 3
    torch.testing.assert_close(losses.grad, torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]) / 3)


def test_equal_losses_are_all_kept():
    losses = torch.full((8,), 2.0, requires_grad=True)
    EslmTokenSelection(0.5)(losses, {}, {}).backward()
    torch.testing.assert_close(losses.grad, torch.full((8,), 1 / 8))


@pytest.mark.parametrize("arguments", [{"alpha": 1.0}, {"alpha": -0.1}])
def test_refuses_alpha_out_of_range(arguments):
    with pytest.raises(ValueError, match="alpha"):
        EslmTokenSelection(**arguments)


def test_refuses_an_unknown_risk():
    with pytest.raises(ValueError, match="risk"):
        EslmTokenSelection(0.1, risk="length")
