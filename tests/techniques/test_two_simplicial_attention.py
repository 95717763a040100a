import numpy as np
import pytest
import torch

from models.attention import SelfAttention
from models.position import ALiBi, Rotary
from techniques.attention.two_simplicial_attention import TwoSimplicialAttention


def layer(**keys):
    torch.manual_seed(0)
    return TwoSimplicialAttention(12, 2, 3, **({"windows": (5, 3)} | keys)).double()


def hidden(length=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 12, dtype=torch.float64, generator=generator)


def expected(built, x):
    """The docstring's formulae, one query at a time."""
    size = built.head_dim
    q, k1, v1 = (
        part.detach().numpy()
        for part in built.qkv(x)
        .unflatten(-1, (-1, size))
        .split([2, built.kv_heads, built.kv_heads], 2)
    )
    k2, v2 = (
        part.detach().numpy() for part in built.second(x).unflatten(-1, (-1, size)).chunk(2, 2)
    )
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        head = h * built.kv_heads // 2
        j, k = range(max(0, i - 4), i + 1), range(max(0, i - 2), i + 1)
        cube = np.einsum("c,jc,kc->jk", q[b, i, h], k1[b, j, head], k2[b, k, head] + 1 / size)
        weights = np.exp(cube / np.sqrt(size))
        weights /= weights.sum()
        out[b, i, h] = np.einsum("jk,jc,kc->c", weights, v1[b, j, head], v2[b, k, head] + 1)
    return built.out(torch.from_numpy(out).flatten(2))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_pairs_of_two_windows(kv_heads):
    built, x = layer(kv_heads=kv_heads), hidden()
    torch.testing.assert_close(built(x), expected(built, x))


def test_other_layers_are_plain_attention():
    for number, pairs in ((0, False), (2, False), (3, True), (7, True)):
        built = TwoSimplicialAttention(12, 2, number)
        assert (built.second is not None) == pairs
    plain, built = SelfAttention(12, 2, 0), TwoSimplicialAttention(12, 2, 0)
    built.load_state_dict(plain.state_dict())
    x = hidden().float()
    torch.testing.assert_close(built(x), plain(x))


def test_a_later_token_changes_nothing_before():
    built, x = layer(), hidden()
    changed = x.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(built(x)[:, :6], built(changed)[:, :6])
    assert not torch.allclose(built(x)[:, 6:], built(changed)[:, 6:])


def test_padding_is_not_seen():
    built, x = layer(), hidden()
    mask = torch.ones(2, 9)
    mask[0, 2] = 0
    changed = x.clone()
    changed[0, 2] += 1
    before, after = built(x, mask), built(changed, mask)
    torch.testing.assert_close(before[0, 3:], after[0, 3:])


def test_rotary_positions_are_left_out():
    built, x = layer(), hidden()
    torch.testing.assert_close(built(x, position=Rotary(12, 2, 9)), built(x))


def test_refusals():
    with pytest.raises(ValueError, match="every"):
        TwoSimplicialAttention(12, 2, 0, every=0)
    with pytest.raises(ValueError, match="causal only"):
        TwoSimplicialAttention(12, 2, 3, causal=False)
    with pytest.raises(ValueError, match="no bias as ALiBi's"):
        layer()(hidden(), position=ALiBi(12, 2, 9))
