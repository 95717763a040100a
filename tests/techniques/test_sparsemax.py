import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from models.attention import SelfAttention
from techniques.attention.sparsemax import SparsemaxAttention


def layer(**keys) -> SparsemaxAttention:
    torch.manual_seed(0)
    built = SparsemaxAttention(16, 4, 0, **keys).double()
    torch.nn.init.normal_(built.qkv.weight, std=0.7)  # scores wide enough to be sparse
    return built


def hidden(length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 16, dtype=torch.float64, generator=generator)


def project(scores: np.ndarray) -> np.ndarray:
    """Onto the simplex, with τ found as the root of Σ max(s − τ, 0) = 1."""
    tau = brentq(
        lambda t: np.maximum(scores - t, 0).sum() - 1, scores.min() - 2, scores.max(), xtol=1e-14
    )
    return np.maximum(scores - tau, 0)


def expected_output(built: SelfAttention, x: torch.Tensor, visible) -> torch.Tensor:
    """Row by row; `visible(sample, query)` are the keys it may see."""
    qkv = built.qkv(x).detach().unflatten(-1, (-1, 4)).numpy()
    kv_heads, share = built.kv_heads, built.heads // built.kv_heads
    q, k, v = np.split(qkv, [4, 4 + kv_heads], axis=2)
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = visible(b, i)
        weights = project(k[b, keys, h // share] @ q[b, i, h] / 2)
        out[b, i, h] = weights @ v[b, keys, h // share]
    return built.out(torch.from_numpy(out).flatten(2))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_rows_are_projections(kv_heads):
    built, x = layer(kv_heads=kv_heads), hidden()
    expected = expected_output(built, x, lambda b, i: slice(0, i + 1))
    torch.testing.assert_close(built(x), expected)


def test_padding_is_not_seen():
    built, x = layer(causal=False), hidden()
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    expected = expected_output(built, x, lambda b, i: slice(0, 4 if b else 7))
    torch.testing.assert_close(built(x, attention_mask=mask), expected)


def test_some_weights_are_zero():
    """The gradient of a query's output by the values is its weights."""
    q, k = (hidden()[:, None] for _ in range(2))
    v = torch.eye(7, 16, dtype=torch.float64).expand(2, 1, 7, 16)
    weights = SparsemaxAttention(16, 1, 0, causal=False).attend(3 * q, k, v, None)[..., :7]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 7, dtype=torch.float64))
    assert (weights == 0).any()


def test_equal_scores_give_uniform_weights():
    """There it agrees with softmax attention."""
    built, softmax = layer(), SelfAttention(16, 4, 0).double()
    with torch.no_grad():
        built.qkv.weight[:32] = 0
    softmax.load_state_dict(built.state_dict())
    torch.testing.assert_close(built(hidden()), softmax(hidden()))


def test_gradients():
    built, x = layer(), hidden(3).requires_grad_()
    assert torch.autograd.gradcheck(built, (x,))
