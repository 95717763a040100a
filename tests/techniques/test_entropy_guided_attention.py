import math

import pytest
import torch
from torch import nn

from models.attention import SelfAttention
from techniques.attention.entropy_guided_attention import EntropyGuidedAttention
from techniques.penalty.entropy_guided_attention import attention_entropy
from training.compose import compose

LENGTH = 6


def layer(scale: float = 1.0, **keys) -> EntropyGuidedAttention:
    """With scores of that scale; at 0 the attention is uniform."""
    torch.manual_seed(0)
    built = EntropyGuidedAttention(16, 4, 0, **keys)
    with torch.no_grad():
        built.qkv.weight[:32] *= 4 * scale
    return built


def hidden(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, LENGTH, 16, generator=torch.Generator().manual_seed(1))


def penalty_of(built: EntropyGuidedAttention, x: torch.Tensor, **keys) -> torch.Tensor:
    built(x)
    return attention_entropy(built, {}, {}, **keys)


def test_is_softmax_attention_at_temperature_one():
    built, plain = layer(), SelfAttention(16, 4, 0)
    plain.load_state_dict(built.state_dict(), strict=False)
    torch.testing.assert_close(built(hidden()), plain(hidden()))


def test_entropy_is_that_of_the_weights():
    built = layer(temperature=0.5)
    with torch.no_grad():
        built.temperature[1] = 2.0
        built(hidden())
        qkv = built.qkv(hidden()).double().unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    temperature = torch.tensor([0.5, 2.0, 0.5, 0.5], dtype=torch.float64)
    scores = qkv[0] @ qkv[1].mT / 2 / temperature[:, None, None]
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    expected = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(built.entropy.double(), expected, rtol=1e-4, atol=1e-5)


def test_temperature_limits():
    """Uniform over what is seen when hot, one key when cold."""
    hot, cold = layer(temperature=1e6), layer(temperature=1e-6)
    hot(hidden())
    cold(hidden())
    seen = torch.arange(1, LENGTH + 1).log().expand(2, 4, LENGTH)
    torch.testing.assert_close(hot.entropy, seen, rtol=1e-4, atol=1e-4)
    assert cold.entropy.max() < 1e-3


def by_hand(thresholds: list[float], margin: float, batch: int) -> float:
    """Uniform causal attention: row k has entropy log k."""
    largest = math.log(LENGTH)
    total = 0.0
    for threshold in thresholds:
        for row in range(1, LENGTH + 1):
            deviation = math.log(row) - threshold * largest
            if abs(deviation) > margin * largest:
                total += batch * deviation**2
    return total / len(thresholds)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.4])
def test_penalty_of_uniform_attention(margin):
    built = layer(0.0)
    thresholds = [0.25, 0.5, 0.7, 0.9]
    with torch.no_grad():
        built.threshold.copy_(torch.tensor(thresholds))
    value = penalty_of(built, hidden(3), margin=margin)
    assert value.item() == pytest.approx(by_hand(thresholds, margin, 3), rel=1e-5)


def test_penalty_averages_over_layers():
    first, second = layer(0.0, threshold=0.3), layer(0.0, threshold=0.8)
    for built in (first, second):
        built(hidden())
    value = attention_entropy(nn.ModuleList([first, second]), {}, {}, margin=0.2)
    expected = (by_hand([0.3], 0.2, 2) + by_hand([0.8], 0.2, 2)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_penalty_moves_thresholds_temperatures_and_weights():
    built = layer()
    penalty_of(built, hidden()).backward()
    for parameter in (built.threshold, built.temperature, built.qkv.weight):
        assert parameter.grad.abs().sum() > 0
    deviation = built.entropy.detach() - 0.5 * math.log(LENGTH)
    outside = deviation.abs() > 0.2 * math.log(LENGTH)
    expected = -2 * math.log(LENGTH) * (deviation * outside).sum((0, 2)) / 4
    torch.testing.assert_close(built.threshold.grad, expected)


def test_accumulation_changes_nothing():
    """Micro-batches weighted by their shares add up to the whole batch's penalty."""
    built, x = layer(), hidden(5)
    whole = penalty_of(built, x)
    parts = torch.zeros(())
    for rows, share in ((x[:2], 0.4), (x[2:], 0.6)):
        built(rows)
        parts = parts + share * attention_entropy(built, {}, {"share": torch.tensor(share)})
    torch.testing.assert_close(parts, whole)


def test_overlay():
    config = compose(
        ["technique=entropy_guided_attention", "penalties.attention_entropy.coefficient=1e-4"]
    )
    assert config["penalties"]["attention_entropy"]["coefficient"] == 1e-4
    assert config["penalties"]["attention_entropy"]["margin"] == 0.2


def test_refusals():
    with pytest.raises(ValueError, match="threshold"):
        EntropyGuidedAttention(16, 4, 0, threshold=1.0)
    with pytest.raises(ValueError, match="temperature"):
        EntropyGuidedAttention(16, 4, 0, temperature=0.0)
    with pytest.raises(ValueError, match="no EntropyGuidedAttention"):
        attention_entropy(SelfAttention(16, 4, 0), {}, {})
    with pytest.raises(ValueError, match="margin"):
        penalty_of(layer(), hidden(), margin=-0.1)
