import pytest
import torch

from models.attention import SelfAttention
from models.position import ALiBi, Rotary
from techniques.attention.flash_bias import FlashBiasAttention


def pair(heads=4, dtype=torch.float64, **keys):
    """The layer and plain attention with the same weights."""
    layers = [kind(16, heads, 0, **keys).to(dtype) for kind in (FlashBiasAttention, SelfAttention)]
    layers[0].load_state_dict(layers[1].state_dict())
    return layers


@pytest.mark.parametrize("heads", [1, 2, 4, 6])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_factors_are_the_bias(heads, length):
    position = ALiBi(12, heads, length)
    bias, (ours, theirs) = position.bias(length), position.factors(length)
    product = ours.double() @ theirs.double().transpose(1, 2)
    seen = torch.ones(length, length).tril().bool()
    torch.testing.assert_close(product[:, seen], bias.double()[:, seen], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1000, 20_000])
def test_factors_survive_bfloat16(length):
    """For slopes that bfloat16 holds, the products of rounded factors are the exact bias."""
    ours, theirs = (x.bfloat16().double() for x in ALiBi(16, 4, length).factors(length))
    last = ours[:, -1:] @ theirs.transpose(1, 2)
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    slopes = 2.0 ** -torch.tensor([2.0, 4, 6, 8], dtype=torch.float64)
    assert last[:, 0].equal(-slopes[:, None] * distance)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_attention_with_the_dense_bias(kv_heads):
    torch.manual_seed(0)
    fast, plain = pair(kv_heads=kv_heads)
    position = ALiBi(16, 4, 33)
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    mask = torch.ones(2, 33)
    mask[1, 20:] = 0
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i, mask, position) for m, i in zip((fast, plain), inputs)]
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(x)
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(fast.qkv.weight.grad, plain.qkv.weight.grad)


def test_without_a_bias_it_is_attention():
    fast, plain = pair()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    for position in (None, Rotary(16, 4, 9).double()):
        torch.testing.assert_close(fast(x, position=position), plain(x, position=position))


def test_refusals():
    class Distance(torch.nn.Module):
        def bias(self, length):
            return torch.zeros(4, length, length)

    fast, _ = pair(dtype=torch.float32)
    with pytest.raises(ValueError, match="Distance has none"):
        fast(torch.randn(1, 5, 16), position=Distance())
    both_ways, _ = pair(dtype=torch.float32, causal=False)
    with pytest.raises(ValueError, match="causal"):
        both_ways(torch.randn(1, 5, 16), position=ALiBi(16, 4, 5))
